"""The figures of a replay, computed from its ticks: the content of metrics.json, described in docs/replay.md.

Only sums per segment of time and a few numbers per tick are kept, so a bag may be of any length.
Legend: H horizon, J joints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle import PolicySpec
from ki_vla_ros.errors import cause_of
from ki_vla_ros.records import NS_PER_S, Motion
from ki_vla_ros.replay.ticks import Prediction, Tick, axis_scales
from ki_vla_ros.robot import Axis, main_axes, other_axes
from ki_vla_ros.statistics import Draws, SegmentSums, interval_95, root_mean, spread

Array = NDArray[np.float64]

# Sampling period of the commanded motion for its jerk; `training.evaluate` uses the same.
JERK_PERIOD_NS = 10_000_000
# At most this many of a long bag's latencies are written to metrics.json, evenly spaced.
LATENCIES_KEPT = 1000
SHORTEST_SEGMENT_S = 2.0


class Figures:
    """Sums up ticks: `add` each one; `summary` may be called at any time."""

    def __init__(self, manifest: PolicySpec, other_instruction: str, probe_every_s: float, seed: int) -> None:
        self._manifest, self._seed = manifest, seed
        self._other_instruction, self._probe_every_s = other_instruction, probe_every_s
        # Longer than a chunk, so that neighbouring segments share few actions and are nearly independent.
        self.segment_s = max(SHORTEST_SEGMENT_S, 2.0 * manifest.horizon * manifest.action_period_s)
        self._squares, self._sums = SegmentSums(self.segment_s), SegmentSums(self.segment_s)
        self._largest_J = np.zeros(len(manifest.axes))
        self._jumps = SegmentSums(self.segment_s)
        self._probes: dict[str, SegmentSums] = {}
        self._counts: Counter[str] = Counter()
        self._holds: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._corrections: Counter[str] = Counter()
        self._age_ms: dict[str, list[float]] = {}
        self._stage_ms: dict[str, list[float]] = {}
        self._skew_ms: list[float] = []
        self._command_age_ms: list[float] = []
        self._latency_ms: list[float] = []
        self._jump_max = self._position_step = self._speed_step = 0.0
        self._missed = 0
        main_J, self._unit = main_axes(manifest.axes)
        other_J, self._other_unit = other_axes(manifest.axes)
        self._main, self._other = np.flatnonzero(main_J), np.flatnonzero(other_J)
        self._jerk = Jerk(self._main)

    @property
    def ticks(self) -> int:
        return self._counts["count"]

    def add(self, tick: Tick) -> None:
        self._counts["count"] += 1
        self._missed = tick.missed
        for name, age_ns in tick.age_ns.items():
            if age_ns is not None:
                self._age_ms.setdefault(name, []).append(age_ns / 1e6)
        for stage, took_ms in tick.stage_ms.items():
            self._stage_ms.setdefault(stage, []).append(took_ms)
        for motion in tick.motions:
            self._jerk.add(motion)
        if tick.hold is not None:
            self._counts["held"] += 1
            self._holds[cause_of(tick.hold)] += 1
        if tick.prediction is None:
            self._counts["idle"] += tick.hold is None
            return
        self._counts["chunks"] += 1
        self._latency_ms.append(tick.latency_ns / 1e6)
        self._add_prediction(tick.stamp_ns, tick.prediction)

    def _add_prediction(self, stamp_ns: int, chunk: Prediction) -> None:
        error_HJ = chunk.position_HJ - chunk.reference_HJ
        if np.isfinite(error_HJ).any():
            self._counts["compared"] += 1
            self._squares.add(stamp_ns, error_HJ**2)
            self._sums.add(stamp_ns, error_HJ)
            self._largest_J = np.fmax(self._largest_J, np.nanmax(np.abs(np.nan_to_num(error_HJ)), axis=0))
        self._skew_ms.append(chunk.skew_ns / 1e6)
        if chunk.command_ns is None:
            self._counts["refused"] += 1
            self._refusals[cause_of(chunk.refusal or "")] += 1
        else:
            self._counts["sent"] += 1
            self._command_age_ms.append((chunk.command_ns - min(chunk.frame_ns.values())) / 1e6)
        for correction in chunk.corrections:
            verb, _, joints = correction.partition(" ")
            self._corrections.update(f"{verb} {joint}" for joint in joints.split(", "))
        if (seam := chunk.seam) is not None:
            self._counts["seams"] += 1
            self._counts["restarts"] += seam.restarted
            self._jumps.add(seam.time_ns, seam.jump_J[None] ** 2)
            self._jump_max = max(self._jump_max, float(seam.jump_J[self._main].max()))
            if not seam.restarted:
                self._position_step = max(self._position_step, float(seam.position_step_J[self._main].max()))
                self._speed_step = max(self._speed_step, float(seam.speed_step_J[self._main].max()))
        for name, other_HJ in chunk.probe_HJ.items():
            self._counts["probed"] += name == "noise"
            sums = self._probes.setdefault(name, SegmentSums(self.segment_s))
            sums.add(stamp_ns, (other_HJ - chunk.position_HJ) ** 2)

    def summary(self, executor: str, period_s: float, reference: str | None, missing: str | None) -> dict[str, Any]:
        """The parts of metrics.json that come from ticks."""
        names = ("count", "chunks", "sent", "refused", "held", "idle")
        return {
            "ticks": {name: self._counts[name] for name in names},
            "error": self._error(reference, missing),
            "seam": self._seam(executor),
            "safety": {
                "holds": _sorted(self._holds),
                "refusals": _sorted(self._refusals),
                "corrections": _sorted(self._corrections),
            },
            "inputs": {
                "age_ms": {name: _spread(ages) for name, ages in self._age_ms.items()},
                "skew_ms": _spread(self._skew_ms),
                "observation_to_command_ms": _spread(self._command_age_ms),
            },
            "deadlines": {
                "period_ms": period_s * 1e3,
                "missed": self._missed,
                "share": self._missed / max(self._counts["count"] + self._missed, 1),
                "latency_ms": _spread(self._latency_ms),
            },
            "sensitivity": self._sensitivity(),
        }

    def timing(self) -> dict[str, Any]:
        """Durations on this machine, which differ from run to run."""
        totals = self._stage_ms.get("total", [])
        return {
            "stage_ms": {stage: _spread(took) for stage, took in self._stage_ms.items()},
            "latency_s": [round(took / 1e3, 6) for took in totals[:: max(1, -(-len(totals) // LATENCIES_KEPT))]],
        }

    def _error(self, reference: str | None, missing: str | None) -> dict[str, Any]:
        drawn = self._squares.drawn(self._seed)
        if drawn is None and missing is None:
            missing = "reference: no chunk has one; does the bag continue after the chunks, without gaps?"
        figures: dict[str, Any] = {
            "reference": reference,
            "missing": missing if drawn is None else None,
            "chunks": self._counts["compared"],
            "segments": len(self._squares),
            "unit": self._unit,
            "what": what_is_compared(self._manifest.axes[int(self._main[0])]),
        }
        if drawn is None:
            return {**figures, **dict.fromkeys(("rms", "rms_ci", "max", "rms_normalized", "rms_normalized_ci"))}
        steps, joints = range(self._manifest.horizon), self._manifest.axes
        half_J = axis_scales(self._manifest)
        figures |= _with_interval("rms", drawn, columns=self._main)
        known_J = drawn.count.sum(axis=0) > 0.0
        figures["max"] = float(self._largest_J[self._main].max()) if known_J[self._main].any() else None
        if not known_J[self._main].any():
            figures["missing"] = f"reference: {_untold([joints[j] for j in self._main], reference)}"
        if len(self._other):
            figures |= _with_interval(f"rms_{self._other_unit}", drawn, columns=self._other)
        figures |= _with_interval("rms_normalized", drawn, weight_J=half_J**-2.0)
        biased = self._sums.drawn(self._seed)
        assert biased is not None
        by_joint = {}
        for j, joint in enumerate(joints):
            found = {"unit": joint.unit, "what": what_is_compared(joint), **_with_interval("rms", drawn, columns=[j])}
            if known_J[j]:
                bias = biased.total[:, j].sum() / biased.count[:, j].sum()
                found |= {"bias": float(bias), "max": float(self._largest_J[j])}
            else:
                found |= {"bias": None, "max": None, "missing": _untold([joint], reference)}
            by_joint[joint.name] = found
        figures["by_joint"] = by_joint
        period_s = self._manifest.action_period_s
        figures["by_step"] = [
            {
                "step": k + 1,
                "time_s": round((k + 1) * period_s, 6),
                **_with_interval("rms", drawn, rows=[k], columns=self._main),
                "rms_normalized": drawn.of(root_mean([k], slice(None), half_J**-2.0))[0],
            }
            for k in steps
        ]
        with np.errstate(invalid="ignore"):
            table_HJ = np.sqrt(drawn.total / drawn.count)
        figures["by_joint_step"] = {joint.name: _listed(table_HJ[:, j]) for j, joint in enumerate(joints)}
        return figures

    def _seam(self, executor: str) -> dict[str, Any]:
        drawn, count = self._jumps.drawn(self._seed), self._counts["seams"]
        jump = {"jump_rms": None, "jump_rms_ci": None}
        if drawn is not None:
            jump = _with_interval("jump_rms", drawn, columns=self._main)
        return {
            "executor": executor,
            "count": count,
            "restarts": self._counts["restarts"],
            **jump,
            "jump_max": self._jump_max if count else None,
            "position_step_max": self._position_step if count else None,
            "speed_step_max": self._speed_step if count else None,
            "jerk_rms": self._jerk.rms,
            "jerk_max": self._jerk.largest,
        }

    def _sensitivity(self) -> dict[str, Any]:
        descriptions = {
            "noise": "another noise, everything else the same: the policy's own spread",
            "instruction": f"told {self._other_instruction!r} instead",
        }
        noise = self._probes["noise"].drawn(self._seed) if "noise" in self._probes else None
        probes = {}
        for name, sums in self._probes.items():
            drawn = sums.drawn(self._seed)
            if drawn is None or noise is None:
                continue
            by_joint = {joint.name: drawn.of(root_mean(columns=[j]))[0] for j, joint in enumerate(self._manifest.axes)}
            what = descriptions.get(name, f"without the camera {name.removeprefix('camera.')!r}")
            rms = _with_interval("rms", drawn, columns=self._main)
            probes[name] = {"what": what, **rms, **_ratio(drawn, noise, self._main), "by_joint": by_joint}
        return {"every_s": self._probe_every_s, "chunks": self._counts["probed"], "probes": probes}


class Jerk:
    """Jerk of the commanded motion, across its handovers, from its velocity sampled at 100 Hz."""

    def __init__(self, columns: NDArray[np.intp]) -> None:
        self._columns = columns
        self._motion: Motion | None = None
        self._speeds: list[Array] = []
        self._next_ns = 0
        self._squares, self._count = 0.0, 0
        self.largest: float | None = None

    @property
    def rms(self) -> float | None:
        return float(np.sqrt(self._squares / self._count)) if self._count else None

    def add(self, motion: Motion) -> None:
        old, self._motion = self._motion, motion
        if old is not None:
            until_ns = min(motion.from_ns, old.end_ns)
            if motion.from_ns > old.end_ns:  # it had come to rest: the next motion starts afresh
                until_ns = old.end_ns
            for at_ns in range(self._next_ns, until_ns, JERK_PERIOD_NS):
                self._speeds.append(old.at(at_ns)[1][self._columns])
                self._next_ns = at_ns + JERK_PERIOD_NS
            if len(self._speeds) >= 3:
                jerk = np.diff(np.array(self._speeds), n=2, axis=0) / (JERK_PERIOD_NS / NS_PER_S) ** 2
                self._squares += float(np.square(jerk).sum())
                self._count += jerk.size
                self.largest = max(self.largest or 0.0, float(np.abs(jerk).max()))
                self._speeds = self._speeds[-2:]
        if old is None or motion.from_ns > old.end_ns:
            self._speeds, self._next_ns = [], motion.from_ns


def what_is_compared(axis: Axis) -> str:
    """Of which quantity an axis's errors are; of a velocity they are in rad or m, not per second."""
    return "integral of the velocity" if axis.kind == "velocity" else "position"


def _untold(axes: Sequence[Axis], reference: str | None) -> str:
    names = ", ".join(axis.name for axis in axes)
    if reference == "joint_states" and not any(axis.measured for axis in axes):
        return f"nothing measures {names}: no action of it has a `source` in the robot file"
    return f"the bag says nothing of {names} when the actions were due"


def _with_interval(name: str, drawn: Draws, **selection: Any) -> dict[str, Any]:
    value, interval = drawn.of(root_mean(**selection))
    return {name: value, f"{name}_ci": interval}


def _ratio(drawn: Draws, noise: Draws, columns: NDArray[np.intp]) -> dict[str, Any]:
    """The change relative to that under another noise; both were probed at the same ticks, so segments are paired."""
    figure = root_mean(columns=columns)
    one, other = figure(drawn.total, drawn.count), figure(noise.total, noise.count)
    if not other > 0.0:
        return {"ratio": None, "ratio_ci": None}
    interval = None
    if drawn.drawn is not None and noise.drawn is not None:
        interval = interval_95(figure(*drawn.drawn) / figure(*noise.drawn))
    return {"ratio": float(one / other), "ratio_ci": interval}


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    return spread(values) if values else None


def _listed(values: Iterable[float]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
