"""What was used last, kept until there is too much of it."""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


_OPEN: weakref.WeakSet[Recent[Any]] = weakref.WeakSet()


def _close_all() -> None:
    for recent in list(_OPEN):
        recent.clear()


os.register_at_fork(before=_close_all)


class Recent(Generic[T]):
    """Values by key; the one that was not asked for the longest goes first, by `close`.

    `most` bounds the sum of their sizes, but the last one that was made always stays. All are closed before a process
    is forked: two must not read one open file, whose place they share, and the new one could not close a decoder whose
    threads stayed in the old one; it would wait for them for ever.
    """

    def __init__(
        self, most: int, size: Callable[[T], int] = lambda _: 1, close: Callable[[T], None] = lambda _: None
    ) -> None:
        self._most, self._size, self._close = most, size, close
        self._values: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._total = 0
        _OPEN.add(self)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._values:
            value = make()
            self._values[key] = value, self._size(value)
            self._total += self._values[key][1]
            while self._total > self._most and len(self._values) > 1:
                self.drop(next(iter(self._values)))
        self._values.move_to_end(key)
        return self._values[key][0]

    def drop(self, key: Hashable) -> None:
        """Forget it, if it is there."""
        if key in self._values:
            value, size = self._values.pop(key)
            self._total -= size
            self._close(value)

    def clear(self) -> None:
        for key in list(self._values):
            self.drop(key)
