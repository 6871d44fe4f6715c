"""What the report of an episode says about a recording with one thing wrong; a good one is fine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.lerobot_runs import run
from support.sample_bags import (
    COMMAND_TOPIC,
    JOINT_TOPIC,
    START_NS,
    Messages,
    command,
    joint_state,
    recording,
    where,
    write_bag,
)

from ki_vla_ros.messages.decoding import BagMessage
from ki_vla_ros.records import NS_PER_S
from training.convert.integrity import as_table

MS = 1_000_000
WRIST = "/camera/wrist/image_raw"
PIXELS = 32 * 32 * 3  # bytes at the end of an image


def reports(tmp_path: Path, messages: Messages, *more: object) -> list[dict[str, Any]]:
    bag, out = write_bag(tmp_path / "bag", messages), tmp_path / "out"
    given = ("--bundle", "demo", "--actions", "commands", "--fps", 10, "--out", out, *more)
    assert run("from-bag", bag, *given) == 0
    return [json.loads(line) for line in (out / "meta/ki_vla_ros_episodes.jsonl").read_text().splitlines()]


def lit(seconds: float = 4.0) -> Messages:
    """A recording whose images are never black."""
    messages = recording(seconds=seconds)
    return [painted(m, 60 + k // 2 % 150) if "image_raw" in m.topic else m for k, m in enumerate(messages)]


def since_s(message: BagMessage) -> float:
    return (message.log_ns - START_NS) / NS_PER_S


def test_a_good_episode_is_fine_and_has_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (report,) = reports(tmp_path, lit())
    assert (report["verdict"], report["why"], report["bag"], report["episode_index"]) == ("fine", [], "bag", 0)
    assert report["frames"] >= 37 and report["duration_s"] == pytest.approx((report["frames"] - 1) * 0.1)
    wrist, joints = report["cameras"]["wrist"], report["joint_states"]
    assert (wrist["rate_hz"], wrist["largest_gap_s"], wrist["stamp_age_s"]) == (20.0, 0.05, 0.002)
    assert (joints["rate_hz"], joints["missing"], joints["largest_gap_s"]) == (100.0, 0, 0.01)
    fastest = np.abs(np.diff([where(k / 100) for k in range(400)], axis=0)).max()
    assert joints["largest_jump"]["by"] == pytest.approx(fastest, rel=0.1) and joints["largest_jump"]["in_s"] == 0.01
    assert abs(report["action_lag_s"]) < 0.03 and report["repeated_frames"] == 0
    said = capsys.readouterr().out
    assert "images Hz" in said and "1 of 1 episodes fine" in said


def late(messages: Messages) -> Messages:
    """The arm is where it was commanded to be 0.6 s later than it should."""
    return [replace(m, data=command(where(since_s(m) + 0.7))) if m.topic == COMMAND_TOPIC else m for m in messages]


def painted(message: BagMessage, grey: int) -> BagMessage:
    return replace(message, data=message.data[:-PIXELS] + bytes([grey]) * PIXELS)


def black(messages: Messages) -> Messages:
    return [painted(m, 0) if m.topic == WRIST and 1.0 < since_s(m) < 2.0 else m for m in messages]


def frozen(messages: Messages) -> Messages:
    """The driver stamps the same pixels anew, for half a second."""
    return [painted(m, 99) if m.topic == WRIST and 1.0 < since_s(m) < 1.6 else m for m in messages]


def lossy(messages: Messages) -> Messages:
    kept = [m for m in messages if m.topic == WRIST][::3]
    return [m for m in messages if m.topic != WRIST or m not in kept]


def repeated(messages: Messages) -> Messages:
    """A driver sends each joint state twice."""
    twice = [replace(m, log_ns=m.log_ns + MS) for m in messages if m.topic == JOINT_TOPIC]
    return sorted([*messages, *twice], key=lambda m: m.log_ns)


def jumping(messages: Messages) -> Messages:
    """From 2 s on, all joint states are 0.12 rad beside where they were."""
    return [
        replace(m, data=joint_state(m.log_ns - 2 * MS, where(since_s(m) - 0.002) + 0.12 * np.eye(7)[0]))
        if m.topic == JOINT_TOPIC and since_s(m) > 2.0
        else m
        for m in messages
    ]


def slow(messages: Messages) -> Messages:
    """A camera that is slower than the frames: every second frame has the images of the one before."""
    cameras = [m for m in messages if "image_raw" in m.topic]
    return [m for m in messages if m not in cameras or cameras.index(m) // 2 % 4 == 0]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (late, "lag: the state follows the actions by 0.6"),
        (black, "black: 10 of 39 images of 'wrist'"),
        (frozen, "frozen: 5 of 39 images of 'wrist' stay the same while the arm moves"),
        (lossy, "loss: "),
        (repeated, "stamps: "),
        (jumping, "jump: 'shoulder_pan' by 0.11"),
        (slow, "rate: "),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_wrong_with_an_episode_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Messages], Messages], why: str
) -> None:
    (report,) = reports(tmp_path, spoil(lit()))
    assert report["verdict"] == "look at it" and [reason[: len(why)] for reason in report["why"]] == [why], report
    assert f"look at it: {why}" in capsys.readouterr().out


def test_a_gap_and_what_was_left_out_stand_with_the_episode_that_follows(tmp_path: Path) -> None:
    messages = [m for m in lit() if m.topic != WRIST or not 1.5 < since_s(m) < 2.2]
    before, after = reports(tmp_path, messages)
    assert "no observation" not in before["left_out"] or before["left_out"]["no observation"] <= 1
    assert sum((before["left_out"] | after["left_out"]).values()) >= 5 and after["verdict"] == "fine"


def test_of_many_episodes_those_to_look_at_are_shown() -> None:
    fine = {"frames": 10, "verdict": "fine", "why": []}
    odd = fine | {"verdict": "look at it", "why": ["black: 5 of 10 images of 'top'"]}
    table = as_table([(odd if n % 10 == 0 else fine) | {"episode_index": n} for n in range(300)])
    assert table.count("look at it: black") == 20 and len(table.splitlines()) == 22
    assert table.endswith("10 more are to be looked at; 270 of 300 episodes fine")
