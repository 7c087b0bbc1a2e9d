"""JSON made odd: other values, types, keys and spellings in any place of a document."""

import json
from random import Random
from typing import Any

NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 8, 16, 64, 1000, 2**16, 2**24, 2**24 + 1, 2**31, 2**32, 2**40),
    *(2**53, 2**62, 2**63, 2**63 - 1, 2**64, -(2**63), 10**30, 10**100),
    *(0.5, -0.0, 1e-300, 1e-5, 1e29, 1e308, 500000.0),
)
TEXTS = (
    *(
        "",
        "x",
        "../x",
        "/etc/passwd",
        "a/b",
        ".",
        "..",
        "a\\b",
        "a\0b",
        "a\nb",
        "\x1b[2J",
        "\u202ex",
    ),
    *("\u00e9\u65e5\U0001f600", "a" * 5000, "%s{0}", "(a+)+$", "F16", "I8", "llama", "1e5"),
)
OTHERS = (None, True, False, [], {}, [[]], [{}], {"a": 1}, {"": None}, [0], [1, 2], [None])
# What json.dumps cannot be made to write stands in the tree as one of these names.
RAW = {
    "\0deep": "[" * 900 + "]" * 900,
    "\0deeper": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "\0digits": "9" * 5000,
    "\0infinite": "1e999",
    "\0nan": "NaN",
    "\0negative": "-Infinity",
    "\0half": '"\\ud800"',
    "\0twice": '{"a": 1, "a": 2}',
    "\0wide": "[" + "0," * 50_000 + "0]",
}


def odd_value(old: Any, random: Random) -> Any:
    """Something else in place of `old`, often close to it."""
    match random.randrange(5):
        case 0:
            return random.choice(NUMBERS)
        case 1:
            return random.choice(TEXTS)
        case 2:
            return random.choice(OTHERS)
        case 3:
            return random.choice(list(RAW))
    return _near(old, random)


def _near(old: Any, random: Random) -> Any:
    if isinstance(old, bool) or old is None:
        return random.choice([not old, 0, 1, "true", [old]])
    if isinstance(old, (int, float)):
        return random.choice(
            [old + 1, old - 1, old * 2, old // 2, -old, float(old), str(old), [old]]
        )
    if isinstance(old, str):
        return random.choice(
            [old + "x", old[:-1], old.upper(), old * 2, f" {old}", [old], {old: 1}]
        )
    if isinstance(old, list):
        return random.choice(
            [old + old[:1], old[1:], old[::-1], old * 2, [old], dict(enumerate(old))]
        )
    return random.choice(
        [
            list(old),
            [[k, v] for k, v in old.items()],
            {**old, "x": 1},
            [old],
            {k: None for k in old},
        ]
    )


def mutated(tree: Any, random: Random) -> Any:
    """One change in one place, found by walking down from the root."""
    if not isinstance(tree, (dict, list)) or not tree or random.random() < 0.12:
        return odd_value(tree, random)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = random.choice(keys)
    changed = dict(tree) if isinstance(tree, dict) else list(tree)
    action = random.randrange(12)
    if action == 0:
        del changed[key]
    elif action == 1:
        other = random.choice(keys)
        changed[key], changed[other] = changed[other], changed[key]
    elif action == 2 and isinstance(changed, dict):
        changed[odd_key(key, random)] = changed.pop(key)
    elif action == 3 and isinstance(changed, dict):
        changed[odd_key(key, random)] = odd_value(changed[key], random)
    else:
        changed[key] = mutated(changed[key], random)
    return changed


def odd_key(key: str, random: Random) -> str:
    return random.choice([f"{key}x", key[:-1], key.upper(), *TEXTS])


def text_of(tree: Any, random: Random) -> bytes:
    """As a file has it; seldom in a spelling that no writer uses."""
    text = json.dumps(tree)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    match random.randrange(40):
        case 0:
            return text.encode("utf-16")
        case 1:
            return b"\xef\xbb\xbf" + text.encode()
        case 2:
            return text.encode()[: random.randrange(len(text) + 1)]
        case 3:
            return text.encode() + b"x"
        case 4:
            return text.encode().replace(b'"', b'"\xff', 1)
    return text.encode()


def mutated_text(content: bytes, random: Random) -> bytes:
    """A JSON document with one to three changes."""
    tree = json.loads(content)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        tree = mutated(tree, random)
    return text_of(tree, random)
