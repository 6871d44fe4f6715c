"""The demo's results: summary.json, and index.html with plots and a table of the episodes."""

from __future__ import annotations

import html
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from ki_vla_ros.demo.driver import Observed
from ki_vla_ros.report import Axes, Span, figure, page, section, table, tiles
from ki_vla_ros.statistics import spread

BINS: Final = 40
EPISODE_COLUMNS: Final = ("instruction", "reached first", "success", "time", "objects", "demonstrator", "seed")


@dataclass(frozen=True, slots=True)
class EpisodeResult:
    """How one episode went. `reached` names the first object touched or pointed at; `time_s` is simulated time."""

    seed: int
    instruction: str
    objects: int
    reached: str | None
    followed: bool
    success: bool
    time_s: float


@dataclass(frozen=True, slots=True)
class DemoRun:
    """Everything a summary is made from; `observed[k]` and `demonstrator_success[k]` belong to `episodes[k]`."""

    episodes: Sequence[EpisodeResult]
    observed: Sequence[Observed]
    demonstrator_success: Sequence[bool]
    seed: int
    split: str
    bundle: str
    bundle_sha256: str
    overruns: int


def summarise(run: DemoRun) -> dict[str, Any]:
    """The content of summary.json; success rates are 0 to 1, and latencies are those of ticks that made a chunk."""
    episodes = run.episodes
    ticks = [tick for observed in run.observed for tick in observed.ticks if tick["chunk_index"] is not None]
    stages: dict[str, list[float]] = {}
    for tick in ticks:
        for stage, duration_ms in tick["stage_ms"].items():
            stages.setdefault(stage, []).append(duration_ms)
    total_ms = stages.pop("total")
    cameras = run.observed[0].image_times_s
    return {
        "episodes": len(episodes),
        "follow_rate": _mean(episode.followed for episode in episodes),
        "success_rate": _mean(episode.success for episode in episodes),
        "chance_follow_rate": _mean(1.0 / episode.objects for episode in episodes),
        "demonstrator_success_rate": _mean(run.demonstrator_success),
        "chunk_rate_hz": rate_hz([observed.chunk_times_s for observed in run.observed]),
        "tick_ms": _rounded(total_ms),
        "stages_ms": {stage: _rounded(durations) for stage, durations in stages.items()},
        "deadline_misses": sum(observed.ticks[-1]["deadline_misses"] for observed in run.observed if observed.ticks),
        "camera_rate_hz": min(
            rate_hz([observed.image_times_s[camera] for observed in run.observed]) for camera in cameras
        ),
        "realtime_overruns": run.overruns,
        "seed": run.seed,
        "split": run.split,
        "bundle": {"name": run.bundle, "manifest_sha256": run.bundle_sha256},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "per_episode": [
            {**asdict(episode), "demonstrator_success": solved}
            for episode, solved in zip(episodes, run.demonstrator_success, strict=True)
        ],
    }


def rate_hz(arrivals_s: Iterable[Sequence[float]]) -> float:
    """Mean rate within the given stretches of arrivals, without the pauses between; 0 if none has two arrivals."""
    stretches = [times for times in arrivals_s if len(times) > 1]
    span_s = sum(times[-1] - times[0] for times in stretches)
    return round(sum(len(times) - 1 for times in stretches) / span_s, 3) if span_s > 0.0 else 0.0


def _rounded(durations_ms: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in spread(durations_ms).items()}


def _mean(values: Iterable[float]) -> float:
    return round(float(np.mean(list(values))), 4)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def write_report(out: Path, run: DemoRun, video: str | None) -> dict[str, Any]:
    """Writes summary.json and index.html into `out`; `video` names the film beside them. Returns the summary."""
    summary = summarise(run)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (out / "index.html").write_text(_page(summary, run, video), encoding="utf-8")
    return summary


def _page(summary: Mapping[str, Any], run: DemoRun, video: str | None) -> str:
    ticks = [tick for observed in run.observed for tick in observed.ticks if tick["chunk_index"] is not None]
    total_ms = [tick["stage_ms"]["total"] for tick in ticks]
    gaps_ms = [1e3 * (b - a) for observed in run.observed for a, b in pairwise(observed.chunk_times_s)]
    tick_ms, bundle, machine = summary["tick_ms"], summary["bundle"], summary["machine"]
    figures = [
        ("followed", f"{100 * summary['follow_rate']:.0f} %", f"chance {100 * summary['chance_follow_rate']:.0f} %"),
        (
            "success",
            f"{100 * summary['success_rate']:.0f} %",
            f"demonstrator {100 * summary['demonstrator_success_rate']:.0f} %",
        ),
        ("chunks", f"{summary['chunk_rate_hz']:.1f} Hz", f"{summary['deadline_misses']} deadlines missed"),
        ("tick", f"{tick_ms['p50']:.0f} ms", f"p99 {tick_ms['p99']:.0f} ms"),
        ("cameras", f"{summary['camera_rate_hz']:.1f} Hz", f"{summary['realtime_overruns']} simulator overruns"),
    ]
    subtitle = (
        f"bundle {bundle['name']} · split {summary['split']} · seed {summary['seed']} · {summary['date']} · "
        f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}"
    )
    plots = histogram("ticks", "all stages", total_ms, tick_ms["p99"]) + histogram("between chunks", "", gaps_ms, None)
    stages = [
        [html.escape(stage), *(f"{values[key]:.2f}" for key in ("p50", "p90", "p99", "max"))]
        for stage, values in summary["stages_ms"].items()
    ]
    episodes = map(_row, run.episodes, run.demonstrator_success)
    sections = [
        tiles(figures),
        f'<video src="{html.escape(video)}" controls muted loop autoplay playsinline></video>' if video else "",
        section("Episodes", table(EPISODE_COLUMNS, episodes)),
        section(
            "Timing",
            f'<div class="plots">{plots}</div>',
            table(["stage, ms", "p50", "p90", "p99", "max"], stages),
            note="Only ticks that made a chunk.",
        ),
    ]
    return page("ki_vla_ros demo", subtitle, sections)


def _row(episode: EpisodeResult, demonstrator_success: bool) -> list[str]:
    return [
        html.escape(episode.instruction),
        html.escape(episode.reached or "nothing"),
        '<b class="good">✓</b>' if episode.success else '<b class="bad">✗</b>',
        f"{episode.time_s:.1f} s",
        str(episode.objects),
        "✓" if demonstrator_success else "✗",
        str(episode.seed),
    ]


def histogram(title: str, note: str, values_ms: Sequence[float], marked_ms: float | None) -> str:
    """A histogram of durations; a vertical line marks `marked_ms`."""
    span = Span.of(values_ms, zero=True, margin=0.02)
    counts, edges_ms = np.histogram(values_ms, bins=BINS, range=(span.low, span.high))
    axes = Axes(span, Span.of(counts, zero=True, margin=0.05))
    across_ms, up = np.repeat(edges_ms, 2)[1:-1], np.repeat(counts, 2)
    layers = [axes.band(across_ms, np.zeros_like(up), up), axes.line(across_ms, up, "mean")]
    if marked_ms is not None:
        layers.append(axes.marks([marked_ms], "limit"))
        note = ", ".join(filter(None, (note, f"line at p99: {marked_ms:.0f} ms")))
    return figure(title, note, axes, layers, x_unit="ms")
