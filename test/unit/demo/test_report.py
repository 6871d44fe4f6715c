"""The demo's results: the figures in summary.json, and the page."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.demo_runs import episode, observed, tick

from ki_vla_ros.demo.driver import SCENE_IMAGE, WRIST_IMAGE, Observed
from ki_vla_ros.demo.report import DemoRun, rate_hz, summarise, write_report


def a_run() -> DemoRun:
    lost = episode(seed=8, objects=5, reached="red <b>cube</b>", followed=False, success=False)
    return DemoRun(
        episodes=[episode(), lost],
        observed=[
            observed(10.0, tick(10.0), tick(3.0, chunk_index=None), tick(20.0, misses=1)),
            observed(20.0, tick(30.0, misses=2), start_s=100.0),
        ],
        demonstrator_success=[True, True],
        seed=3,
        split="held_out",
        bundle="a & b",
        bundle_sha256="0" * 64,
        overruns=4,
    )


def test_the_summary_has_the_figures_of_the_run() -> None:
    summary = summarise(a_run())
    assert summary["episodes"] == 2
    assert (summary["follow_rate"], summary["success_rate"], summary["demonstrator_success_rate"]) == (0.5, 0.5, 1.0)
    assert summary["chance_follow_rate"] == pytest.approx((1 / 4 + 1 / 5) / 2)
    assert summary["chunk_rate_hz"] == pytest.approx(20 / 1.5, abs=1e-3)  # 10 gaps of 0.1 s, 10 of 0.05 s, no pause
    assert summary["camera_rate_hz"] == pytest.approx(10 / 1.5, abs=1e-3)  # the slower of the two
    assert summary["tick_ms"] == {"p50": 20.0, "p90": 28.0, "p99": 29.8, "max": 30.0}  # only ticks that made a chunk
    assert summary["stages_ms"]["prefill"]["p50"] == 5.0
    assert set(summary["stages_ms"]) == {"prefill", "denoise"}
    assert summary["deadline_misses"] == 1 + 2
    assert (summary["realtime_overruns"], summary["seed"], summary["split"]) == (4, 3, "held_out")
    assert summary["bundle"] == {"name": "a & b", "manifest_sha256": "0" * 64}
    assert summary["machine"]["cores"] == os.cpu_count()
    assert [entry["seed"] for entry in summary["per_episode"]] == [7, 8]
    assert summary["per_episode"][0]["demonstrator_success"] is True


def test_a_rate_needs_two_arrivals() -> None:
    assert rate_hz([[1.0], []]) == 0.0
    assert rate_hz([[1.0], [5.0, 5.5, 6.0]]) == 2.0


class Page(HTMLParser):
    """Checks that tags nest; notes texts and the video's source."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.video: str | None = None
        self.rows = 0
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "video":
            self.video = dict(attributes)["src"]
        self.rows += tag == "tr"
        if tag not in ("meta",):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_shows_figures_and_episodes_and_escapes_text(tmp_path: Path) -> None:
    summary = write_report(tmp_path, a_run(), "demo.mp4")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    page = Page((tmp_path / "index.html").read_text())
    assert page.video == "demo.mp4"
    assert page.rows == (1 + 2) + (1 + 2)  # episodes, stages
    assert {"50 %", "chance 22 %", "13.3 Hz", "3 deadlines missed", "20 ms", "p99 30 ms"} <= set(page.texts)
    assert "red <b>cube</b>" in page.texts
    assert "http" not in (tmp_path / "index.html").read_text()  # nothing is fetched from elsewhere


def test_a_page_without_film_and_with_a_single_chunk(tmp_path: Path) -> None:
    short = Observed([1.0], {SCENE_IMAGE: [1.0], WRIST_IMAGE: [1.0]}, [tick(4.0)])
    write_report(tmp_path, replace(a_run(), episodes=[episode()], observed=[short], demonstrator_success=[False]), None)
    assert Page((tmp_path / "index.html").read_text()).video is None
