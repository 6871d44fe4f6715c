"""What a replay yields, tick by tick.

`Replay.ticks()` (replay/loop.py) yields one `Tick` per tick of the loop, in order but later than the bag's clock: a
chunk is yielded only when the bag has shown what really happened until its last action was due. Nobody keeps all ticks;
the figures (replay/figures.py) and the report take what they need from each.

Legend: H horizon, J joints in the manifest's order. Positions in rad or m, as the manifest says; stamps in ns on the
node's clock, which a replay takes from the bag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle import PolicySpec
from ki_vla_ros.records import NO_REFERENCES, Motion


@dataclass(frozen=True, slots=True, eq=False)
class Seam:
    """Where one command took over from another, at `time_ns`.

    `jump_J`: from the executor's old target to its new one, before the governor. `position_step_J` and `speed_step_J`:
    steps in the commanded motion. `restarted`: the recorded arm was not where the replayed motion had it, so the new
    motion started from the arm instead.
    """

    time_ns: int
    jump_J: NDArray[np.float64]
    position_step_J: NDArray[np.float64]
    speed_step_J: NDArray[np.float64]
    restarted: bool


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """One chunk as the policy predicted it (before executor, gate and governor), and what became of it.

    `position_HJ[k]` is due at `start_ns + (k + 1) * period_ns`; `reference_HJ` is the reference at the same instants,
    NaN where the bag has none. `frame_ns` holds the stamp of each camera's frame, `joint_ns` those of the joint states
    that `measured_J` comes from: where the axes were, NaN where nobody measures them. `command_ns`: when the command
    went out in simulated time (None: refused, `refusal` says why). `corrections`: what the gate changed, in words.
    `consumed`: how many actions were in the past when the command took effect. `probe_HJ`: chunks of the same tick with
    one thing changed, by the probe's name ("noise", "instruction", "camera.<name>"); only every few seconds.
    `counted_P4`: what its rotations are counted from, one orientation per output with a pose.
    """

    index: int
    start_ns: int
    period_ns: int
    position_HJ: NDArray[np.float64]
    reference_HJ: NDArray[np.float64]
    measured_J: NDArray[np.float64]
    frame_ns: Mapping[str, int]
    joint_ns: tuple[int, ...]
    command_ns: int | None
    refusal: str | None
    corrections: tuple[str, ...]
    consumed: int
    seam: Seam | None
    probe_HJ: Mapping[str, NDArray[np.float64]]
    counted_P4: NDArray[np.float64] = field(default_factory=lambda: NO_REFERENCES)

    def due_ns(self, k: int) -> int:
        return self.start_ns + (k + 1) * self.period_ns

    @property
    def skew_ns(self) -> int:
        """Time between the oldest and the newest frame."""
        return max(self.frame_ns.values()) - min(self.frame_ns.values())


@dataclass(frozen=True, slots=True, eq=False)
class Tick:
    """One tick of the loop.

    `hold`: why the arm was held (None: it was not). `prediction`: None where no chunk was due or possible. `age_ns`:
    the age of each camera's newest frame, and of "joint state", when the tick began (None: there was none).
    `latency_ns`: simulated time from the tick's start to its end. `missed`: deadlines missed so far. `motions`: those
    sent since the previous tick, holds included. `stage_ms`: durations of the stages on this machine ("observation"
    includes reading the bag); no other field depends on them if the latency is fixed.
    """

    number: int
    stamp_ns: int
    instruction: str
    hold: str | None
    age_ns: Mapping[str, int | None]
    latency_ns: int
    missed: int
    stage_ms: Mapping[str, float]
    motions: tuple[Motion, ...]
    prediction: Prediction | None


def axis_scales(spec: PolicySpec) -> NDArray[np.float64]:
    """Half of each axis's range in training [J], to compare errors in one unit; of a pose, half of its bounds."""
    half = {
        action.name if action.kind == "twist" else action.target: (high - low) / 2.0
        for action, low, high in zip(spec.robot.actions, spec.action.low, spec.action.high, strict=True)
        if action.kind not in ("pose", "pose_delta")
    }
    return np.array([half.get(axis.name, (axis.upper - axis.lower) / 2.0) for axis in spec.axes])
