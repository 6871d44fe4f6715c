"""What the demo says about a run: summary.json, and index.html with plots and a table of the episodes."""

from __future__ import annotations

import html
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from ki_vla_ros.demo.driver import Observed
from ki_vla_ros.statistics import spread


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
    """Everything that a summary is made from; `observed[k]` and `demonstrator_success[k]` belong to `episodes[k]`."""

    episodes: Sequence[EpisodeResult]
    observed: Sequence[Observed]
    demonstrator_success: Sequence[bool]
    seed: int
    split: str
    bundle: str
    bundle_sha256: str
    overruns: int


def summarise(run: DemoRun) -> dict[str, Any]:
    """The content of summary.json; rates of success in 0..1, latencies of ticks that made a chunk."""
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
    """Mean rate within the given stretches of time, pauses between them left out; 0 without two arrivals in any."""
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
    """Writes summary.json and index.html (with the film `video` beside them) into `out`; returns the summary."""
    summary = summarise(run)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (out / "index.html").write_text(_page(summary, run, video), encoding="utf-8")
    return summary


def _page(summary: Mapping[str, Any], run: DemoRun, video: str | None) -> str:
    ticks = [tick for observed in run.observed for tick in observed.ticks if tick["chunk_index"] is not None]
    total_ms = [tick["stage_ms"]["total"] for tick in ticks]
    gaps_ms = [1e3 * (b - a) for observed in run.observed for a, b in pairwise(observed.chunk_times_s)]
    tick_ms, bundle, machine = summary["tick_ms"], summary["bundle"], summary["machine"]
    tiles = [
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
    player = f'<video src="{html.escape(video)}" controls muted loop autoplay playsinline></video>' if video else ""
    rates = {
        "chance": summary["chance_follow_rate"],
        "followed": summary["follow_rate"],
        "success": summary["success_rate"],
        "demonstrator": summary["demonstrator_success_rate"],
    }
    stages = {
        stage: (values["p50"], values["p99"], f"{values['p50']:.2f} / {values['p99']:.2f}")
        for stage, values in summary["stages_ms"].items()
    }
    return _PAGE.format(
        title="ki_vla_ros demo",
        subtitle=html.escape(
            f"bundle {bundle['name']} · split {summary['split']} · seed {summary['seed']} · {summary['date']} · "
            f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}"
        ),
        tiles="".join(
            f'<div class="tile"><b>{value}</b><span>{name}</span><small>{note}</small></div>'
            for name, value, note in tiles
        ),
        player=player,
        tick_plot=histogram(total_ms, "ms per tick (all stages)", tick_ms["p99"]),
        gap_plot=histogram(gaps_ms, "ms between chunks", None),
        stage_plot=bars("ms per stage: median, p99", stages),
        rate_plot=bars("share of episodes", {name: (rate, 1.0, f"{rate:.0%}") for name, rate in rates.items()}),
        rows="".join(map(_row, count(1), run.episodes, run.demonstrator_success)),
    )


def _row(number: int, episode: EpisodeResult, demonstrator_success: bool) -> str:
    mark, kind = ("✓", "good") if episode.success else ("✗", "bad")
    reached = episode.reached or "nothing"
    cells = [
        f"<td>{number}</td>",
        f"<td>{html.escape(episode.instruction)}</td>",
        f"<td>{html.escape(reached)}</td>",
        f'<td class="{kind}">{mark}</td>',
        f"<td>{episode.time_s:.1f} s</td>",
        f"<td>{episode.objects}</td>",
        f"<td>{'✓' if demonstrator_success else '✗'}</td>",
        f"<td>{episode.seed}</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def histogram(values: Sequence[float], title: str, marked: float | None) -> str:
    """An SVG of how often each value occurs; `marked` (the 99th percentile) gets a line."""
    width, height, base, left = 430, 190, 150, 15
    step = _round_step(max(values, default=1.0) / 5.0)
    high = step * (int(max(values, default=1.0) / step) + 1)
    counts, _ = np.histogram(values, bins=40, range=(0.0, high))
    across = width - 2 * left
    parts = [f'<text class="title" x="{left}" y="16">{html.escape(title)}</text>']
    for k, number in enumerate(counts):
        tall = 115.0 * float(number) / max(1, int(counts.max()))
        x, wide = left + k * across / len(counts), across / len(counts) - 1
        parts.append(f'<rect x="{x:.1f}" y="{base - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}"/>')
    parts.append(f'<line class="axis" x1="{left}" x2="{width - left}" y1="{base}" y2="{base}"/>')
    for value in np.arange(0.0, high + step / 2.0, step):
        x = left + across * value / high
        parts.append(f'<text x="{x:.0f}" y="{base + 16}" text-anchor="middle">{value:g}</text>')
    if marked is not None:
        x = left + across * marked / high
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="24" y2="{base}"/>')
        parts.append(f'<text class="mark" x="{x + 4:.1f}" y="34">p99 {marked:.0f}</text>')
    return f'<svg viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... that is not below `least`."""
    power: float = 10.0 ** np.floor(np.log10(least))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= least)


