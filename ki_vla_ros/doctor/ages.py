"""When messages come and how old they are then, against the limits by which the node holds. All durations in s."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.doctor.findings import Findings
from ki_vla_ros.doctor.inputs import InputWatch, Traffic
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.settings import Settings
from ki_vla_ros.statistics import spread

# Faults in a smaller share of the messages are ignored: the node refuses single ones itself.
RARE = 0.01
# Stamps farther from the time of arrival were not taken by this clock at all.
OTHER_CLOCK_S = 3600.0


class Limit(NamedTuple):
    """Oldest message that may be acted upon, and the parameter that says so."""

    name: str
    value_s: float

    @classmethod
    def of(cls, own: str, own_s: float, settings: Settings) -> Limit:
        """An input's own limit, or max_age_s if that is 0."""
        return cls(own, own_s) if own_s else cls("max_age_s", settings.max_age_s)


def check_period(watch: InputWatch, traffic: Traffic, limit: Limit, findings: Findings) -> None:
    """Finds a topic whose newest message is always too old shortly before the next one comes."""
    every_s = period_s(traffic.received)
    if every_s is None or every_s <= limit.value_s:
        return
    age_s = 0.0 if watch.settings.use_receive_time else _p90(_ages_s(traffic))
    needed_s = every_s + (age_s if 0.0 < age_s < OTHER_CLOCK_S else 0.0)
    findings.error(
        "max age",
        traffic.topic,
        f"a message comes every {every_s * 1e3:.1f} ms, but {limit.name} is {limit.value_s * 1e3:g} ms: until "
        "the next one comes the newest is too old, and the arm is held",
        f"raise {limit.name} to {_rounded_up(needed_s):g} or more, or the rate of this topic",
    )


def check_stamps(watch: InputWatch, traffic: Traffic, limit: Limit, findings: Findings) -> None:
    settings, limit_s = watch.settings, limit.value_s
    stamps, received = np.array(traffic.stamps, dtype=np.int64), np.array(traffic.received, dtype=np.int64)
    if len(received) > 1:
        gaps_s = np.diff(received) / NS_PER_S
        if gaps_s.max() > max(limit_s, settings.hold_after_s):
            at_s = (received[int(gaps_s.argmax())] - received[0]) / NS_PER_S
            findings.warning(
                "gap",
                traffic.topic,
                f"{(gaps_s > limit_s).sum()} gaps longer than {limit_s:g} s, the longest {gaps_s.max():.1f} s after "
                f"{at_s:.1f} s",
                "the arm is held meanwhile; check whether driver, network or recorder stalled",
            )
    if settings.use_receive_time or not len(stamps):
        return
    if (stamps == 0).mean() > RARE:
        findings.error(
            "stamps",
            traffic.topic,
            f"{(stamps == 0).sum()} of {len(stamps)} messages have no stamp",
            "let the driver stamp its messages, or set use_receive_time: true",
        )
        return
    age_s = _ages_s(traffic)
    median_s, late_s = float(np.median(age_s)), _p90(age_s)
    if abs(median_s) > OTHER_CLOCK_S:
        findings.error(
            "clock",
            traffic.topic,
            f"stamps are {-median_s:+.0f} s from the time of arrival: two clocks, one of them perhaps simulated",
            "run all nodes with the same use_sim_time (record a simulation with --use-sim-time)",
        )
        return
    if median_s < -settings.sync_slop_s:
        findings.error(
            "stamps",
            traffic.topic,
            f"stamps lie {-median_s:.3f} s in the future",
            "synchronise the clocks of the two machines (chrony, PTP)",
        )
    elif late_s > limit_s:
        findings.error(
            "stamps",
            traffic.topic,
            f"messages are {median_s:.3f} s (90th percentile {late_s:.3f} s) old when they arrive, {limit.name} is "
            f"{limit_s:g} s",
            "synchronise the clocks of the two machines (chrony, PTP); if they are, shorten the driver's queue or "
            f"raise {limit.name} to {_rounded_up(late_s + (period_s(traffic.received) or 0.0)):g} or more",
        )
    steps = np.diff(stamps)
    if len(steps) and (steps == 0).mean() > RARE:
        findings.error(
            "stamps",
            traffic.topic,
            f"{(steps == 0).sum()} of {len(stamps)} messages repeat the stamp of the one before",
            "frozen driver, or one that stamps once: restart or fix it, or set use_receive_time: true",
        )
    back_s = -steps.min() / NS_PER_S if len(steps) else 0.0
    if back_s > settings.sync_slop_s:
        findings.warning(
            "stamps",
            traffic.topic,
            f"{(steps < 0).sum()} stamps go backwards, by up to {back_s:.3f} s",
            "the driver's clock was set while it ran, or two drivers publish here",
        )


def check_skew(watch: InputWatch, findings: Findings) -> None:
    """Compares any two required cameras: each stamp of the one with fewer images with the nearest of the other."""
    optional = watch.expected.optional_cameras
    required = [(name, traffic) for name, traffic in watch.cameras.items() if not optional[name] and traffic.stamps]
    limit_s = watch.settings.sync_slop_s
    for pair in combinations(required, 2):
        (one, first), (two, second) = sorted(pair, key=lambda camera: len(camera[1].stamps))
        a, b = np.sort(np.array(first.stamps)), np.sort(np.array(second.stamps))
        after = np.clip(np.searchsorted(b, a), 1, max(1, len(b) - 1))
        distance_s = np.minimum(np.abs(a - b[after - 1]), np.abs(a - b[np.minimum(after, len(b) - 1)])) / NS_PER_S
        apart_s = _p90(distance_s)
        if limit_s < apart_s < OTHER_CLOCK_S:
            findings.error(
                "camera skew",
                f"{first.topic}, {second.topic}",
                f"stamps of {one!r} and {two!r} are {apart_s * 1e3:.1f} ms apart (90th percentile), limit "
                f"{limit_s * 1e3:g} ms (sync_slop_s)",
                f"trigger the cameras together, raise their rates, or raise sync_slop_s to {_rounded_up(apart_s):g} or "
                "more, if the task can bear it",
            )


def _ages_s(traffic: Traffic) -> NDArray[np.float64]:
    """From stamp to arrival [N]."""
    return (np.array(traffic.received, dtype=np.int64) - np.array(traffic.stamps, dtype=np.int64)) / NS_PER_S


def _p90(values_N: NDArray[np.float64]) -> float:
    return spread(values_N)["p90"]


def _rounded_up(duration_s: float) -> float:
    """To whole milliseconds, for a suggested setting."""
    return float(np.ceil(duration_s * 1e3 - 1e-6)) / 1e3


def period_s(received: object) -> float | None:
    times = np.array(received, dtype=np.int64)
    if len(times) < 10:
        return None
    return max(float(np.median(np.diff(times))) / NS_PER_S, 1e-6)


def longest_gap_s(received: object) -> float:
    """Infinite if there are fewer than two."""
    times = np.array(received, dtype=np.int64)
    return float(np.diff(times).max()) / NS_PER_S if len(times) > 1 else float("inf")
