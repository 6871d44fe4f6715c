"""Which time counts, by the first stamps of a bag's topics."""

from __future__ import annotations

import pytest

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.records import NS_PER_S
from training.convert.clock import Clock, choose_clock

LOG_NS = 1_790_000_000 * NS_PER_S
MS = 1_000_000


def pairs(behind_ns: int, late_ms: int = 3) -> list[tuple[int, int]]:
    """Stamps and log times at 50 Hz, of a clock that is `behind_ns` behind the log's."""
    return [(LOG_NS + k * 20 * MS - behind_ns, LOG_NS + (k * 20 + late_ms + k % 3) * MS) for k in range(20)]


ZERO = [(0, log_ns) for _, log_ns in pairs(0)]


def test_stamps_of_the_logs_clock_count_as_they_are() -> None:
    """Some are late, and one driver stamps a little ahead."""
    stamps = {"/camera": pairs(0, 900), "/joints": pairs(-100 * MS), "/none": []}
    for choice in ("auto", "stamps"):
        assert choose_clock(stamps, choice, "bag") == Clock()  # type: ignore[arg-type]


def test_stamps_of_one_other_clock_are_moved_by_as_much() -> None:
    clock = choose_clock({"/camera": pairs(10**15, 40), "/joints": pairs(10**15)}, "auto", "bag")
    assert (clock.log, clock.shift_ns) == (frozenset(), 10**15 + 3 * MS)
    assert clock.said == ("stamps are of another clock, 1000000.003 s behind the log's, which is added to them",)
    ahead = choose_clock({"/camera": pairs(-3600 * NS_PER_S)}, "stamps", "bag")
    assert ahead.shift_ns == -3600 * NS_PER_S + 3 * MS and "3599.997 s ahead of the log's" in ahead.said[0]


def test_topics_without_a_clock_or_with_one_of_their_own_count_by_arrival() -> None:
    stamps = {"/camera": pairs(0), "/depth": pairs(77 * NS_PER_S), "/joints": ZERO}
    clock = choose_clock(stamps, "auto", "bag")
    assert (clock.log, clock.shift_ns) == ({"/depth", "/joints"}, 0)
    assert clock.said == (
        "/joints: stamps are zero: times of arrival count",
        "/depth: stamps are of a clock of its own, 77.003 s behind the log's: times of arrival count",
    )
    with pytest.raises(ConfigurationError, match=r"got /joints: stamps are zero; /depth: stamps are of a clock of its"):
        choose_clock(stamps, "stamps", "bag")
    assert choose_clock(stamps, "log", "bag").counts_arrival("/camera")


def test_a_clock_that_is_set_meanwhile_says_no_times() -> None:
    """As when the network's time comes: what was stamped before belongs to the recording as well."""
    for later_ns in (-3600 * NS_PER_S, 3600 * NS_PER_S):
        stamps = {"/joints": [*pairs(0)[:8], *pairs(later_ns)[8:]], "/camera": [*pairs(0)[:12], *pairs(later_ns)[12:]]}
        clock = choose_clock(stamps, "auto", "bag")
        assert clock.log == {"/joints", "/camera"} and clock.shift_ns == 0
        assert clock.said[0] == "/joints: stamps jump, as of a clock that was set: times of arrival count"
        with pytest.raises(ConfigurationError, match="got /joints: stamps jump"):
            choose_clock(stamps, "stamps", "bag")
    assert choose_clock({"/joints": [(LOG_NS - 10**13, LOG_NS), *pairs(0)]}, "auto", "bag") == Clock()


def test_one_stray_message_makes_no_other_clock() -> None:
    assert choose_clock({"/joints": [(0, 0), *pairs(0)]}, "auto", "bag") == Clock()
