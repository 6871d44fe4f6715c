"""Latencies, references, thresholds and figures, each by itself."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import JOINTS, demo_policy, mixed_policy
from support.replays import made_up_tick
from support.signals import joint_signal

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.records import NS_PER_S, SignalReading
from ki_vla_ros.replay.figures import Figures
from ki_vla_ros.replay.inputs import Inbox
from ki_vla_ros.replay.latency import parse_latency
from ki_vla_ros.replay.thresholds import parse_threshold
from ki_vla_ros.robot import Axis, main_axes, other_axes
from ki_vla_ros.runtime.paths import CommandedPath, MeasuredPath
from ki_vla_ros.statistics import SegmentSums, root_mean

MS = 1_000_000


# --- latency


def test_a_fixed_latency_is_the_same_for_every_tick() -> None:
    latency = parse_latency("0.030+0.012")
    latency.begin(0, None)
    latency.computed(prefill=True)
    latency.computed(prefill=False)
    assert latency.elapsed_ns() == 42 * MS
    latency.begin(1, None)
    assert latency.elapsed_ns() == 0
    latency.computed(prefill=False)  # keys and values used again
    assert latency.elapsed_ns() == 12 * MS


def test_a_recorded_distribution_is_drawn_from_by_tick(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps({"timing": {"latency_s": [0.010, 0.020, 0.040]}}))

    def draws(seed: int) -> list[int]:
        latency = parse_latency(str(file), seed)
        taken = []
        for number in range(300):
            latency.begin(number, None)
            latency.computed(prefill=True)
            latency.computed(prefill=False)
            taken.append(latency.elapsed_ns())
        return taken

    assert draws(1) == draws(1) != draws(2)
    counts = np.unique(draws(1), return_counts=True)
    assert counts[0].tolist() == [10 * MS, 20 * MS, 40 * MS] and counts[1].min() > 60


@pytest.mark.parametrize("text", ["-0.1", "nan", "1+2+3", "61", "nowhere.json", ""])
def test_text_that_is_no_latency_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--latency"):
        parse_latency(text)


# --- reference


def test_motion_after_a_reset_is_no_reference_for_earlier_chunks() -> None:
    inbox = Inbox.__new__(Inbox)  # of all its parts only the paths
    inbox.measured = MeasuredPath([joint_signal(name, max_velocity=3.0) for name in JOINTS])
    inbox._commanded = CommandedPath(JOINTS)
    for n in range(20):
        inbox.measured.add([SignalReading(n * 10 * MS, tuple(range(7)), np.full(7, 0.0 if n < 10 else 2.0))])
    due_N = np.array([50, 90, 95, 100, 150]) * MS
    before_NJ = inbox.answer(inbox.measured, due_N, 0)
    assert np.isfinite(before_NJ[:2]).all() and np.isnan(before_NJ[2:]).all()
    assert np.isfinite(inbox.answer(inbox.measured, due_N[3:], 100 * MS)).all()


# --- thresholds

METRICS: dict[str, Any] = {
    "error": {"rms": 0.2, "missing": None, "by_step": [{"rms": 0.1}, {"rms": 0.3}], "rms_m": None},
    "sensitivity": {"probes": {"camera.wrist": {"rms": 0.01}}},
    "complete": True,
}


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("error.rms>0.1", True),
        ("error.rms > 0.2", False),
        ("error.rms>=0.2", True),
        ("error.by_step.1.rms>0.2", True),
        ("sensitivity.probes.camera.wrist.rms<0.02", True),
        ("sensitivity.probes.camera.wrist.rms<=5e-3", False),
        ("error.rms_m>1", True),  # not known: nothing was checked
    ],
)
def test_thresholds(text: str, fails: bool) -> None:
    assert (parse_threshold(text).verdict(METRICS) is not None) == fails


@pytest.mark.parametrize("text", ["error.rms", "error.rms>", ">1", "error.rms>a", "error.rms>nan", "a<b<1", "error=1"])
def test_text_that_is_no_threshold_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--fail-if"):
        parse_threshold(text)


def test_an_unknown_figure_fails_and_a_cause_that_never_occurred_counts_zero() -> None:
    assert "is not known" in str(parse_threshold("error.by_step.7.rms>1").verdict(METRICS))
    assert parse_threshold("safety.holds.never>0").verdict(METRICS) is None
    assert parse_threshold("safety.holds.never<1").verdict(METRICS) is not None


@pytest.mark.parametrize("text", ["complete>0", "error>1"])
def test_a_threshold_on_something_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--fail-if"):
        parse_threshold(text).verdict(METRICS)


# --- figures


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Errors are correlated over a second; intervals over single ticks would cover far less often."""
    covered = 0
    generator = np.random.default_rng(0)
    for trial in range(200):
        sums = SegmentSums(4.0)
        for second in range(120):
            level = generator.normal()
            for tick in range(10):
                sums.add((second * 10 + tick) * 100 * MS, np.full((1, 1), level) ** 2)
        drawn = sums.drawn(trial)
        assert drawn is not None
        _, interval = drawn.of(root_mean())
        assert interval is not None
        covered += interval[0] <= 1.0 <= interval[1]
    assert 0.85 <= covered / 200 <= 1.0


