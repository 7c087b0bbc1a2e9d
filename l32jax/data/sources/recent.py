"""What was decoded last, kept while there is room: each thing is decoded once, by one thread."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any


class Recent:
    """Values by key, the ones used last, of at most so many bytes together, but at least one.

    Failures are not kept: whoever waited for it sees it, and the next one tries again.
    """

    def __init__(self, num_bytes: int):
        self._num_bytes = num_bytes
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, Future] = OrderedDict()

    def get(self, key: Hashable, decode: Callable[[], Any]) -> Any:
        """The value of the key, which has `nbytes`; `decode` makes it if it is not there."""
        with self._lock:
            value = self._values.get(key)
            if is_new := value is None:
                value = self._values[key] = Future()
            self._values.move_to_end(key)
        if is_new:
            self._fill(key, value, decode)
        return value.result()

    def _fill(self, key: Hashable, value: Future, decode: Callable[[], Any]) -> None:
        try:
            value.set_result(decode())
        except BaseException as error:  # noqa: BLE001  (those who wait have to be told)
            value.set_exception(error)
        with self._lock:
            if value.exception() is not None:
                self._values.pop(key, None)
            self._make_room()

    def _make_room(self) -> None:
        done = [key for key, value in self._values.items() if value.done()]
        used = sum(self._values[key].result().nbytes for key in done)
        for key in done[:-1]:  # the oldest first
            if used <= self._num_bytes:
                return
            used -= self._values.pop(key).result().nbytes
