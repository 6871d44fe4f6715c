"""What the readers of a bag's files share: topics, parts that are put in order of time, and what could not be read."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ki_vla_ros.messages import BagMessage

FaultKind = Literal["metadata", "file", "truncated", "damaged", "database", "message", "type", "clock", "count"]
# Listed of one kind; a million broken messages must not fill the memory with as many faults.
FAULTS_LISTED = 50
# Messages of several threads are recorded a little out of order; a larger step back was the recorder's clock.
CLOCK_STEP_NS = 500_000_000


@dataclass(frozen=True, slots=True)
class Topic:
    """`count`: messages as far as the file tells without reading them; None: it does not."""

    name: str
    type: str
    count: int | None


@dataclass(frozen=True, slots=True)
class BagFault:
    """Something that could not be read, or not be trusted: what is left out, and why."""

    kind: FaultKind
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class Faults:
    """Each fault once, however often the bag is read; at most FAULTS_LISTED of a kind and one that says so."""

    def __init__(self) -> None:
        self.found: list[BagFault] = []
        self._known: set[BagFault] = set()
        self._counts: dict[FaultKind, int] = {}

    def add(self, kind: FaultKind, where: str, message: str) -> None:
        fault = BagFault(kind, where, message)
        if fault in self._known or self._counts.get(kind, 0) > FAULTS_LISTED:
            return
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if count > FAULTS_LISTED:
            fault = BagFault(kind, where, f"more faults of the kind {kind!r}, from here on they are not listed")
        self._known.add(fault)
        self.found.append(fault)


Pending = tuple[int, Callable[[], BagMessage | None]]
"""A message that is not read yet: its log time, and what reads it (None, and a fault, if it cannot)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a bag, file or chunk, whose messages begin at `start_ns`; they come in the order of log time."""

    start_ns: int
    messages: Callable[[], Iterator[Pending]]


class Storage(Protocol):
    """One file of a bag."""

    topics: dict[str, Topic]
    start_ns: int | None
    end_ns: int | None

    def messages(self, topics: Collection[str] | None) -> Iterator[Pending]: ...

    def close(self) -> None: ...


def in_time_order(parts: Sequence[Piece]) -> Iterator[Pending]:
    """The messages of all parts by log time. A part is begun when its first message is due, not before."""
    waiting = deque(sorted(enumerate(parts), key=lambda part: (part[1].start_ns, part[0])))
    begun: list[tuple[int, int, Pending, Iterator[Pending]]] = []
    while waiting or begun:
        if waiting and (not begun or waiting[0][1].start_ns <= begun[0][0]):
            number, part = waiting.popleft()
            rest = part.messages()
        else:
            _, number, pending, rest = heapq.heappop(begun)
            yield pending
        if (following := next(rest, None)) is not None:
            heapq.heappush(begun, (following[0], number, following, rest))
