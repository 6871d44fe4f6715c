"""What a bag says about the live run: the node's ticks, when it was active, and the chunks it published."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError
from ki_vla_ros.files import parse_json
from ki_vla_ros.records import NS_PER_S, to_ns

# The node counts as inactive where its ticks are farther apart than the longer of these two.
INACTIVE_NS, INACTIVE_PERIODS = 500_000_000, 3
# No chunk takes longer; what says so is no tick of a node.
LONGEST_NS = 60 * NS_PER_S


@dataclass(frozen=True)
class RecordedTick:
    """What the live node published about a tick: enough to repeat it from the bag."""

    stamp_ns: int
    chunk_index: int | None
    frame_ns: Mapping[str, int]
    joint_ns: tuple[int, ...]
    joined_ns: int | None
    instruction: str
    hold: str | None

    @property
    def took_ns(self) -> int | None:
        """From the tick's start until its chunk was ready to be sent; None: it has no chunk, or an old node's."""
        return None if self.joined_ns is None else self.joined_ns - self.stamp_ns

    def spans(self, parts: int) -> Sequence[tuple[int, ...]] | None:
        """`joint_ns` for each of so many parts of the joint states: one stamp, or the two around the images.

        None if there were not so many parts.
        """
        if parts == 1:
            return [self.joint_ns] if len(self.joint_ns) in (1, 2) else None
        if len(self.joint_ns) == parts:  # the newest readings
            return [(stamp,) for stamp in self.joint_ns]
        images_ns = min(self.frame_ns.values(), default=self.stamp_ns)
        spans: list[tuple[int, ...]] = []
        for stamp in self.joint_ns:
            if stamp > images_ns and spans and len(spans[-1]) == 1 and spans[-1][0] < images_ns:
                spans[-1] = (spans[-1][0], stamp)
            else:
                spans.append((stamp,))
        return spans if len(spans) == parts else None


def read_tick(text: str) -> RecordedTick:
    """The tick in a text from ~/tick; InputError if it is none. An old node's ticks may name no frames or joints."""
    try:
        fields = parse_json(text)
        index = fields["chunk_index"]
        tick = RecordedTick(
            stamp_ns=int(fields["stamp_ns"]),
            chunk_index=None if index is None else int(index),
            frame_ns={str(name): int(stamp) for name, stamp in (fields.get("frame_ns") or {}).items()},
            joint_ns=tuple(int(stamp) for stamp in fields.get("joint_ns") or ()),
            joined_ns=int(fields["joined_ns"]) if fields.get("joined_ns") else None,
            instruction=str(fields["instruction"]),
            hold=None if fields["hold"] is None else str(fields["hold"]),
        )
        if tick.took_ns is not None and not 0 <= tick.took_ns <= LONGEST_NS:
            raise ValueError(f"a chunk that took {tick.took_ns / NS_PER_S:g} s")
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"tick: expected what the node writes there, got {text[:60]!r}: {error}") from error
    return tick


class Activity:
    """The spans in which the node was active, from a first tick to a last one, as far as ticks have been read."""

    def __init__(self, rate_hz: float) -> None:
        self.gap_ns = max(INACTIVE_NS, to_ns(INACTIVE_PERIODS / rate_hz))
        self._spans: list[list[int]] = []
        self._begun = 0

    def add(self, stamp_ns: int) -> None:
        if self._spans and stamp_ns - self._spans[-1][1] <= self.gap_ns:
            self._spans[-1][1] = max(self._spans[-1][1], stamp_ns)
        else:
            self._spans.append([stamp_ns, stamp_ns])

    def begin_next(self) -> int | None:
        """Makes the next span the present one and returns its start; None: no next span is known yet."""
        if self._begun == len(self._spans):
            return None
        self._begun += 1
        return self._spans[self._begun - 1][0]

    @property
    def end_ns(self) -> int:
        """The end of the present span, as far as is known."""
        return self._spans[self._begun - 1][1]

    def end_of(self, stamp_ns: int) -> int:
        """The end of the span that a tick belongs to."""
        return next((end for start, end in reversed(self._spans) if start <= stamp_ns), stamp_ns)


class Parity:
    """How far the repeated chunks are from those that the node published, matched by stamp and order."""

    def __init__(self) -> None:
        self._published: dict[int, deque[NDArray[np.float64]]] = {}
        self._made: dict[int, deque[NDArray[np.float64]]] = {}
        self._count, self._largest = 0, 0.0

    def add_published(self, start_ns: int, position_HJ: NDArray[np.float64]) -> None:
        self._match(self._published, self._made, start_ns, position_HJ)

    def add_made(self, start_ns: int, position_HJ: NDArray[np.float64]) -> None:
        self._match(self._made, self._published, start_ns, position_HJ)

    def summary(self) -> dict[str, float | int | None]:
        """Figures for metrics.json; `unmatched`: repeated chunks without a published one in the bag, and vice versa."""
        left = sum(len(chunks) for table in (self._published, self._made) for chunks in table.values())
        return {"chunks": self._count, "max_difference": self._largest if self._count else None, "unmatched": left}

    def _match(
        self, own: dict[int, Any], other: dict[int, Any], start_ns: int, position_HJ: NDArray[np.float64]
    ) -> None:
        waiting = other.get(start_ns)
        if not waiting:
            own.setdefault(start_ns, deque()).append(position_HJ)
            return
        other_HJ = waiting.popleft()
        if not waiting:
            del other[start_ns]
        same = other_HJ.shape == position_HJ.shape
        self._count += 1
        self._largest = max(self._largest, float(np.abs(other_HJ - position_HJ).max()) if same else float("inf"))
