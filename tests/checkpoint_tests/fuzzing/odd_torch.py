"""Files of torch.save made odd: the zip archive, and the pickle in it by its instructions."""

import io
import pickle
import pickletools
import struct
import warnings
import zipfile
from random import Random
from typing import NamedTuple

from tests.checkpoint_tests.fuzzing import odd_bytes

NUMBERS = (0, 1, -1, 2, 31, 2**16, 2**31, 2**62 - 1, 2**62, 2**63, 2**64, -(2**70))
NAMES = (
    *("os\nsystem", "builtins\neval", "torch\nFloatStorage", "torch\nBoolStorage", "torch\nload"),
    *(
        "torch._utils\n_rebuild_tensor_v2",
        "torch._utils\n_rebuild_parameter",
        "collections\nOrderedDict",
    ),
)
# Instructions as they stand in a pickle: the harmless, the forbidden, and claims of lengths.
CODE = (
    *(b"(", b")", b"}", b"]", b"0", b"1", b"2", b"N", b"t", b"R", b"s", b"u", b"b", b"a", b"e"),
    *(b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"\x81", b"\x93", b"\x94", b"Q", b"o", b"."),
    *(
        b"h\0",
        b"h\xff",
        b"q\0",
        b"j\xff\xff\xff\xff",
        b"r\xff\xff\xff\x7f",
        b"\x82\x01",
        b"M\xff\xff",
    ),
    *(
        b"X\xff\xff\xff\x7f",
        b"\x8d" + b"\xff" * 8,
        b"\x8b\xff\xff\xff\x7f",
        b"\x8a\xff" + b"\1" * 255,
    ),
    *(b"B\xff\xff\xff\xff", b"I12345678901234567890\n", b"I" + b"9" * 5000 + b"\n", b"L5L\n"),
    *(
        b"V\\ud800\n",
        b"S'x'\n",
        b"Px\n",
        b"ios\nsystem\n",
        b"F1e999\n",
        b"\x80\x05",
        b"\x95" + b"\0" * 8,
    ),
    *(
        b"(" * 20_000,
        b"(" * 500 + b"t" * 500,
        b"N\x85" * 3000,
        b"X\2\0\0\0\xff\xfe",
        b"}q\5h\5h\5s",
    ),
)


class Entry(NamedTuple):
    """Of the archive, in order; the names in it and in front of the content may be twice there."""

    name: str
    content: bytes
    method: int = zipfile.ZIP_STORED


def mutated(content: bytes, random: Random) -> bytes:
    match random.randrange(10):
        case 0:
            return odd_bytes.mutated(content, random)
        case 1:
            return _odd_list(content, random)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [Entry(name, archive.read(name)) for name in archive.namelist()]
    for _ in range(random.choice([1, 1, 2, 3])):
        if random.random() < 0.7:
            entries = [
                entry._replace(content=_odd_pickle(entry.content, random))
                if entry.name.endswith("data.pkl")
                else entry
                for entry in entries
            ]
        else:
            entries = _odd_entries(entries, random)
    return _archive(entries)


def _archive(entries: list[Entry]) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for entry in entries:
            archive.writestr(zipfile.ZipInfo(entry.name), entry.content, entry.method)
    return file.getvalue()


def _odd_entries(entries: list[Entry], random: Random) -> list[Entry]:
    if not entries:
        return entries
    changed = list(entries)
    at = random.randrange(len(changed))
    entry = changed[at]
    match random.randrange(7):
        case 0:
            del changed[at]
        case 1:
            changed.append(entry)
        case 2:
            methods = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
            changed[at] = entry._replace(method=random.choice(methods))
        case 3:
            size = random.randrange(len(entry.content) + 1)
            changed[at] = entry._replace(content=entry.content[:size])
        case 4:
            changed[at] = entry._replace(
                content=entry.content + b"\0" * random.choice([1, 4, 4096])
            )
        case 5:
            name = random.choice(
                ["../x", "x/data.pkl", "data.pkl", "", "a" * 300, f"{entry.name}/", "\x1b[2J"]
            )
            changed[at] = entry._replace(name=name)
        case 6:
            order = random.choice([b"big", b"", b"little\n", b"\xff" * 100])
            root = entry.name.partition("/")[0]
            changed.append(Entry(f"{root}/byteorder", order))
    return changed


def _odd_list(content: bytes, random: Random) -> bytes:
    """Fields of the records that say where the entries are."""
    marks = [b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\3\4"]
    places = [i for mark in marks if (i := content.find(mark)) >= 0]
    at = random.choice(places) + random.randrange(4, 56)
    number = random.choice([*odd_bytes.WORDS, len(content), len(content) - 1])
    part = number.to_bytes(8, "little")[: random.choice([1, 2, 4, 8])]
    return content[:at] + part + content[at + len(part) :]


def _odd_pickle(content: bytes, random: Random) -> bytes:
    """One change between, in or of its instructions."""
    try:
        starts = [position for *_, position in pickletools.genops(content)]
    except Exception:  # already odd, and genops raises whatever it likes
        return odd_bytes.mutated(content, random)
    code = [content[i:j] for i, j in zip(starts, [*starts[1:], len(content)], strict=True)]
    if not code:
        return content
    at, other = random.randrange(len(code)), random.randrange(len(code))
    match random.randrange(8):
        case 0:
            del code[at]
        case 1:
            code.insert(at, code[other])
        case 2:
            code[at], code[other] = code[other], code[at]
        case 3:
            code.insert(at, random.choice(CODE))
        case 4:
            code[at] = odd_bytes.mutated(code[at], random)
        case 5:
            _replace(code, pickle.GLOBAL, b"c" + random.choice(NAMES).encode() + b"\n", random)
        case 6:
            _replace(code, pickle.LONG1, _integer(random.choice(NUMBERS)), random)
        case 7:
            text = random.choice(
                ["", "0", "1", "999", "cuda:0", "storage", "a" * 300, "../x", "\0", "x\n\x1b[2J"]
            )
            _replace(code, pickle.BINUNICODE, _text(text), random)
    return b"".join(code)


def _replace(code: list[bytes], opcode: bytes, new: bytes, random: Random) -> None:
    places = [i for i, part in enumerate(code) if part[:1] == opcode]
    if places:
        code[random.choice(places)] = new


def _integer(number: int) -> bytes:
    content = pickle.encode_long(number)
    return pickle.LONG1 + bytes([len(content)]) + content


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()
