"""Bytes made odd: what a bad disk, a cut download or a malicious hand does to any file."""

from random import Random

WORDS = (
    0,
    1,
    2,
    7,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def mutated(content: bytes, random: Random, within: int | None = None) -> bytes:
    """One change, in the first `within` bytes."""
    size = len(content) if within is None else min(within, len(content))
    at = random.randrange(size + 1)
    width = random.choice([1, 2, 4, 8])
    match random.randrange(7):
        case 0 if at < size:
            return _put(content, at, bytes([content[at] ^ 1 << random.randrange(8)]))
        case 1:
            return _put(content, at, random.choice(WORDS).to_bytes(8, "little")[:width])
        case 2:
            return content[:at]
        case 3:
            return content[:at] + content[at + random.choice([1, 4, 8, 100]) :]
        case 4:
            return content[:at] + content[max(0, at - random.choice([1, 8, 100])) :]
        case 5:
            return content + random.choice([b"\0", b"x" * 100, content[:100]])
    return _put(content, at, random.getrandbits(8 * width).to_bytes(width, "little"))


def _put(content: bytes, at: int, part: bytes) -> bytes:
    return content[:at] + part + content[at + len(part) :]
