"""Made-up results of a replay, so that the report can be tested on any, however odd."""

from __future__ import annotations

from typing import Any

import numpy as np

from ki_vla_ros.bundle.manifest import PolicySpec
from ki_vla_ros.records import NS_PER_S, CameraFrame, Observation
from ki_vla_ros.replay.ticks import Prediction, Seam, Tick, axis_scales
from ki_vla_ros.replay.trace import Trace
from ki_vla_ros.settings.names import parameter_specs
from support.bundles import CAMERAS, JOINTS

START_NS = 1_700_000_000 * NS_PER_S
PERIOD_NS = NS_PER_S // 10


def made_up_tick(spec: PolicySpec, number: int, error: float = 0.01, hold: str | None = None) -> Tick:
    """Tick `number` of an arm that swings; each joint is predicted `error` times its action's range too high."""
    stamp_ns = START_NS + number * PERIOD_NS
    action_ns = round(spec.action_period_s * NS_PER_S)
    phase_J = np.arange(len(spec.axes))
    range_J = axis_scales(spec)

    def position(time_s: np.ndarray | float) -> np.ndarray:
        return 0.4 * np.sin(0.9 * np.asarray(time_s)[..., None] + phase_J)

    start_ns = stamp_ns - 20_000_000
    due_H = (start_ns - START_NS + (np.arange(spec.horizon) + 1) * action_ns) / NS_PER_S
    reference_HJ = position(due_H)
    growth_H = np.linspace(0.2, 1.0, spec.horizon)
    seam = Seam(stamp_ns + 30_000_000, np.full(len(spec.axes), 0.01), *np.zeros((2, len(spec.axes))), False)
    prediction = Prediction(
        index=number,
        start_ns=start_ns,
        period_ns=action_ns,
        position_HJ=reference_HJ + error * growth_H[:, None] * range_J,
        reference_HJ=reference_HJ,
        measured_J=position((start_ns - START_NS) / NS_PER_S),
        frame_ns={camera: start_ns for camera in CAMERAS},
        joint_ns=(start_ns,),
        command_ns=stamp_ns + 12_000_000,
        refusal=None,
        corrections=(),
        consumed=1,
        seam=seam,
        probe_HJ={},
    )
    return Tick(
        number=number,
        stamp_ns=stamp_ns,
        instruction="touch the red cube",
        hold=hold,
        age_ns={**{camera: 20_000_000 + 1_000_000 * (number % 7) for camera in CAMERAS}, "joint state": 4_000_000},
        latency_ns=12_000_000,
        missed=0,
        stage_ms={"prefill": 4.0},
        motions=(),
        prediction=None if hold else prediction,
    )


def made_up_trace(spec: PolicySpec, ticks: int = 300, worst: int = 120) -> Trace:
    """Tick number `worst` is ten times as far off as the others, and every 50th is held."""
    trace = Trace(spec)
    for number in range(ticks):
        tick = made_up_tick(
            spec, number, 0.5 if number == worst else 0.05, "camera 'wrist': too old" if number % 50 == 40 else None
        )
        frames = {c: CameraFrame(c, tick.stamp_ns - 20_000_000, _picture(number)) for c in CAMERAS}
        trace.see(Observation(tick.stamp_ns - 20_000_000, frames, np.zeros(len(JOINTS))))
        trace.add(tick)
    return trace


def made_up_metrics(spec: PolicySpec) -> dict[str, Any]:
    """Metrics as docs/replay.md describes them, with figures that belong to no trace."""
    steps = [
        {"step": k + 1, "time_s": 0.05 * (k + 1), "rms": 0.01 * (k + 1), "rms_ci": [0.009 * (k + 1), 0.011 * (k + 1)]}
        for k in range(spec.horizon)
    ]
    joints = {
        joint.name: {
            "unit": joint.unit,
            "what": "position",
            "rms": 0.08,
            "rms_ci": [0.07, 0.09],
            "bias": -0.01,
            "max": 0.31,
        }
        for joint in spec.axes
    }
    names = [camera.name for camera in spec.cameras]
    settings = {s.name: s.default for s in parameter_specs(names, spec.axis_names)} | {"executor": "rtc"}
    spread = {"p50": 24.0, "p90": 26.0, "p99": 31.5, "max": 44.0}
    return {
        "schema": 1,
        "complete": True,
        "stopped": None,
        "bag": {
            "name": "kitchen.mcap",
            "start_ns": START_NS,
            "end_ns": START_NS + 30 * NS_PER_S,
            "duration_s": 30.0,
            "topics": {"camera wrist": "/camera/wrist/image_raw", "joint states": "/joint_states"},
            "messages": {"/joint_states": 3000},
            "faults": [],
            "notes": [],
        },
        "bundle": {"name": spec.name, "manifest_sha256": "ab" * 32},
        "settings": settings,
        "replay": {"ticks": "paced", "latency": "12 ms, fixed", "seed": 0, "segment_s": 2.0},
        "ticks": {"count": 300, "chunks": 294, "sent": 294, "refused": 0, "held": 6, "idle": 0},
        "error": {
            "reference": "joint_states",
            "missing": None,
            "chunks": 280,
            "segments": 15,
            "rms": 0.0812,
            "rms_ci": [0.0751, 0.0903],
            "max": 0.31,
            "unit": "rad",
            "what": "position",
            "rms_m": None,
            "rms_m_ci": None,
            "rms_normalized": 0.2,
            "rms_normalized_ci": [0.18, 0.22],
            "by_joint": joints,
            "by_step": steps,
            "by_joint_step": {joint.name: [0.01 * (k + 1) for k in range(spec.horizon)] for joint in spec.axes},
        },
        "seam": {"executor": "rtc", "count": 290, "restarts": 0, "jump_rms": 0.004, "jump_rms_ci": [0.003, 0.005]},
        "safety": {"holds": {"camera 'wrist'": 6}, "refusals": {}, "corrections": {}, "stopped": None},
        "inputs": {
            "age_ms": {**dict.fromkeys(names, spread), "joint state": spread},
            "skew_ms": spread,
            "observation_to_command_ms": spread,
        },
        "deadlines": {"period_ms": 100.0, "missed": 0, "share": 0.0, "latency_ms": spread},
        "sensitivity": {
            "every_s": 2.0,
            "chunks": 15,
            "probes": {
                "camera.wrist": {
                    "what": "without this camera",
                    "rms": 0.2,
                    "rms_ci": [0.1, 0.3],
                    "ratio": 8.1,
                    "ratio_ci": [5.0, 11.0],
                }
            },
        },
        "realtime_factor": 31.4,
        "timing": {"wall_s": 0.96, "stage_ms": {}},
        "fingerprint": "cd" * 32,
    }


def _picture(number: int) -> np.ndarray:
    picture = np.zeros((96, 128, 3), dtype=np.uint8)
    picture[:, : 1 + number % 128] = (200, 80, 40)
    return picture
