"""What the readers of bag files share: topics, faults, and merging pieces in the order of time."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ki_vla_ros.errors import printable
from ki_vla_ros.messages import BagMessage

FaultKind = Literal["metadata", "file", "truncated", "damaged", "database", "message", "type", "clock", "count"]
# Most faults listed per kind: a million broken messages must not fill the memory with a million faults.
FAULTS_LISTED = 50
LONGEST_FAULT = 500
# Messages of several threads are recorded a little out of order; a larger step back was the recorder's clock.
CLOCK_STEP_NS = 500_000_000


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic of a bag; `count`: how many messages the file says it has, None where it does not say."""

    name: str
    type: str
    count: int | None


@dataclass(frozen=True, slots=True)
class BagFault:
    """Something that could not be read or could not be trusted: what is left out, and why."""

    kind: FaultKind
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class Faults:
    """The faults found, each once however often the bag is read.

    At most FAULTS_LISTED of each kind are kept, then one more that says so.
    """

    def __init__(self) -> None:
        self.found: list[BagFault] = []
        self._known: set[BagFault] = set()
        self._counts: dict[FaultKind, int] = {}

    def add(self, kind: FaultKind, where: str, message: str) -> None:
        # Both quote names and reasons from the file; a fault is one line, without a terminal's control characters.
        fault = BagFault(kind, *(printable(" ".join(text.split("\n")))[:LONGEST_FAULT] for text in (where, message)))
        if fault in self._known or self._counts.get(kind, 0) > FAULTS_LISTED:
            return
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if count > FAULTS_LISTED:
            fault = BagFault(kind, where, f"more faults of the kind {kind!r}, from here on they are not listed")
        self._known.add(fault)
        self.found.append(fault)


Pending = tuple[int, Callable[[], BagMessage | None]]
"""A message not read yet: its log time, and a function that reads it (None, and a fault, if that fails)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a bag (a file or a chunk): its first message is at `start_ns`, and they come in order of log time."""

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
    """The messages of all parts in the order of log time; a part is opened only when its first message is due."""
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
