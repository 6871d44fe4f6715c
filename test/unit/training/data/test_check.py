"""`python -m training.data check`: everything is counted, and what is broken is named with file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from support.foreign_datasets import ACTION, STATE, Camera, Column, Shape, build
from support.language_files import picture, png, write_lines, write_parquet, write_pictures
from support.recipes import tiny_run

from training.check import check_language
from training.data.__main__ import main
from training.data.language import PaliGemmaEntry, open_language

BOX = "<loc0256><loc0512><loc0768><loc1023> mug"
GOOD = {"image": "a.png", "prefix": "detect mug", "suffix": BOX}


def told(capsys: pytest.CaptureFixture[str], code: int, *arguments: Any) -> str:
    """What the command prints, if it ends with this code."""
    assert main(["check", *map(str, arguments)]) == code
    return "".join(capsys.readouterr())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path, {"a.png": picture(48, 48)})
    return tmp_path


def test_what_is_whole_is_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = write_lines(folder / "boxes.jsonl", [GOOD, {**GOOD, "suffix": "a mug"}])
    talks = write_lines(
        folder / "talks.json",
        [
            {"image": "a.png", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Mug"}]},
            {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
        ],
    )
    table = write_parquet(folder / "p" / "train.parquet", {"image": [png(picture(9, 9))] * 3, "text": ["a", "b", "c"]})
    said = told(capsys, 0, lines, talks, table.parent)
    assert f"{lines}: 2 samples, 2 images, 1 places, 3 words; nothing broken" in said
    assert f"{talks}: 1 samples, 1 images, 0 places, 2 words; nothing broken" in said
    assert f"1 rows without an image left out (text_only: leave out), the first: {talks}: line 2" in said
    assert f"{table.parent}: 3 samples, 3 images, 0 places, 5 words; nothing broken" in said
    assert "columns: image: image, caption: text" in said


def test_what_is_broken_is_named_and_the_rest_is_looked_at(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = [{**GOOD, "image": "no.png"}, GOOD, "{", {**GOOD, "suffix": ""}] + [
        {**GOOD, "place": [2, 0]}
    ] * 30
    lines = write_lines(folder / "x.jsonl", rows)
    said = told(capsys, 1, lines)
    assert f"{lines}: 34 samples, 1 images, 1 places, 2 words; 33 broken" in said
    for line, fault in (
        (1, "no such file"),
        (3, "expected a JSON object"),
        (4, "an empty one"),
        (5, "place: expected"),
    ):
        assert f"{lines}: line {line}: " in said and fault in said
    assert "and 13 more (--all)" in said and f"{lines}: line 34: " not in said
    assert f"{lines}: line 34: place" in told(capsys, 1, lines, "--all")


def test_what_cannot_be_opened_is_named_and_the_others_are_checked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write_lines(folder / "x.jsonl", [GOOD])
    (folder / "x.txt").write_text("x")
    said = told(capsys, 2, folder / "y.jsonl", folder / "x.txt", folder, lines)
    assert f"{folder / 'y.jsonl'}: expected a file with one JSON object a line, found none" in said
    assert (
        f"{folder / 'x.txt'}: expected .json, .jsonl, .parquet, a LeRobot dataset or a training configuration" in said
    )
    assert f"{folder}: expected a parquet file, or a folder of them, found none" in said
    assert f"{lines}: 1 samples" in said


JOINT = {"kind": "joint_position", "unit": "rad", "lower": -9.0, "upper": 9.0}


def robot_file(path: Path, **changes: Any) -> Path:
    """Of a robot with three joints and a camera; `changes` to the second joint's action."""
    joints = [{"name": f"j{i}", **JOINT} for i in range(3)]
    actions: list[dict[str, Any]] = [{**joint, "max_velocity": 1.0, "output": "arm"} for joint in joints]
    actions[1] |= changes
    content = {
        "name": "some",
        "cameras": [{"name": "front"}],
        "state": joints,
        "actions": actions,
        "outputs": [{"name": "arm", "topic": "arm/commands", "type": "std_msgs/msg/Float64MultiArray"}],
        "action_period_s": 0.1,
        "horizon": 4,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def recorded(folder: Path) -> Path:
    columns = [Column(key, [f"j{i}" for i in range(3)], 3) for key in (STATE, ACTION)]
    camera = Camera("observation.images.front", "png")
    return build(
        folder, Shape("v3.0", columns, [camera], fps=10, lengths={0: 5, 1: 4}, tasks=("fold it", "put it down"))
    )


def test_frames_of_a_robot_and_its_ranges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = recorded(tmp_path / "dataset")
    said = told(capsys, 0, dataset, "--robot", robot_file(tmp_path / "robot.yaml"))
    assert f"{dataset}: 9 samples, 2 episodes, 2 tasks, 9 images, 4 words; nothing broken" in said
    assert "action j1: " in said and " rad, limits -9 to 9" in said


@pytest.mark.parametrize(
    ("changes", "code", "fault"),
    [
        ({"lower": -1.0, "upper": 1.0}, 1, r"limits -1 to 1: 7 of 9 frames are outside; correct the limits or the"),
        ({"dataset": {"name": "elbow"}}, 2, "elbow"),
    ],
)
def test_numbers_that_do_not_fit_the_robot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], code: int, fault: str
) -> None:
    dataset = recorded(tmp_path / "dataset")
    assert fault in told(capsys, code, dataset, "--robot", robot_file(tmp_path / "robot.yaml", **changes))


