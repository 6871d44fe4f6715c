"""docs/your_robot.md, command by command: from a bag of an unknown robot to a dataset and the doctor's report."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from support import ROOT
from support.sample_bags import START_NS, write_bag
from support.unknown_arm import opening, place, recording, urdf

from ki_vla_ros.bundle import load_bundle
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.robot import read_robot


def commands() -> list[list[str]]:
    """Those of the page, without the one that makes the bag."""
    text = (ROOT / "docs/your_robot.md").read_text().replace("\\\n", " ")
    found = [shlex.split(line) for line in re.findall(r"^    python -m (.*)$", text, re.MULTILINE)]
    return [[part.replace("BAG...", "BAG") for part in command] for command in found]


def run_file() -> str:
    """The page's run, with two steps of a stage and a narrow model."""
    (text,) = re.findall(r"^```yaml\n(name: my_arm\n.*?)^```$", (ROOT / "docs/your_robot.md").read_text(), re.S | re.M)
    text = re.sub(r"steps: \d+", "steps: 2", text)
    return re.sub(r"width: \d+, depth: 5", "width: 32, depth: 5", text)


@pytest.mark.slow
@pytest.mark.parametrize("with_urdf", [True, False])
def test_the_page_leads_from_a_bag_to_a_dataset_and_a_report(
    with_urdf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    write_bag(tmp_path / "BAG", recording(6.0))
    if with_urdf:
        Path("arm.urdf").write_text(urdf())
    Path("my_arm_run.yaml").write_text(run_file())
    ran = []
    # Training differs in nothing without a URDF.
    for module, *arguments in commands() if with_urdf else commands()[:5]:
        for option in ("--from", "--urdf"):
            if not with_urdf and "arm.urdf" in arguments:
                at = arguments.index("arm.urdf")
                if arguments[at - 1] == option:
                    arguments = arguments[: at - 1] + arguments[at + 1 :]
        if module == "training.train":  # a command that is no package
            module = "training.run"
        name = module if module == "training.run" else f"{module}.__main__"
        assert import_module(name).main(arguments) == 0, capsys.readouterr()
        ran.append((module, arguments[0]))
    assert (
        ran
        == [
            ("ki_vla_ros.robot", "new"),
            ("ki_vla_ros.robot", "check"),
            ("training.convert", "from-bag"),
            ("ki_vla_ros.robot", "check"),
            ("ki_vla_ros.doctor", "--bag"),
            ("training.data", "check"),
            ("training.run", "my_arm_run.yaml"),
            ("training.export", "--checkpoint"),
            ("ki_vla_ros.replay", "BAG"),
        ][: len(ran)]
    )
    if with_urdf:
        assert load_bundle(tmp_path / "out" / "my_arm").manifest.robot == read_robot(tmp_path / "my_arm.yaml")
    out = capsys.readouterr().out
    assert out.count("no faults found") == 3
    from training.data.lerobot import Dataset

    dataset, robot = Dataset(tmp_path / "my_dataset"), read_robot(tmp_path / "my_arm.yaml")
    (episode,) = dataset.episodes
    columns = dataset.columns(episode)
    assert len(columns["action"]) >= 6 * 20 - 4 and dataset.info.robot_type == robot.name
    time_N = (columns["stamp_ns"] - START_NS) / NS_PER_S
    was_NS = np.array([np.append(place(t), opening(t)) for t in time_N])
    np.testing.assert_allclose(columns["observation.state"], was_NS, atol=2e-3)
    then_ND = np.array([np.append(place(t), opening(t)) for t in time_N + 0.05])
    np.testing.assert_allclose(columns["action"][5:], then_ND[5:], atol=0.06)  # a controller is behind its commands
