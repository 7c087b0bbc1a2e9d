"""Conversions that were cut off and gone on with, and what is refused before anything is lost."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from l32jax.__main__ import main
from l32jax.checkpoint import native_write
from l32jax.checkpoint.engine import manifest
from l32jax.checkpoint.engine.folders import Folder
from l32jax.checkpoint.engine.slices import Slices
from l32jax.checkpoint.engine.workplace import Workplace
from l32jax.checkpoint.failures import SaveError
from l32jax.checkpoint.formats import Checkpoint
from l32jax.checkpoint.hugging_face_config import TokenIds
from l32jax.conversion import proof
from l32jax.conversion.convert import convert
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from l32jax.presets import PRESETS
from tests.checkpoint_tests.weights import (
    export_hugging_face,
    random_params,
)

FLAT = {"hf": "model.safetensors", "meta": "consolidated.00.pth", "gguf": "model.gguf"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "Tiny-3.2-1B"
    tokenizer = Tokenizer.bytes_only()
    export_hugging_face(
        random_params(PRESETS["tiny-text"]),
        PRESETS["tiny-text"],
        directory,
        dtype=np.dtype(np.float32),
        ids=TokenIds(tokenizer.bos_id, tokenizer.stop_ids, tokenizer.pad_id),
        extra_files=tokenizer.files(),
    )
    return directory


@pytest.fixture
def cut_off(monkeypatch):
    """Runs a conversion that dies after some units."""

    def run(source, destination, after=10, **how):
        record = Workplace.record

        def dying(self, *args):
            record(self, *args)
            if len(self.done) >= after:
                raise OSError("cable")

        monkeypatch.setattr(Workplace, "record", dying)
        with pytest.raises(OSError, match="cable"):
            convert(source, destination, **how)
        monkeypatch.undo()
        return destination.with_name(destination.name + ".unfinished")

    return run


@pytest.mark.parametrize("to", FLAT)
def test_a_file_that_was_removed_in_between_is_missed(to, source, tmp_path, cut_off):
    """It would be made again, with zeros for the tensors that were done."""
    unfinished = cut_off(source, tmp_path / "x", to=to)
    (unfinished / "content" / FLAT[to]).unlink()
    with pytest.raises(InputError, match="begin again"):
        convert(source, tmp_path / "x", to=to, resume=True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("content", [b"", b"half a head"])
def test_a_head_that_a_kill_has_cut_off_is_written_anew(content, source, tmp_path, cut_off):
    unfinished = cut_off(source, tmp_path / "x", to="hf", after=1)
    journal = unfinished / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])
    (unfinished / "content" / FLAT["hf"]).write_bytes(content)
    convert(source, tmp_path / "x", to="hf", resume=True, verify=True)


@pytest.mark.parametrize("to", FLAT)
def test_a_kill_before_the_rename_is_gone_on_with(to, source, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("cable")

    with monkeypatch.context() as patched:
        patched.setattr(Workplace, "finish", fail)
        with pytest.raises(OSError, match="cable"):
            convert(source, tmp_path / "x", to=to)
    convert(source, tmp_path / "x", to=to, resume=True, verify=True)


def test_a_unit_that_was_removed_in_between_is_missed(source, tmp_path, monkeypatch, cut_off):
    monkeypatch.setattr(native_write, "UNIT_BYTES", 80 << 10)
    unfinished = cut_off(source, tmp_path / "x", after=3)
    monkeypatch.setattr(native_write, "UNIT_BYTES", 80 << 10)
    done = json.loads((unfinished / "journal.jsonl").read_text().splitlines()[1])["unit"]
    next((unfinished / "content/0/state" / done / "d").iterdir()).unlink()
    with pytest.raises(InputError, match="begin again"):
        convert(source, tmp_path / "x", resume=True)
    assert not (tmp_path / "x").exists()


def test_another_tokenizer_is_not_gone_on_with(source, tmp_path, cut_off):
    """Its head is of another size, so tensors would be written to other places."""
    cut_off(source, tmp_path / "x.gguf")
    with pytest.raises(InputError, match="tokenizer"):
        convert(source, tmp_path / "x.gguf", tokenizer=source, resume=True)


@pytest.mark.parametrize("line", ["[]", "{}", "1", "null", '{"unit": 1, "record": {}}'])
@pytest.mark.parametrize("first", [True, False])
def test_a_damaged_journal_is_an_error_of_one_line(line, first, source, tmp_path, cut_off):
    journal = cut_off(source, tmp_path / "x", to="hf") / "journal.jsonl"
    lines = journal.read_text().splitlines()
    lines[0 if first else -1] = line
    journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="journal|has format None"):
        convert(source, tmp_path / "x", to="hf", resume=True)


def test_a_full_disk_is_an_error_of_one_line_for_our_format_too(source, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: write [os_error_code='28']\nand much more")

    with monkeypatch.context() as patched:
        patched.setattr(native_write.ts, "open", fail)
        with pytest.raises(SaveError, match="No space left") as told:
            convert(source, tmp_path / "x")
    assert "\n" not in str(told.value)
    convert(source, tmp_path / "x", resume=True, verify=True)


@pytest.mark.parametrize("name", ["x.gguf", "x.safetensors", "hf", "meta"])
def test_every_byte_is_verified(name, source, tmp_path, capsys):
    to = None if "." in name else name
    convert(source, tmp_path / name, to=to)
    assert main(["checkpoint", "verify", str(tmp_path / name)]) == 0
    files = [tmp_path / name] if to is None else sorted((tmp_path / name).iterdir())
    for path in (file for file in files if file.name != manifest.MANIFEST):
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            damaged = bytearray(content)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            assert main(["checkpoint", "verify", str(tmp_path / name)]) == 1, (path, place)
        path.write_bytes(content + b"x")
        assert main(["checkpoint", "verify", str(tmp_path / name)]) == 1
        path.write_bytes(content)
    assert main(["checkpoint", "verify", str(tmp_path / name)]) == 0
    told = capsys.readouterr()
    assert "every byte is as it was written" in told.out


def test_a_tokenizer_of_another_model_is_refused(source, tmp_path):
    config = PRESETS["tiny-text"]
    config = replace(config, decoder=replace(config.decoder, vocab_size=300))
    ids = TokenIds(None, (), None)
    export_hugging_face(random_params(config), config, tmp_path / "y", dtype=np.float32, ids=ids)
    with pytest.raises(InputError, match="the model has 300"):
        convert(tmp_path / "y", tmp_path / "x", tokenizer=source)
    assert not list(tmp_path.glob("x*"))


def test_the_logits_of_a_vision_model_are_about_a_picture():
    params = random_params(PRESETS["tiny-vision"])
    slices = Slices.of(params)
    expected = proof._logits(Checkpoint("hf", PRESETS["tiny-vision"], slices, {}), None)
    params["projector"]["bias"] = params["projector"]["bias"] + 1
    other = Checkpoint("hf", PRESETS["tiny-vision"], Slices.of(params), {})
    assert np.abs(proof._logits(other, None) - expected).max() > proof.TOLERANCE * expected.std()


def test_values_beyond_float16_are_told_as_such(tmp_path):
    config = PRESETS["tiny-text"]
    params = random_params(config)
    params["decoder"]["final_norm"]["scale"] = 1e6 * params["decoder"]["final_norm"]["scale"]
    ids = TokenIds(None, (), None)
    for dtype in ("float32", "bfloat16"):
        export_hugging_face(params, config, tmp_path / dtype, dtype=np.dtype(dtype), ids=ids)
        with pytest.raises(InputError, match="float16.*bfloat16"):
            convert(tmp_path / dtype, tmp_path / "x", dtype="float16")
    assert not list(tmp_path.glob("x*"))


def test_a_link_to_nothing_is_in_the_way(source, tmp_path):
    (tmp_path / "x").symlink_to("nowhere")
    with pytest.raises(InputError, match="it exists"):
        convert(source, tmp_path / "x")


def test_a_failing_network_keeps_what_is_done(tmp_path):
    with pytest.raises(OSError), Folder.at("s3://bucket/run").reading():
        raise ValueError("ABORTED: All 7 retry attempts failed: CURL error")


def test_gguf_has_the_name_of_the_folder(source, tmp_path, monkeypatch):
    monkeypatch.chdir(source)
    for number, where in enumerate((source, Path("."))):
        convert(where, tmp_path / f"{number}.gguf")
        assert b"Tiny-3.2-1B" in (tmp_path / f"{number}.gguf").read_bytes()[:2000]


def test_a_destination_inside_of_the_source_is_gone_on_with(source, tmp_path, cut_off):
    inside = shutil.copytree(source, tmp_path / "source") / "meta"
    cut_off(inside.parent, inside, to="meta")
    convert(inside.parent, inside, to="meta", resume=True, verify=True)


def test_what_is_no_checkpoint_is_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in (["convert", "/dev/null", "x"], ["checkpoint", "verify", "nowhere"]):
        assert main(command) == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.startswith("l32jax: error: ")
        assert told.err.count("\n") == 1
