"""What people get wrong is told in one line that names it."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from l32jax.__main__ import main
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError

ROOT = Path(__file__).parents[2]
GENERATE = ("generate", "--model")


def test_an_unknown_preset_is_named_with_the_likely_one(complaint):
    told = complaint(*GENERATE, "tiny-txt", "--prompt", "Hi")
    assert "'tiny-txt'" in told and "did you mean 'tiny-text'?" in told


def test_an_unknown_verb_is_named_with_the_likely_one(complaint):
    assert "did you mean 'generate'?" in complaint("generat")
    assert "did you mean 'config show'?" in complaint("config", "shwo")


def test_a_damaged_picture_is_named(complaint, tmp_path, picture):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(picture.read_bytes()[:60])
    told = complaint(*GENERATE, "tiny-vision", "--image", str(damaged), "--prompt", "Hi")
    assert str(damaged) in told and "damaged" in told


def test_a_picture_for_a_text_model_is_refused(complaint, picture):
    assert "text-only" in complaint(*GENERATE, "tiny-text", "--image", picture, "--prompt", "Hi")


def test_a_tokenizer_of_another_size_is_named(complaint, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.model").write_bytes(Tokenizer.train(["aaaa"], num_merges=1).to_bytes())
    told = complaint(*GENERATE, "tiny-text", "--tokenizer", other, "--prompt", "Hi")
    assert str(other) in told and "513" in told and "512" in told


def test_a_missing_tensor_is_named_with_its_folder(complaint, tmp_path, hugging_face_folder):
    folder = tmp_path / "incomplete"
    shutil.copytree(hugging_face_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    told = complaint(*GENERATE, folder, "--prompt", "Hi")
    assert "model.layers.2.mlp.up_proj.weight" in told and str(folder) in told


def test_a_folder_without_a_model_is_named(complaint, tmp_path):
    assert str(tmp_path) in complaint(*GENERATE, tmp_path, "--prompt", "Hi")


@pytest.mark.parametrize("options", [(), ("--raw",)])
def test_an_empty_prompt_is_refused(complaint, options):
    assert "prompt" in complaint(*GENERATE, "tiny-text", "--prompt", "", *options)


def test_a_prompt_beyond_the_context_is_refused(complaint):
    assert "1024" in complaint(*GENERATE, "tiny-text", "--prompt", "x" * 1100)


def test_a_sampling_option_out_of_range_is_named(complaint):
    assert "top_p=2.0" in complaint(*GENERATE, "tiny-text", "--prompt", "Hi", "--top-p", "2")


def test_a_wrong_line_in_a_piped_chat_ends_it(complaint, pipe):
    pipe("/imgae x.png\nHello\n")
    assert "'/imgae'" in complaint("chat", "--model", "tiny-text")


def test_a_missing_config_file_is_named(complaint):
    assert "'none.py'" in complaint("train", "none.py")


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("sede=1", "did you mean 'seed'?"),
        ("stages.0.num_steps=many", "num_steps='many'"),
        ("stages.3.num_steps=1", "below 1"),
        ("seed", "path=value"),
    ],
)
def test_a_wrong_override_is_named(complaint, run_folder, assignment, said):
    assert said in complaint("config", "show", "config.py", assignment)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("def config(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("x = 1", "config"),
        ("def config(): return 3", "int"),
        ("from l32jax.presets import preset\npreset('llama')", "no preset is called 'llama'"),
    ],
)
def test_a_wrong_config_file_is_named(complaint, run_folder, content, said):
    (run_folder / "config.py").write_text(content)
    told = complaint("train", "config.py")
    assert "config.py" in told and said in told


def test_a_start_of_another_architecture_is_refused(complaint, run_folder):
    assert "'tiny-text'" in complaint(
        "train", "config.py", "start_from=tiny-text", "model.decoder.norm_eps=1e-6"
    )


def test_a_wrong_line_of_data_is_named(run_folder):
    """In a process of its own, for the type checks of tests read a line and wrap its error."""
    (run_folder / "talk.jsonl").write_text('{"messages": 3}\n' * 20)
    command = [sys.executable, "-m", "l32jax", "train", "config.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    told = r"l32jax: error: 1000 unusable .* talk.jsonl line \d+: 'messages' is not .*\n"
    assert re.fullmatch(told, done.stderr)


def test_missing_data_is_named(complaint, run_folder):
    (run_folder / "talk.jsonl").unlink()
    assert "talk.jsonl" in complaint("train", "config.py")


def test_an_empty_file_of_data_is_named(complaint, run_folder):
    (run_folder / "talk.jsonl").write_text("")
    assert "talk.jsonl" in complaint("train", "config.py")


def test_a_folder_without_steps_cannot_be_verified(complaint, tmp_path):
    assert str(tmp_path) in complaint("checkpoint", "verify", tmp_path)


def test_debug_shows_where_an_error_comes_from(run_folder):
    with pytest.raises(InputError, match="'none.py'"):
        main(["--debug", "train", "none.py"])


def test_what_the_system_refuses_is_one_line(run_folder, capsys):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("l32jax.cli.runs.read_config", raising(error))
        assert main(["train", "config.py"]) == 1
    assert capsys.readouterr().err == "l32jax: error: weights: No space left on device\n"


def test_ctrl_c_ends_without_a_traceback(capsys, monkeypatch):
    monkeypatch.setattr("l32jax.cli.runs.read_config", raising(KeyboardInterrupt()))
    assert main(["train", "config.py"]) == 130
    assert capsys.readouterr().err == ""


def test_a_reader_who_has_left_is_no_error(run_folder):
    show = [sys.executable, "-m", "l32jax", "config", "show", str(run_folder / "config.py")]
    with subprocess.Popen(show, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout and child.stderr
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141


def raising(error: BaseException):
    def call(*_, **__):
        raise error

    return call
