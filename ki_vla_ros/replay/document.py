"""metrics.json: the figures of a replay, with the bag, bundle and settings they belong to; see docs/replay.md."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from ki_vla_ros.bags import Bag
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.replay.figures import Figures
from ki_vla_ros.replay.loop import Replay
from ki_vla_ros.replay.setup import Setup

METRICS = "metrics.json"
SCHEMA = 1
CAUSES_LISTED = 20
JUMPS = "the arm was put elsewhere {} times (faster than its joints can move): no action is compared across that"


def make_metrics(
    bag: Bag, chosen: Setup, replay: Replay, figures: Figures, wall_s: float, stopped: str | None
) -> dict[str, Any]:
    """The content of metrics.json; `stopped`: why the replay ended before the bag (None: it did not)."""
    topics, options = chosen.topics, replay.options
    duration_s = (replay.now_ns - replay.start_ns) / NS_PER_S
    ticks = figures.summary(
        chosen.settings.executor, 1.0 / chosen.settings.rate_hz, chosen.reference, topics.missing_reference
    )
    ticks["safety"] |= {"messages_refused": dict(sorted(replay.refused.items())), "stopped": replay.stopped}
    metrics: dict[str, Any] = {
        "schema": SCHEMA,
        "complete": stopped is None,
        "stopped": stopped,
        "bag": {
            "name": bag.path.resolve().name,
            "start_ns": replay.start_ns,
            "end_ns": replay.now_ns,
            "duration_s": duration_s,
            "topics": {
                **{f"camera {name}": topic for name, topic in topics.cameras.items()},
                "joint_states": topics.joint_states,
                "instruction": topics.instruction,
                "command": topics.command,
                "tick": topics.tick,
                "session": topics.session,
            },
            "messages": dict(sorted(replay.messages.items())),
            "faults": [dataclasses.asdict(fault) for fault in bag.faults],
            "notes": [
                *chosen.notes,
                *([JUMPS.format(replay.inbox.measured.jumps)] if replay.inbox.measured.jumps else []),
            ],
        },
        "bundle": {"name": chosen.bundle.manifest.name, "manifest_sha256": chosen.manifest_sha256},
        "settings": chosen.parameters(),
        "replay": {
            "ticks": "recorded" if options.as_recorded else "paced",
            "latency": options.latency.description,
            "seed": chosen.settings.noise_seed,
            "segment_s": figures.segment_s,
        },
        **ticks,
    }
    if options.as_recorded:
        causes = sorted(replay.not_reproduced.items(), key=lambda item: (-item[1], item[0]))
        metrics["parity"] = {**replay.inbox.parity.summary(), "not_reproduced": dict(causes[:CAUSES_LISTED])}
    metrics["fingerprint"] = hashlib.sha256(json.dumps(metrics, sort_keys=True).encode()).hexdigest()
    metrics["realtime_factor"] = duration_s / wall_s if wall_s > 0.0 else None
    metrics["timing"] = {"wall_s": wall_s, **figures.timing()}
    return metrics


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Writes the file whole or not at all, so a reader never finds half of it."""
    written = folder / f"{METRICS}.part"
    written.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    written.replace(folder / METRICS)
