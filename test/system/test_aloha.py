"""ALOHA end to end in one command: demonstrated, recorded, converted, replayed, and moved by the node."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from support import ROOT
from support.aloha import needs_aloha

from ki_vla_ros.sim.aloha.world import CAMERAS, INSTRUCTION, JOINTS
from training.data.lerobot import Dataset

pytest.importorskip("torch")
pytestmark = [needs_aloha, pytest.mark.slow]
PARTS = ("left_arm", "left_gripper", "right_arm", "right_gripper")


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "aloha"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def told(done: subprocess.CompletedProcess[str], out: Path) -> str:
    """What the command printed, and the end of each of its processes' logs."""
    ends = [f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted((out / "log").glob("*.log"))]
    return "\n".join([done.stdout, done.stderr, *ends])


def test_one_command_demonstrates_records_converts_replays_and_moves(
    ros_environment: dict[str, str], tmp_path: Path
) -> None:
    done = run("--episodes", "1", "--live", "2", "--rate", "10", "--out", "out", cwd=tmp_path)
    out = tmp_path / "out"
    assert done.returncode == 0, told(done, out)
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["demonstrations"]) == 1 and "handed over" in summary["demonstrations"][0]
    assert set(summary["replayed"]) == set(PARTS) and min(summary["replayed"].values()) > 0
    live = summary["live"]
    assert set(live["commands"]) == set(PARTS) and min(live["commands"].values()) > 0
    assert (live["refused_by_controllers"], live["beyond_limits"]) == (0, [])
    assert cv2.imread(str(out / "episode.png")).shape == (240 * len(CAMERAS), 320 * 8, 3)

    dataset = Dataset(out / "dataset")
    assert dataset.info.fps == 10 and dataset.cameras == CAMERAS
    assert dataset.state_names == dataset.action_names == JOINTS
    episode = dataset.episodes[0]
    columns = dataset.columns(episode)
    assert dataset.task_of(columns)[0] == INSTRUCTION
    for column in ("observation.state", "action"):
        gripper_N = columns[column][:, JOINTS.index("right_gripper")]
        assert gripper_N.min() < 0.7 and 0.9 < gripper_N.max() < 1.0, "as in gym-aloha, 1 when open"
    # What was commanded came true a little later.
    elbow_N, wanted_N = (columns[name][:, JOINTS.index("right_elbow")] for name in ("observation.state", "action"))
    assert np.ptp(elbow_N) > 0.5 and np.corrcoef(elbow_N, wanted_N)[0, 1] > 0.9

    # The same bundle judged: it moves the arms, and hands nothing over.
    judged = run("--bundle", "out/bundle", "--episodes", "1", "--rate", "10", "--out", "judged", cwd=tmp_path)
    assert judged.returncode == 0, told(judged, tmp_path / "judged")
    summary = json.loads((tmp_path / "judged" / "summary.json").read_text())
    (episode,) = summary["episodes"]
    assert episode.startswith("episode 2, scene_seed 1000000: failed with reward ")
    assert summary["success"] == "success 0 of 1, 95 % interval 0% to 79%"
    assert min(summary["live"]["commands"][part] for part in PARTS) > 0 and summary["live"]["beyond_limits"] == []


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--episodes", "0"), "aloha: --episodes: expected 1 to 1000, got 0"),
        (("--live", "0"), "aloha: --live: expected 1 to 3600 s, got 0"),
        (("--rate", "60"), "aloha: --rate: expected 5 to 50, got 60"),
        (("--bundle", "nosuch"), "aloha: bundle: expected a folder, got nosuch, which is missing"),
        (("--out", "."), "aloha: --out .: expected a new folder, or this command's own, got one with mine"),
    ],
)
def test_impossible_options_are_refused_before_anything_starts(
    tmp_path: Path, arguments: tuple[str, ...], fault: str
) -> None:
    (tmp_path / "mine").write_text("kept")
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and fault in done.stderr
    assert (tmp_path / "mine").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1
