"""One odd checkpoint: a copy of a seed, and one to a few changes in the place that they go into."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random

from tests.checkpoint_tests.fuzzing import (
    odd_bytes,
    odd_folders,
    odd_gguf,
    odd_json,
    odd_safetensors,
    odd_torch,
)
from tests.checkpoint_tests.fuzzing.seeds import Seed

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
)
TEMPLATES = (
    "{{",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ 1 / 0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('no') }}",
    "{{ x.y.z }}",
    "{{ 'a' * 10**12 }}",
    "{{ 'a'.ljust(10**12) }}",
    "{% include 'x' %}",
    "{{ messages[99] }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ range(10**12) | list }}",
    "{{ 9**9**9 }}",
    "{% set a = 'b' %}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ 'x'.center(10**10) }}",
    "\ud83d{{ bos_token }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ (1, 2) | join('x' * 10**9) }}",
    "{{ lipsum(1000000) }}",
)


def make(seeds: Sequence[Seed], folder: Path, number: int) -> tuple[Path, str]:
    """From one of the seeds, below an empty folder; its path, and how it is opened.

    The same number makes the same.
    """
    random = Random(number)
    seed = random.choice(seeds)
    path = folder / "case" / seed.path.name
    shutil.copytree(seed.path.parent, path.parent)
    CHANGES[seed.format](path, random)
    return path, seed.kind


def _safetensors(path: Path, random: Random) -> None:
    path.write_bytes(odd_safetensors.mutated(path.read_bytes(), random))


def _gguf(path: Path, random: Random) -> None:
    prefix = random.choice(["llama.", "general.", "tokenizer.", "", ""])
    path.write_bytes(odd_gguf.mutated(path.read_bytes(), random, prefix))


def _hugging_face(path: Path, random: Random) -> None:
    index = path / "model.safetensors.index.json"
    match random.randrange(8):
        case 0:
            odd_folders.odd_entry(random.choice(odd_folders.files_below(path)), random)
        case 1 | 2 if index.exists():
            odd_folders.odd_index(path, random)
        case 3 | 4:
            _safetensors(random.choice(sorted(path.glob("*.safetensors"))), random)
        case _:
            _json(path / "config.json", random)


def _meta(path: Path, random: Random) -> None:
    match random.randrange(10):
        case 0:
            odd_folders.odd_entry(random.choice(odd_folders.files_below(path)), random)
        case 1:
            file = random.choice(sorted(path.glob("*.pth")))
            name = random.choice(["consolidated.pth", "consolidated.01.pth", "consolidated.x.pth"])
            (path / name).write_bytes(file.read_bytes())
        case 2 | 3 | 4:
            _json(path / "params.json", random)
        case _:
            file = random.choice(sorted(path.glob("*.pth")))
            file.write_bytes(odd_torch.mutated(file.read_bytes(), random))


def _peft(path: Path, random: Random) -> None:
    match random.randrange(8):
        case 0:
            odd_folders.odd_entry(random.choice(odd_folders.files_below(path)), random)
        case 1 | 2 | 3:
            _safetensors(path / "adapter_model.safetensors", random)
        case _:
            _json(path / "adapter_config.json", random)


def _json(path: Path, random: Random) -> None:
    path.write_bytes(odd_json.mutated_text(path.read_bytes(), random))


def _tokenizer(path: Path, random: Random) -> None:
    if path.is_file():
        path.write_bytes(odd_gguf.mutated(path.read_bytes(), random, "tokenizer."))
        return
    file = path / random.choice([name for name in TOKENIZER_FILES if (path / name).exists()])
    if random.random() < 0.06:
        odd_folders.odd_entry(file, random)
    elif file.suffix == ".jinja" and random.random() < 0.6:
        file.write_bytes(random.choice(TEMPLATES).encode(errors="surrogatepass"))
    elif file.suffix == ".json" and random.random() < 0.9:
        _json(file, random)
    elif file.suffix == ".model" and random.random() < 0.7:
        _odd_ranks(file, random)
    else:
        file.write_bytes(odd_bytes.mutated(file.read_bytes(), random))


def _odd_ranks(file: Path, random: Random) -> None:
    lines = file.read_bytes().splitlines()
    at = random.randrange(len(lines))
    odd = [b"", b"\xff 1", b"QQ== 9" + b"9" * 5000, b"QQ==", b"QQ== -1", b"=== 3", b"QUJD 1 1"]
    odd += [
        b"QUJD" * 300 + b" 264",
        "QQ== \u0663".encode(),
        b"QQ== 1e3",
        b"QUJDRA== 264",
        lines[at],
    ]
    match random.randrange(3):
        case 0:
            lines[at] = random.choice(odd)
        case 1:
            lines.append(random.choice(odd))
        case 2:
            del lines[at]
    file.write_bytes(b"\n".join(lines))


CHANGES = {
    "safetensors": _safetensors,
    "hf": _hugging_face,
    "gguf": _gguf,
    "meta": _meta,
    "orbax": odd_folders.odd_store,
    "adapter": _safetensors,
    "peft": _peft,
    "tokenizer": _tokenizer,
}
