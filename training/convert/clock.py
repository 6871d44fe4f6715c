"""The stamps of a bag's messages, on the clock of its log.

Frames are made on the log's clock, the recorder's. Stamps may be of another: a driver that counts since it was started,
a robot whose clock was never set, a bag that was played and recorded again; or there are none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeVar

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.messages import BagMessage
from ki_vla_ros.records import NS_PER_S, JointReading, PoseReading, header_ns

ClockChoice = Literal["auto", "stamps", "log"]
# Stamps at most this much older than the log, or ahead of it, are of its clock; the rest is for the node's limits.
OLDEST_NS: Final = 5 * NS_PER_S
AHEAD_NS: Final = NS_PER_S // 4
# Topics whose stamps are this much alike, relative to the log, share a clock.
ALIKE_NS: Final = NS_PER_S // 4
Reading = TypeVar("Reading", JointReading, PoseReading)


@dataclass(frozen=True)
class Clock:
    """`log`: the topics whose time of arrival counts; None: of all. `shift_ns`: what is added to all other stamps.

    `said`: what must be said of it.
    """

    log: frozenset[str] | None = frozenset()
    shift_ns: int = 0
    said: tuple[str, ...] = ()

    def counts_arrival(self, topic: str) -> bool:
        return self.log is None or topic in self.log

    def stamp_ns(self, message: BagMessage, stamp_ns: int) -> int:
        """A message's stamp on the log's clock."""
        return message.log_ns if self.counts_arrival(message.topic) else stamp_ns + self.shift_ns

    def reading(self, message: BagMessage, reading: Reading) -> Reading:
        stamp_ns = self.stamp_ns(message, reading.stamp_ns)
        return reading if stamp_ns == reading.stamp_ns else replace(reading, stamp_ns=stamp_ns)

    def command(self, message: BagMessage, command: Any) -> Any:
        """A trajectory with its stamp on the log's clock, where 0 means the time of arrival; others as they are."""
        if not hasattr(command, "points") or (stamp_ns := header_ns(command)) == 0:
            return command
        stamp_ns = 0 if self.counts_arrival(message.topic) else stamp_ns + self.shift_ns
        command.header.stamp.sec, command.header.stamp.nanosec = divmod(stamp_ns, NS_PER_S)
        return command


def choose_clock(stamps: Mapping[str, Sequence[tuple[int, int]]], choice: ClockChoice, where: str) -> Clock:
    """The clock of a bag, by the first stamps and log times of its topics.

    auto: the stamps, if they are of the log's clock, or all of one other, which is then shifted; the time of arrival
    for topics whose stamps are zero, jump, or are of a clock of their own. stamps: ConfigurationError names those.
    """
    if choice == "log":
        return Clock(None)
    zero = [topic for topic, pairs in stamps.items() if pairs and not any(stamp for stamp, _ in pairs)]
    behind = {
        topic: min(log - stamp for stamp, log in pairs if stamp)
        for topic, pairs in stamps.items()
        if topic not in zero and pairs
    }
    jumping = [topic for topic in behind if _jumps([log - stamp for stamp, log in stamps[topic] if stamp])]
    behind = {topic: ns for topic, ns in behind.items() if topic not in jumping}
    other = [topic for topic, ns in behind.items() if not -AHEAD_NS <= ns <= OLDEST_NS]
    shift_ns, said = 0, []
    if other and len(other) == len(behind) and max(behind.values()) - min(behind.values()) <= ALIKE_NS:
        shift_ns = min(behind.values())
        said.append(f"stamps are of another clock, {_apart(shift_ns)}, which is added to them")
        other = []
    faults = [f"{topic}: stamps are zero" for topic in zero]
    faults += [f"{topic}: stamps jump, as of a clock that was set" for topic in jumping]
    faults += [f"{topic}: stamps are of a clock of its own, {_apart(behind[topic])}" for topic in other]
    if faults and choice == "stamps":
        raise ConfigurationError(
            f"{where}: expected stamps of one clock for --clock stamps, got {'; '.join(faults)}; take --clock auto, "
            "with the time of arrival for these topics, or --clock log, with it for all"
        )
    return Clock(
        frozenset((*zero, *jumping, *other)),
        shift_ns,
        (*said, *(f"{fault}: times of arrival count" for fault in faults)),
    )


def _jumps(behind: Sequence[int]) -> bool:
    """Whether the clock was set in between; one stray message is none."""
    most = sorted(behind)[1:-1]
    return len(most) > 1 and most[-1] - most[0] > OLDEST_NS


def _apart(behind_ns: int) -> str:
    return f"{abs(behind_ns) / NS_PER_S:.3f} s {'behind' if behind_ns > 0 else 'ahead of'} the log's"
