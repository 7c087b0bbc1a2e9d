"""Foreign metadata, taken apart key by key: whatever nobody asked for is refused."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from l32jax.config_text import short
from l32jax.errors import InputError

# Far above the family's; they bound what a damaged file can cost.
MAX_SIZE, MAX_LAYERS = 2**24, 1024
MAX_JSON_BYTES = 100_000_000


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. InputError for anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: more than {MAX_JSON_BYTES} bytes are not read as JSON")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; is it the right directory?") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; download it again")
    return content


class Fields:
    """A JSON object that is taken apart by name; `close` refuses what nobody took."""

    def __init__(self, values: Any, where: str, harmless: Collection[str] = ()):
        if not isinstance(values, dict):
            raise InputError(f"{where}: expected a JSON object, not {short(values)}")
        self.values, self.where, self.taken = values, where, set(harmless)

    def get(self, name: str) -> Any:
        self.taken.add(name)
        return self.values.get(name)

    def size(self, name: str, default: int | None = None, at_most: int = MAX_SIZE) -> int:
        value: Any = self.get(name)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= at_most:
            self.refuse(name, f"an integer between 1 and {at_most}")
        return value

    def number(self, name: str) -> float:
        value = self.get(name)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            self.refuse(name, "a positive number")
        return float(value)

    def square(self, name: str) -> int:
        """A size that may be given as [size, size]."""
        value = self.values.get(name)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            self.values[name] = value[0]
        return self.size(name)

    def indices(self, name: str) -> tuple[int, ...]:
        value = self.get(name)
        if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
            self.refuse(name, "a list of layer numbers")
        return tuple(value)

    def only(self, name: str, *allowed: Any) -> None:
        """The key may be absent; the model code knows no other values."""
        if self.get(name) not in (*allowed, None):
            self.refuse(name, " or ".join(map(repr, allowed)))

    def close(self) -> None:
        if unknown := self.values.keys() - self.taken:
            name = min(unknown)
            raise InputError(
                f"{short(name)} in {self.where}: this key (value {short(self.values[name])}) is "
                "unknown here, and may change what the model computes; remove it if it does not"
            )

    def refuse(self, name: str, expected: str) -> NoReturn:
        value = short(self.values[name]) if name in self.values else "absent"
        raise InputError(f"{short(name)} in {self.where}: it is {value}, expected {expected}")
