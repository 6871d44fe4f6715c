"""The report stands alone, stays small, and shows what was worst."""

from __future__ import annotations

import base64
import dataclasses
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from support.bundles import CAMERAS, demo_policy
from support.replays import made_up_metrics, made_up_tick, made_up_trace

from ki_vla_ros.replay.report import report
from ki_vla_ros.replay.trace import MOMENTS, MOST_CHUNKS, Trace

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects unmatched tags, everything that would be fetched, and the text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.fetched: list[str] = []
        self.images: list[bytes] = []
        self.text = ""
        self.feed(content)
        self.close()
        self.faults += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "poster", "srcset", "action"):
                if value and value.startswith("data:image/jpeg;base64,"):
                    self.images.append(base64.b64decode(value.partition(",")[2]))
                else:
                    self.fetched.append(f"{tag} {name}={value}")
        if tag in ("script", "link", "iframe", "object", "embed", "base"):
            self.fetched.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Handles self-closing tags such as <path/>: nothing stays open."""

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_stands_alone_and_is_well_formed() -> None:
    spec = demo_policy()
    content = report(made_up_trace(spec), made_up_metrics(spec), "replay <kitchen> & co")
    page = Page(content)
    assert page.faults == [] and page.fetched == []
    assert not re.search(r"url\(|@import|https?://", content)
    assert "replay <kitchen> & co" in page.text  # escaped once, not twice
    for name in (*spec.axis_names, "camera.wrist", "12 ms, fixed"):
        assert name in page.text


def test_worst_moment_is_found_with_what_the_cameras_saw() -> None:
    spec = demo_policy()
    moments = made_up_trace(spec, worst=120).finish()
    assert moments[0].worst.index == 120
    assert len(moments) <= MOMENTS
    assert moments[0].error > 5 * moments[1].error
    starts = sorted(moment.at_s for moment in moments)
    assert min(np.diff(starts)) > 1.0  # not the same moment again and again
    assert set(moments[0].jpegs) == set(CAMERAS)
    picture = cv2.imdecode(np.frombuffer(moments[0].jpegs["wrist"], np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (96, 128, 3)
    # Column 120 is the first dark one of tick 120 (support/replays.py): the image is of that tick and of no other.
    bright = int(np.sum(picture[48, :, 2] > 100))
    assert abs(bright - 121) <= 2


def test_worst_moment_at_the_very_end_is_found() -> None:
    spec = demo_policy()
    assert made_up_trace(spec, ticks=100, worst=98).finish()[0].worst.index == 98


def test_long_bag_gives_a_small_page() -> None:
    spec = demo_policy()
    trace = made_up_trace(spec, ticks=4_000, worst=3_000)
    assert MOST_CHUNKS / 2 <= len(trace.chunks) <= MOST_CHUNKS
    last_s = trace.seconds(trace.chunks[-1].start_ns)
    assert last_s > 0.95 * trace.time_s[-1]  # evenly over the bag, not its beginning
    content = report(trace, made_up_metrics(spec), "")
    assert len(content) < 3_000_000
    assert "error 0.3" in content  # the worst moment, found in the middle of it


def test_missing_reference_is_reported_and_not_drawn() -> None:
    spec, metrics = demo_policy(), made_up_metrics(demo_policy())
    nothing = dict.fromkeys(("rms", "rms_ci", "max", "unit", "by_step", "by_joint", "by_joint_step", "reference"))
    metrics["error"] |= nothing | {"missing": "reference: no messages on /arm/commands"}
    page = Page(report(made_up_trace(spec), metrics, ""))
    assert page.faults == []
    assert "no messages on /arm/commands" in page.text
    assert "Error over the horizon" not in page.text


def test_broken_bag_and_early_end_are_reported() -> None:
    spec, metrics = demo_policy(), made_up_metrics(demo_policy())
    metrics |= {"complete": False, "stopped": "interrupted"}
    metrics["bag"]["faults"] = [{"kind": "truncated", "where": "kitchen.mcap", "message": "ends <early>"}]
    page = Page(report(made_up_trace(spec), metrics, ""))
    assert "Not the whole bag: interrupted" in page.text
    assert "ends <early>" in page.text


def test_bag_without_a_single_tick_still_gives_a_page() -> None:
    spec, metrics = demo_policy(), made_up_metrics(demo_policy())
    metrics["seam"]["jump_rms"] = metrics["deadlines"]["latency_ms"] = None
    metrics["inputs"] = {"age_ms": {}, "skew_ms": None, "observation_to_command_ms": None}
    metrics["error"] |= {"rms": None, "missing": "reference: no chunk has one", "rms_ci": None}
    page = Page(report(Trace(spec), metrics, ""))
    assert page.faults == [] and "No chunk was predicted" in page.text


@pytest.mark.parametrize("kind", ["hold", "refused", "corrected"])
def test_timeline_counts_by_cause(kind: str) -> None:
    spec, trace = demo_policy(), Trace(demo_policy())
    for number in range(40):
        tick = made_up_tick(spec, number)
        assert tick.prediction is not None
        if number % 4 == 0 and kind == "hold":
            tick = dataclasses.replace(tick, hold="camera 'wrist': newest frame 412 ms old", prediction=None)
        elif number % 4 == 0 and kind == "refused":
            chunk = dataclasses.replace(tick.prediction, command_ns=None, refusal="joint 'elbow': too far")
            tick = dataclasses.replace(tick, hold="joint 'elbow': too far", prediction=chunk)
        elif number % 4 == 0:
            chunk = dataclasses.replace(tick.prediction, corrections=("clamped elbow, gripper",))
            tick = dataclasses.replace(tick, prediction=chunk)
        trace.add(tick)
    expected = {
        "hold": {("hold", "camera 'wrist'"): 10},
        "refused": {("refused", "joint 'elbow'"): 10},
        "corrected": {("corrected", "clamped elbow"): 10, ("corrected", "clamped gripper"): 10},
    }[kind]
    assert {key: lane.count for key, lane in trace.lanes.items()} == expected


def test_lines_stop_where_the_node_was_not_active() -> None:
    spec, trace = demo_policy(), Trace(demo_policy())
    for number in (0, 1, 2, 80, 81):
        trace.add(made_up_tick(spec, number))
    gaps = [k for k, value in enumerate(trace.ages_ms["wrist"]) if np.isnan(value)]
    assert gaps == [3] and len(trace.time_s) == 6
    assert [k for k, value in enumerate(trace.state_JT[0]) if np.isnan(value)] == [3]


def test_limits_that_override_nothing_are_not_set() -> None:
    spec, metrics = demo_policy(), made_up_metrics(demo_policy())
    metrics["settings"]["limits.joints.elbow.velocity"] = 1.5
    text = Page(report(made_up_trace(spec), metrics, "")).text
    assert "1000000000" not in text
    for name, told in (("velocity", "1.5"), ("acceleration", "not set"), ("lower", "not set"), ("upper", "not set")):
        assert f"limits.joints.elbow.{name}{told}" in text