def test_few_segments_give_no_interval_and_no_values_give_no_figure() -> None:
    sums = SegmentSums(2.0)
    assert sums.drawn(0) is None
    sums.add(0, np.array([[np.nan, 4.0]]))
    drawn = sums.drawn(0)
    assert drawn is not None and drawn.of(root_mean()) == (2.0, None)
    assert drawn.of(root_mean(columns=[0])) == (None, None)


def test_known_errors_come_out_as_they_went_in() -> None:
    spec = demo_policy()
    figures = Figures(spec, "", 0.0, 0)
    for number in range(200):
        figures.add(made_up_tick(spec, number, error=0.02))
    summary = figures.summary("asynchronous", 0.1, "joint_states", None)
    half_J = (np.array(spec.action.high) - np.array(spec.action.low)) / 2.0
    growth_H = np.linspace(0.2, 1.0, spec.horizon)
    assert summary["error"]["rms_normalized"] == pytest.approx(0.02 * np.sqrt(np.mean(growth_H**2)))
    assert summary["error"]["rms"] == pytest.approx(0.02 * half_J[0] * np.sqrt(np.mean(growth_H**2)))
    assert summary["error"]["by_joint"]["gripper"]["bias"] == pytest.approx(0.02 * half_J[6] * growth_H.mean())
    assert summary["error"]["by_step"][15]["rms_normalized"] == pytest.approx(0.02)
    assert summary["error"]["max"] == pytest.approx(0.02 * half_J[0])
    assert summary["seam"]["jump_rms"] == pytest.approx(0.01) and summary["seam"]["count"] == 200
    assert summary["ticks"] == {"count": 200, "chunks": 200, "sent": 200, "refused": 0, "held": 0, "idle": 0}
    json.dumps(summary, allow_nan=False)


def test_an_axis_without_a_reference_has_no_figures_and_says_why() -> None:
    """A base that nobody measures beside an arm: the arm's figures stay what they are."""
    spec = mixed_policy()
    figures = Figures(spec, "", 0.0, 0)
    for number in range(50):
        tick = made_up_tick(spec, number, error=0.02)
        assert tick.prediction is not None
        reference_HJ = tick.prediction.reference_HJ.copy()
        reference_HJ[:, [not axis.measured for axis in spec.axes]] = np.nan
        prediction = dataclasses.replace(tick.prediction, reference_HJ=reference_HJ)
        figures.add(dataclasses.replace(tick, prediction=prediction))
    error = figures.summary("asynchronous", 0.1, "joint_states", None)["error"]
    base, shoulder = error["by_joint"]["forward"], error["by_joint"]["shoulder"]
    assert base["rms"] is base["bias"] is base["max"] is None and "nothing measures forward" in base["missing"]
    assert base["what"] == "integral of the velocity" and shoulder["what"] == error["what"] == "position"
    assert error["unit"] == "rad" and error["rms"] > 0.0 and shoulder["max"] > 0.0
    json.dumps(error, allow_nan=False)


@pytest.mark.parametrize(
    ("kinds", "main", "other"),
    [
        ({"a": ("joint", "rad"), "g": ("joint", "m")}, "a", "g"),
        ({"x": ("position", "m"), "r": ("rotation", "rad"), "g": ("gripper", "m")}, "x", "r"),
        ({"a": ("joint", "rad"), "g": ("gripper", "m"), "v": ("velocity", "m")}, "a", "g"),
        ({"a": ("joint", "rad")}, "a", ""),
    ],
)
def test_a_figure_mixes_neither_units_nor_kinds(kinds: dict[str, tuple[Any, str]], main: str, other: str) -> None:
    axes = [Axis(name, kind, unit, -1.0, 1.0, 1.0) for name, (kind, unit) in kinds.items()]
    for choose, expected in ((main_axes, main), (other_axes, other)):
        chosen, _ = choose(axes)
        assert "".join(axis.name for axis, picked in zip(axes, chosen, strict=True) if picked) == expected


def test_a_replay_without_ticks_has_a_summary() -> None:
    figures = Figures(demo_policy(), "", 2.0, 0)
    summary = figures.summary("rtc", 0.1, "joint_states", None)
    assert summary["error"]["rms"] is None and "no chunk" in summary["error"]["missing"]
    assert summary["seam"]["jump_rms"] is None and summary["inputs"]["skew_ms"] is None
    json.dumps(summary | figures.timing(), allow_nan=False)


def test_memory_does_not_grow_with_the_chunks() -> None:
    """An hour at 10 Hz keeps sums by segment, not chunks."""
    spec = demo_policy()
    figures = Figures(spec, "", 0.0, 0)
    tick = made_up_tick(spec, 0)
    tracemalloc.start()
    for number in range(3600):
        figures.add(dataclasses.replace(tick, stamp_ns=tick.stamp_ns + number * NS_PER_S))
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown / 3600 < 5000  # bytes per segment of two seconds, chunk arrays of 1.8 kB each
