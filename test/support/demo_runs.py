"""Small pieces of a demo run, as the demo's driver would have seen them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ki_vla_ros.demo.driver import SCENE_IMAGE, WRIST_IMAGE, Observed
from ki_vla_ros.demo.report import EpisodeResult


def tick(total_ms: float, *, chunk_index: int | None = 0, misses: int = 0, instruction: str = "") -> dict[str, Any]:
    stage_ms = {"prefill": 0.25 * total_ms, "denoise": 0.75 * total_ms, "total": total_ms}
    fields = {"chunk_index": chunk_index, "deadline_misses": misses, "stage_ms": stage_ms, "hold": None}
    return {**fields, "instruction": instruction}


def observed(rate: float, *ticks: dict[str, Any], start_s: float = 0.0) -> Observed:
    times = [start_s + k / rate for k in range(11)]
    return Observed(times, {SCENE_IMAGE: times[::2], WRIST_IMAGE: times}, list(ticks))


def episode(**fields: Any) -> EpisodeResult:
    whole = EpisodeResult(7, "touch the red disc", 4, "red disc", True, True, 2.5)
    return replace(whole, **fields)
