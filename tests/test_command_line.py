"""The verbs do what they say; what people get wrong is told in one line."""

import dataclasses
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import l32jax
from l32jax import api
from l32jax.__main__ import VERBS, main
from l32jax.checkpoint.hugging_face import TokenIds, export
from l32jax.cli.ask import Sampling
from l32jax.cli.models import size
from l32jax.cli.terminal import tell
from l32jax.config import TrainConfig, from_json
from l32jax.data.chat import Message
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from l32jax.generate.sampling import SamplingConfig
from l32jax.presets import PRESETS
from l32jax.train.loop import Interrupted

ROOT = Path(__file__).parents[1]
GENERATE = ("generate", "--model")

CONFIG = """
from l32jax.config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from l32jax.presets import TINY_TEXT

def config():
    return TrainConfig(
        model=TINY_TEXT,
        stages=(
            StageConfig(
                name="talk",
                num_steps=3,
                trains=("language_model",),
                data=DataConfig(mixture=(("talk.jsonl", 1.0),), batch_size=8, length=64),
                optimizer=OptimizerConfig(peak_lr=1e-3),
            ),
        ),
        directory="run",
    )
"""
TALK = [
    {
        "messages": [
            {"role": "user", "content": f"{number}?"},
            {"role": "assistant", "content": f"{number}."},
        ]
    }
    for number in range(20)
]


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """The working directory, with a config and the conversations that it trains on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in TALK))
    return tmp_path


@pytest.fixture(scope="module")
def hugging_face_folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    model = l32jax.load("tiny-text")
    ids = TokenIds(begin=256, stop=(264, 265), pad=None)
    files = {"tokenizer.model": model.tokenizer.to_bytes()}
    export(model.params, model.config, directory, dtype=np.float32, ids=ids, extra_files=files)
    return directory


@pytest.fixture
def complaint(capsys):
    """What a command, which must fail for what was put into it, has to say."""

    def run(*arguments: str | Path) -> str:
        assert main(list(map(str, arguments))) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("l32jax: error: ")
        assert told.err.count("\n") == 1 and told.err.endswith("\n")
        return told.err

    return run


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.full((28, 28, 3), 200, np.uint8)).save(path)
    return path


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """`main` sets variables for jax, which is imported here already, and for children."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))