def test_a_dataset_without_its_robot_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = recorded(tmp_path / "dataset")
    assert f"{dataset}: expected --robot with the robot file" in told(capsys, 2, dataset)


def test_frames_that_are_broken_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = recorded(tmp_path / "dataset")
    file = next(dataset.glob("data/**/*.parquet"))
    table = pq.read_table(file)
    images = table["observation.images.front"].to_pylist()
    images[6]["bytes"] = images[6]["bytes"][:100]
    number = table.column_names.index("observation.images.front")
    pq.write_table(table.set_column(number, "observation.images.front", [images]), file)
    said = told(capsys, 1, dataset, "--robot", robot_file(tmp_path / "robot.yaml"))
    assert "8 images, 4 words; 1 broken" in said and "episode 1, frame " in said and "damaged" in said


def test_the_data_of_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each data set as the run opens it, with what the configuration says of it; those that fail are named."""
    write_pictures(tmp_path / "pictures", {"a.png": picture(48, 48)})
    lines = write_lines(tmp_path / "boxes.jsonl", [{"image": "a.png", "suffix": "a mug"}] * 4)
    entry = {"paligemma": str(lines), "images": str(tmp_path / "pictures"), "prefix": "caption en"}
    run = tiny_run(tmp_path, 1) | {
        "robot": str(robot_file(tmp_path / "robot.yaml")),
        "sources": {
            "views": [{"paligemma": str(tmp_path / "none.jsonl")}],
            "scenes": [entry],
            "robot": [{"lerobot": str(recorded(tmp_path / "dataset")), "episodes": [1, None]}],
        },
        "held_out": {"scenes": [entry]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    said = told(capsys, 2, tmp_path / "run.yaml")
    assert said.count(f"{lines}: 4 samples, 4 images, 0 places, 4 words; nothing broken") == 2
    assert f"{tmp_path / 'dataset'}: 4 samples, 1 episodes" in said
    assert f"run.yaml: views: {tmp_path / 'none.jsonl'}: expected a file" in said
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run | {"sources": {}}))
    assert "run.yaml" in told(capsys, 2, tmp_path / "run.yaml")


def test_progress_is_told(folder: Path) -> None:
    shares: list[float] = []
    data = open_language(PaliGemmaEntry(paligemma=write_lines(folder / "x.jsonl", [GOOD] * 4)), 32)
    check_language(data, lambda _, share: shares.append(share))
    assert shares == [0.0, 0.25, 0.5, 0.75]
