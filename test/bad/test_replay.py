"""Bad bags replayed: what is there is judged, what is missing is named, and nothing is made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import bad_bags, sample_bags
from support.bad_bags import CASES, Case, change, with_data
from support.bundles import params_file
from support.sample_bags import recording, write_mcap

from ki_vla_ros.replay.__main__ import main

# Nothing to replay: each says which input is missing.
NOTHING = {
    "empty file": "camera 'wrist'",
    "no mcap": "camera 'wrist'",
    "no database": "camera 'wrist'",
    "zero messages": "camera 'wrist'",
    "missing topics": "camera 'scene'",
    "another serialization": "camera 'wrist'",
    "a compression of no kind": "got no message that can be read",
}


def of_another_type(topic: str) -> Case:
    to_text = change(topic, lambda k, m: with_data(m, sample_bags.text("?"), type=sample_bags.STRING) if k % 2 else m)
    to_state = change(
        topic, lambda k, m: with_data(m, sample_bags.joint_state(0, sample_bags.MIDDLE_J), type=sample_bags.JOINT_STATE)
    )
    changed = to_state if topic == sample_bags.INSTRUCTION_TOPIC else to_text
    faults = (f"{topic}: has messages of ",) if changed is to_text else ()
    return Case(lambda folder: write_mcap(folder / "b.mcap", changed(recording())), faults)


MORE = {
    "other types of joint states": of_another_type(sample_bags.JOINT_TOPIC),
    "other types of commands": of_another_type(sample_bags.COMMAND_TOPIC),
    "another type of instruction": of_another_type(sample_bags.INSTRUCTION_TOPIC),
}


def replay(bag: Path, folder: Path, transport: str, reference: str) -> tuple[int, dict[str, Any]]:
    cameras = {camera: {"transport": transport} for camera in sample_bags.CAMERAS}
    params = params_file(folder, cameras=cameras, instruction="touch the red cube")
    out = folder / "out"
    code = main([str(bag), "--params", str(params), "--out", str(out), "--latency", "0.01", "--reference", reference])
    metrics = out / "metrics.json"
    return code, json.loads(metrics.read_text()) if metrics.exists() else {}


@pytest.fixture(scope="module")
def whole_rms(tmp_path_factory: pytest.TempPathFactory) -> float:
    folder = tmp_path_factory.mktemp("whole")
    bag = write_mcap(folder / "b.mcap", recording())
    return float(replay(bag, folder, "raw", "joint_states")[1]["error"]["rms"])


@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_a_bad_bag_is_replayed_as_far_as_possible(
    name: str, whole_rms: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = {**CASES, **MORE}[name]
    (tmp_path / "in").mkdir()
    bag = case.make(tmp_path / "in")
    reference = "command" if "commands" in name else "joint_states"
    code, metrics = replay(bag, tmp_path, "compressed" if "jpegs" in name else "raw", reference)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if name in NOTHING:
        assert code == 2 and NOTHING[name] in said
        return
    assert code == 0, said
    assert bad_bags.fits([f"{f['where']}: {f['message']}" for f in metrics["bag"]["faults"]], case.faults)
    if name.startswith("good") or name in ("trailing bytes", "split by time", "a damaged record length"):
        # The recording is the same, so the figures are, to the last digit.
        assert metrics["error"]["rms"] == whole_rms
    assert metrics["ticks"]["chunks"] <= 21 and (name == "a gap of minutes" or metrics["ticks"]["count"] <= 21)
