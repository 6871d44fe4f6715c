"""metrics.json: the figures of a replay, with the bag, bundle and settings they belong to; see docs/replay.md."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from ki_vla_ros.bags import Bag
from ki_vla_ros.errors import ConfigurationError, writing
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.replay.figures import Figures
from ki_vla_ros.replay.loop import Replay
from ki_vla_ros.replay.setup import Setup

METRICS = "metrics.json"
SCHEMA = 1
CAUSES_LISTED = 20
SILENCES = "stretches longer than {1:g} s without a message: {0}, {2:.1f} s in all; no ticks are made there"
JUMPS = "the arm was put elsewhere {} times (faster than its joints can move): no action is compared across that"


def make_metrics(
    bag: Bag, chosen: Setup, replay: Replay, figures: Figures, wall_s: float, stopped: str | None
) -> dict[str, Any]:
    """The content of metrics.json; `stopped`: why the replay ended before the bag (None: it did not)."""
    topics, options = chosen.topics, replay.options
    feed = replay.feed
    duration_s = (replay.now_ns - replay.start_ns - feed.silent_ns) / NS_PER_S
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
            "silences": {"count": feed.silences, "seconds": feed.silent_ns / NS_PER_S},
            "topics": topics.described(),
            "messages": dict(sorted(replay.messages.items())),
            "faults": [dataclasses.asdict(fault) for fault in bag.faults],
            "notes": _notes(chosen, replay),
        },
        "bundle": {"name": chosen.bundle.manifest.name, "manifest_sha256": chosen.manifest_sha256},
        "settings": chosen.parameters(),
        "replay": {
            "ticks": "recorded" if options.as_recorded else "paced",
            "latency": replay.latency.description,
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


def _notes(chosen: Setup, replay: Replay) -> list[str]:
    notes = list(chosen.notes)
    if replay.feed.silences:
        feed = replay.feed
        notes.append(SILENCES.format(feed.silences, feed.silence_ns / NS_PER_S, feed.silent_ns / NS_PER_S))
    if jumps := replay.inbox.measured.jumps:
        notes.append(JUMPS.format(jumps))
    return notes


def make_folder(folder: Path) -> None:
    """Makes the folder for results; ConfigurationError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = "a file" if folder.is_file() else error.strerror
        raise ConfigurationError(
            f"--out {folder}: expected a folder for the results, got {got}; choose another"
        ) from error


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    write_whole(folder / METRICS, json.dumps(metrics, indent=1, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes the file whole or not at all, so a reader never finds half of it; KiVlaError if that is not possible."""
    part = path.with_name(f"{path.name}.part")
    with writing(path, "what an earlier write left there is unchanged" if path.exists() else ""):
        try:
            part.write_text(text, "utf-8", "backslashreplace")  # a name from a file may be no text
            part.replace(path)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