def bars(title: str, rows: Mapping[str, tuple[float, float, str]]) -> str:
    """An SVG with a bar per row, from 0 to its first figure solid, on to the second pale, and a note behind it."""
    width, row, left, longest = 430, 24, 110, 200
    scale = longest / max(max(solid, pale) for solid, pale, _ in rows.values())
    parts = [f'<text class="title" x="15" y="16">{html.escape(title)}</text>']
    for k, (name, (solid, pale, note)) in enumerate(rows.items()):
        y = 28 + k * row
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{html.escape(name)}</text>')
        for kind, value in (("pale", pale), ("solid", solid)):
            parts.append(f'<rect class="{kind}" x="{left}" y="{y}" width="{scale * value:.1f}" height="17"/>')
        end = left + scale * max(solid, pale)
        parts.append(f'<text x="{end + 6:.1f}" y="{y + 13}">{html.escape(note)}</text>')
    return f'<svg viewBox="0 0 {width} {max(190, 34 + row * len(rows))}">{"".join(parts)}</svg>'


_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 24px; max-width: 960px; color: #1c2430; }}
h1 {{ margin: 0; font-size: 26px; }} .sub {{ color: #68707c; margin: 4px 0 20px; font-size: 13px; }}
.tiles {{ display: grid; grid-template-columns: repeat(5, 1fr); gap: 12px; margin-bottom: 20px; }}
.tile {{ background: #f3f5f8; border-radius: 10px; padding: 12px 14px; }}
.tile b {{ display: block; font-size: 25px; }} .tile span {{ display: block; }} .tile small {{ color: #68707c; }}
video {{ width: 100%; border-radius: 10px; background: #10151c; display: block; margin-bottom: 20px; }}
.plots {{ display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin-bottom: 20px; }}
svg {{ background: #f3f5f8; border-radius: 10px; width: 100%; }} svg rect {{ fill: #2f6fde; }}
svg rect.pale {{ fill: #bcd2f6; }}
svg text {{ font: 12px system-ui, sans-serif; fill: #4a525e; }} svg text.title {{ font-weight: 600; fill: #1c2430; }}
svg .axis {{ stroke: #9aa3af; }} svg line.mark {{ stroke: #d9480f; }} svg text.mark {{ fill: #d9480f; }}
table {{ border-collapse: collapse; width: 100%; }} th, td {{ text-align: left; padding: 5px 10px; }}
tr:nth-child(even) td {{ background: #f3f5f8; }} th {{ border-bottom: 2px solid #d5dae1; font-size: 13px; }}
.good {{ color: #15803d; font-weight: 700; }} .bad {{ color: #c2255c; font-weight: 700; }}
</style></head><body>
<h1>{title}</h1><p class="sub">{subtitle}</p>
<div class="tiles">{tiles}</div>
{player}
<div class="plots">{rate_plot}{gap_plot}{stage_plot}{tick_plot}</div>
<table><thead><tr><th>#</th><th>instruction</th><th>reached first</th><th>success</th><th>time</th><th>objects</th>
<th>demonstrator</th><th>seed</th></tr></thead><tbody>{rows}</tbody></table>
</body></html>
"""