def pipe(monkeypatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# Help


def test_help_names_every_verb_and_answers_at_once():
    before = os.times()
    arguments = [sys.executable, "-m", "l32jax", "--help"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    used = os.times().children_user - before.children_user
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)
    assert used < 0.5, f"{used} s of processor time"


@pytest.mark.parametrize("arguments", [(), ("-h",), ("config",), ("checkpoint", "--help")])
def test_the_overview_is_there_in_every_way_to_ask_for_it(arguments, capsys):
    assert main(arguments) == 0
    assert "quickstart" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_begins_with_its_summary_and_has_examples(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([*verb.split(), "--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert f"\n\n{VERBS[verb].summary}\n" in told
    assert f"  l32jax {verb}" in told.partition("Examples:")[2]


def test_the_help_of_no_verb_imports_jax():
    ask = "import sys; from l32jax.__main__ import main\ntry: main({})\nexcept SystemExit: pass\n"
    program = "".join(ask.format([*verb.split(), "--help"]) for verb in VERBS)
    program += "assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)


def test_a_missing_option_is_bad_input(capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", "--prompt", "Hi"])
    assert end.value.code == 2
    assert "--model" in capsys.readouterr().err


# Sizes


@pytest.mark.parametrize(
    ("name", "parameters", "cache_bytes", "tokens_per_image"),
    [
        ("llama3.2-1b", 1_235_814_400, 32_768, 0),
        ("llama3.2-3b", 3_212_749_824, 114_688, 0),
        ("llama3.1-8b", 8_030_261_248, 131_072, 0),
        ("llama3.1-70b", 70_553_706_496, 327_680, 0),
        ("llama3.2-11b-vision", 10_616_650_275, 131_072, 4 * 1025),
        ("llama3.2-11b-vision-instruct", 10_629_184_035, 131_072, 4 * 1601),
        ("llama3.2-90b-vision", 88_552_318_523, 327_680, 4 * 1601),
        ("smollm2-135m", 134_515_008, 23_040, 0),
    ],
)
def test_sizes_are_those_of_the_released_models(name, parameters, cache_bytes, tokens_per_image):
    expected = (parameters, PRESETS[name].decoder.max_context, cache_bytes, tokens_per_image)
    assert size(PRESETS[name]) == expected


def test_the_table_of_models_is_whole_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["models"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in PRESETS)
    assert "88,552,318,523" in told and "…" not in told


# Asking


def test_the_options_of_sampling_are_its_config():
    assert dataclasses.asdict(Sampling()) == dataclasses.asdict(SamplingConfig())


def test_an_answer_is_reproducible_and_depends_on_the_seed(capsys):
    def answer(seed: int) -> str:
        options = ("--temperature", "1", "--max-new-tokens", "12", "--seed", str(seed))
        assert main([*GENERATE, "tiny-text", "--prompt", "Hello", *options]) == 0
        return capsys.readouterr().out

    first = answer(1)
    assert first.endswith("\n") and len(first) > 1
    assert answer(1) == first != answer(2)


def test_pictures_and_behaviour_reach_the_model(picture, capsys):
    def answer(*options: str) -> str:
        sampling = ("--max-new-tokens", "4", "--raw", "--dtype", "float32")
        prompt = ("--prompt", "<|image|>It shows")
        assert main([*GENERATE, "tiny-vision", *prompt, *sampling, *options]) == 0
        return capsys.readouterr().out

    first = answer("--image", str(picture))
    assert first == answer("--image", str(picture), "--compat", "meta")
    answer("--image", str(picture), str(picture), "--compat", "hf")
    answer("--image", str(picture), "--image", str(picture))


def test_a_chat_answers_every_line_that_is_piped_in(capsys, monkeypatch):
    pipe(monkeypatch, "Hello\n\nAnd then?\n/reset\nHello\n/exit\nnever read\n")
    assert main(["chat", "--model", "tiny-text", "--max-new-tokens", "3"]) == 0
    model = l32jax.load("tiny-text")
    first = model.generate("Hello", max_new_tokens=3)
    dialog = [Message("user", "Hello"), Message("assistant", first), Message("user", "And then?")]
    second = model.generate(dialog, max_new_tokens=3)
    assert capsys.readouterr().out == f"{first}\n{second}\n{first}\n"


def test_a_picture_goes_with_the_next_message_of_a_chat(tmp_path, capsys, monkeypatch, picture):
    pipe(monkeypatch, f"/image {picture}\nWhat is it?\nAnd now?\n")
    assert main(["chat", "--model", "tiny-vision", "--max-new-tokens", "3"]) == 0
    first, _, _ = capsys.readouterr().out.partition("\n")
    model = l32jax.load("tiny-vision")
    assert model.generate("What is it?", images=[picture], max_new_tokens=3).startswith(first)


def test_ctrl_c_stops_an_answer_and_not_the_chat(capsys):
    def pieces():
        yield "so "
        raise KeyboardInterrupt

    assert tell(pieces(), may_stop=True) == "so "
    assert capsys.readouterr().out == "so \n"


# Runs


def test_a_run_trains_goes_on_verifies_and_answers(run_folder, capsys):
    assert main(["train", "config.py", "save_every=2"]) == 0
    assert "run" in capsys.readouterr().out
    lines = (run_folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert main(["train", "config.py"]) == 0  # nothing is left to do
    assert (run_folder / "run" / "metrics.jsonl").read_text().splitlines() == lines
    assert main(["checkpoint", "verify", "run/1_talk"]) == 0
    capsys.readouterr()
    assert main([*GENERATE, "run", "--prompt", "3?", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_a_run_can_start_from_a_model_on_disk(run_folder, hugging_face_folder):
    frozen = ["stages.0.trains=('vision_tower',)", f"start_from={hugging_face_folder}"]
    assert main(["train", "config.py", *frozen, "stages.0.num_steps=1"]) == 0
    before, after = l32jax.load(hugging_face_folder), l32jax.load("run")
    assert jax.tree.all(jax.tree.map(np.array_equal, before.params, after.params))


def test_an_interrupted_run_says_so_with_its_exit_code(run_folder, capsys, monkeypatch):
    def interrupted(*_):
        raise Interrupted("talk", 2)

    monkeypatch.setattr(api, "train", interrupted)
    assert main(["train", "config.py"]) == 75
    told = capsys.readouterr().err
    assert "saved stage 'talk' at step 2" in told and told.count("\n") == 1


def test_a_damaged_checkpoint_is_told_file_by_file(run_folder, capsys):
    assert main(["train", "config.py", "stages.0.num_steps=1"]) == 0
    (run_folder / "run" / "1_talk" / "1" / "config.json").write_text("{}")
    capsys.readouterr()
    assert main(["checkpoint", "verify", "run/1_talk"]) == 1
    told = capsys.readouterr().out
    assert told.startswith("step 1: ") and "config.json" in told


def test_config_show_prints_the_overridden_config(run_folder, capsys):
    assert main(["config", "show", "config.py", "stages.0.num_steps=7", "seed=3"]) == 0
    shown = from_json(TrainConfig, capsys.readouterr().out)
    assert (shown.stages[0].num_steps, shown.seed) == (7, 3)


# What people get wrong


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


def test_a_wrong_line_in_a_piped_chat_ends_it(complaint, monkeypatch):
    pipe(monkeypatch, "/imgae x.png\nHello\n")
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
    assert "'tiny-vision'" in complaint("train", "config.py", "start_from=tiny-vision")


def test_a_wrong_line_of_data_is_named(complaint, run_folder):
    (run_folder / "talk.jsonl").write_text('{"messages": 3}\n' * 20)
    assert "talk.jsonl" in complaint("train", "config.py")


def test_missing_data_is_named(complaint, run_folder):
    (run_folder / "talk.jsonl").unlink()
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


def test_the_whole_command_answers_and_keeps_what_it_compiled(tmp_path):
    """As people run it: another process, another folder, no test's settings."""
    command = [sys.executable, "-m", "l32jax", *GENERATE, "tiny-text"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    good = [*command, "--prompt", "Hello", "--max-new-tokens", "2"]
    done = subprocess.run(good, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert any((tmp_path / "l32jax" / "xla").iterdir())
    bad = [*command, "--prompt", ""]
    done = subprocess.run(bad, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "l32jax: error: prompt: it is empty; ask something\n"
