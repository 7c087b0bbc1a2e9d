"""The text of a compiled program, as instructions that can be counted.

`compiled.as_text()` is scheduled: the order of a computation's lines is the order in which a core
starts them. Nothing of XLA reads it here, so what is not understood stays text.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2", "f8e4m3b11fnuz"), 1.0),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2.0),
    **dict.fromkeys(("s32", "u32", "f32"), 4.0),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8.0),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 0.5),
    "c128": 16.0,
}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_END = re.compile(r"\}(, execution_thread=.*)?\s*$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\(([1-9]\d*)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations?|condition|body)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_EITHER = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """space: 0 for HBM; others are inside the chip, or on the host."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def num_bytes(self) -> float:
        return math.prod(self.dims) * BYTES.get(self.dtype, 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """type: of what it results in. rest: what follows the opening parenthesis of its operands."""

    name: str
    type: str
    opcode: str
    rest: str
    is_root: bool

    @functools.cached_property
    def _end(self) -> int:
        return _closing(self.rest, 1)

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names; of a parameter or a constant, none."""
        return tuple(_NAME.findall(self.rest, 0, self._end))

    @property
    def literal(self) -> str:
        """What the parentheses hold: the value of a constant, the number of a parameter."""
        return self.rest[: self._end]

    @property
    def attributes(self) -> str:
        return self.rest[self._end + 1 :]

    def attribute(self, pattern: str) -> str | None:
        """What the first group of the pattern holds."""
        found = re.compile(pattern).search(self.rest, self._end)
        return found[1] if found else None

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Those that it results in; the parts of a tuple one after the other."""
        return tuple(_arrays(self.type))

    @property
    def called(self) -> list[str]:
        """Computations that it runs, other than the branches of a conditional."""
        return _CALLED.findall(self._called_text)

    @property
    def branches(self) -> list[str]:
        listed = _BRANCHES.search(self._called_text)
        return _NAME.findall(listed[1]) if listed else _EITHER.findall(self._called_text)

    @property
    def _called_text(self) -> str:
        """Attributes before those in which anything may be quoted."""
        ends = (self.rest.find(mark, self._end) for mark in (", metadata=", ", backend_config="))
        return self.rest[self._end : min((end for end in ends if end >= 0), default=None)]


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    name: str
    instructions: list[Instruction]

    @functools.cached_property
    def named(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        return next(one for one in reversed(self.instructions) if one.is_root)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    entry: str
    computations: dict[str, Computation]

    @classmethod
    def parse(cls, text: str) -> "Program":
        """ValueError where the text has no entry computation."""
        entry, computations = "", {}
        for name, is_entry, lines in _blocks(text):
            computations[name] = Computation(name, [*map(_instruction, lines)])
            entry = name if is_entry else entry
        if not entry:
            raise ValueError("no ENTRY computation: this is not the text of a compiled program")
        return cls(entry, computations)

    def trips(self, loop: Instruction, within: Computation) -> int | None:
        """How often the body of a `while` runs; None where that is not a constant.

        The counter is the element of the loop's tuple that the condition compares with a constant.
        """
        if known := loop.attribute(r'known_trip_count"?:\{"?n"?:"?(\d+)'):
            return int(known)
        names = (loop.attribute(rf"\b{part}=%?([\w.\-]+)") for part in ("condition", "body"))
        condition, body = (self.computations[name] for name in names if name)
        return _Loop(self, loop, within, condition, body).trips()


class _Loop:
    def __init__(self, program, loop, within, condition, body):
        self.program, self.loop, self.within = program, loop, within
        self.condition, self.body = condition, body

    def trips(self) -> int | None:
        test, place = self._test()
        if test is None:
            return None
        sides = [_through(place, name) for name in test.operands]
        indices = [_element(side) for side in sides]
        if indices[0] is None:
            return None
        bound = self._bound(place, sides[1], indices[1])
        begin, step = self._begin(indices[0]), self._step(indices[0])
        if bound is None or begin is None or not step:
            return None
        return _count(begin, bound, step, test.attribute(r"direction=(\w+)"))

    def _test(self) -> tuple[Instruction | None, Computation]:
        """The comparison, and where its operands are: XLA may have made a fusion of it."""
        root = _through(self.condition, self.condition.root.name)
        if root.opcode == "compare":
            return root, self.condition
        if root.opcode == "fusion" and root.called:
            inside = self.program.computations[root.called[0]]
            if inside.root.opcode == "compare":
                return inside.root, _inlined(inside, root, self.condition)
        return None, self.condition

    def _bound(self, place: Computation, side: Instruction, index: int | None) -> int | None:
        if index is None:
            return _constant(side)
        root = self.body.root
        if root.opcode != "tuple" or _element(_through(self.body, root.operands[index])) != index:
            return None  # it changes from turn to turn
        return self._begin(index)

    def _begin(self, index: int) -> int | None:
        """The element of the tuple that goes into the loop."""
        start = _through(self.within, self.loop.operands[0])
        if start.opcode != "tuple":
            return None
        return _constant(_through(self.within, start.operands[index]))

    def _step(self, index: int) -> int | None:
        root = self.body.root
        if root.opcode != "tuple":
            return None
        new = _through(self.body, root.operands[index])
        place = self.body
        if new.opcode == "fusion" and new.called:
            inside = self.program.computations[new.called[0]]
            new, place = inside.root, _inlined(inside, new, self.body)
        if new.opcode not in ("add", "subtract"):
            return None
        sides = [_through(place, name) for name in new.operands]
        if _element(sides[0]) != index:
            sides.reverse()
        step = _constant(sides[1]) if _element(sides[0]) == index else None
        return -step if step is not None and new.opcode == "subtract" else step


def _count(begin: int, bound: int, step: int, direction: str | None) -> int | None:
    if direction in ("LE", "GE"):
        bound, direction = (bound + 1, "LT") if direction == "LE" else (bound - 1, "GT")
    if direction == "NE":
        return (bound - begin) // step if (bound - begin) % step == 0 else None
    if (direction == "LT" and step > 0) or (direction == "GT" and step < 0):
        return max(0, -(-(bound - begin) // step))
    return None


def _inlined(inside: Computation, call: Instruction, outside: Computation) -> Computation:
    """The called computation, whose parameters are what the caller gives."""
    given = [
        dataclasses.replace(_through(outside, call.operands[int(one.literal)]), name=one.name)
        if one.opcode == "parameter"
        else one
        for one in inside.instructions
    ]
    return Computation(inside.name, given)


def _through(place: Computation, name: str) -> Instruction:
    """The instruction that a value comes from, behind copies of it."""
    found = place.named[name]
    while found.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        found = place.named[found.operands[0]]
    return found


def _element(instruction: Instruction) -> int | None:
    """Which element of the loop's tuple this is."""
    index = instruction.opcode == "get-tuple-element" and instruction.attribute(r"index=(\d+)")
    return int(index) if index else None


def _constant(instruction: Instruction) -> int | None:
    whole = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal)
    return int(instruction.literal) if whole else None


def _blocks(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """Computations: name, whether it is the entry, and a string for each instruction."""
    name, is_entry, lines = "", False, []
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            name, is_entry, lines = begins[2], bool(begins[1]), []
        elif name and _END.match(line):
            yield name, is_entry, lines
            name = ""
        elif name and _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:  # what a kernel says of itself may have lines of its own
            lines[-1] += "\n" + line


def _instruction(line: str) -> Instruction:
    begins = _INSTRUCTION.match(line)
    assert begins
    start = begins.end()
    after = _closing(line, 0, start + 1) + 1 if line[start] == "(" else line.index(" ", start)
    opens = line.index("(", after)
    opcode, rest = line[after:opens].strip(), line[opens + 1 :]
    return Instruction(begins[2], line[start:after], opcode, rest, bool(begins[1]))


def _closing(text: str, depth: int, start: int = 0) -> int:
    """Where the parenthesis closes that is open before `start`."""
    depth = depth or 1
    for mark in re.compile(r"[()]").finditer(text, start):
        depth += 1 if mark[0] == "(" else -1
        if not depth:
            return mark.start()
    raise ValueError(f"a parenthesis does not close in {text[:200]!r}")


def _arrays(text: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        yield Array(
            dtype, tuple(map(int, dims.split(","))) if dims else (), int(space[1]) if space else 0
        )
