"""The verbs do what they say."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import l32jax
from l32jax import api
from l32jax.__main__ import VERBS, main
from l32jax.cli.models import size
from l32jax.cli.terminal import tell
from l32jax.config_text import from_json
from l32jax.data.chat import Message
from l32jax.presets import PRESETS
from l32jax.run_config import TrainConfig
from l32jax.train.loop import Interrupted

ROOT = Path(__file__).parents[2]
GENERATE = ("generate", "--model")


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


def test_an_answer_is_reproducible_and_depends_on_the_seed(capsys):
    def answer(seed: int) -> str:
        options = ("--temperature", "1", "--max-new-tokens", "12", "--seed", str(seed))
        assert main([*GENERATE, "tiny-text", "--prompt", "Hello", *options]) == 0
        return capsys.readouterr().out

    first = answer(1)
    assert first.endswith("\n") and len(first) > 1
    assert answer(1) == first != answer(2)


def test_pictures_and_behaviour_reach_the_model(picture, capsys):
    def answer(*options) -> str:
        sampling = ("--max-new-tokens", "4", "--raw", "--dtype", "float32")
        prompt = ("--prompt", "<|image|>It shows")
        assert main([*GENERATE, "tiny-vision", *prompt, *sampling, *map(str, options)]) == 0
        return capsys.readouterr().out

    answer("--image", picture)
    both = answer("--image", picture, picture, "--compat", "hf")
    assert both == answer("--image", picture, "--image", picture, "--compat", "hf")


def test_a_chat_answers_every_line_that_is_piped_in(capsys, pipe):
    pipe("Hello\n\nAnd then?\n/reset\nHello\n/exit\nnever read\n")
    assert main(["chat", "--model", "tiny-text", "--max-new-tokens", "3"]) == 0
    model = l32jax.load("tiny-text")
    first = model.generate("Hello", max_new_tokens=3)
    dialog = [Message("user", "Hello"), Message("assistant", first), Message("user", "And then?")]
    second = model.generate(dialog, max_new_tokens=3)
    assert capsys.readouterr().out == f"{first}\n{second}\n{first}\n"


def test_a_picture_goes_with_the_next_message_of_a_chat(capsys, pipe, picture):
    pipe(f"/image {picture}\nWhat is it?\nAnd now?\n")
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


def test_the_whole_command_answers_and_keeps_what_it_compiled(tmp_path):
    """As people run it: another process, another folder, no test's settings."""
    options = ("--prompt", "Hello", "--max-new-tokens", "1")
    command = [sys.executable, "-m", "l32jax", *GENERATE, "tiny-text", *options]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert any((tmp_path / "l32jax" / "xla").iterdir())


# Runs


def test_a_run_trains_goes_on_verifies_and_answers(run_folder, capsys):
    assert main(["train", "config.py", "save_every=2"]) == 0
    assert " run:" in capsys.readouterr().out
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
    for directory in ("run", "run/1_talk"):
        assert main(["checkpoint", "verify", directory]) == 1
        told = capsys.readouterr().out
        assert told.startswith("run/1_talk, step 1: ") and "config.json" in told


def test_config_show_prints_the_overridden_config(run_folder, capsys):
    assert main(["config", "show", "config.py", "stages.0.num_steps=7", "seed=3"]) == 0
    shown = from_json(TrainConfig, capsys.readouterr().out)
    assert (shown.stages[0].num_steps, shown.seed) == (7, 3)
