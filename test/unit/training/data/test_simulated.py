"""The demo's data are in everybody's formats, say what the simulator knows, and appear whole or not at all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from support.demo_data import Inline, write_demo_data

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot import find_robot, read_robot
from ki_vla_ros.sim import World
from ki_vla_ros.sim.task import HELD_OUT
from training.data.lerobot import Dataset
from training.data.simulated import folder as module
from training.data.simulated import generate
from training.data.simulated.__main__ import main
from training.data.simulated.folder import Settings, make_folder
from training.data.simulated.generate import BACKGROUND, RENDER_SIZE, Sizes, record_episode
from training.data.simulated.questions import COMBINATIONS

SETTINGS = Settings(
    robot_episodes=2,
    frames=3,
    scenes=3,
    questions=5,
    validation=1,
    seed=0,
    robot="demo_arm",
    sizes=Sizes(image_size=48, grid=6, horizon=5, period_s=0.05),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simulated") / "data"
    with pytest.MonkeyPatch.context() as patch:  # processes of their own take seconds to start
        patch.setattr(module, "ProcessPoolExecutor", Inline)
        make_folder(out, SETTINGS, read_robot(find_robot("demo_arm")), workers=1)
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_robot_frames_are_a_lerobot_dataset_with_a_chunk_for_each(data: Path) -> None:
    dataset = Dataset(data / "robot")
    assert (dataset.info.codebase_version, dataset.info.fps, dataset.info.total_frames) == ("v3.0", 20, 6)
    assert dataset.cameras == ("wrist", "scene") and dataset.info.features["action_chunk"].shape == (5, 7)
    assert json.loads((data / "robot/meta/ki_vla_ros.json").read_text())["consecutive"] is False
    assert "not consecutive" in (data / "robot/README.md").read_text()
    table = pq.read_table(data / "robot/data/chunk-000/file-000.parquet")
    world = World(render_size=RENDER_SIZE)
    for seed, episode in enumerate(dataset.episodes):
        truth = record_episode(world, seed, "train", 3, SETTINGS.sizes)
        assert truth is not None
        columns = dataset.columns(episode)
        np.testing.assert_array_equal(columns["observation.state"], truth.state_FJ)
        np.testing.assert_array_equal(columns["action"], truth.chunk_FHJ[:, 0])
        rows = table.slice(3 * seed, 3)
        np.testing.assert_array_equal(np.array(rows["action_chunk"].to_pylist(), np.float32), truth.chunk_FHJ)
        np.testing.assert_array_equal(columns["hint.place"], truth.place_F2)
        for view, camera in enumerate(("wrist", "scene")):
            images = np.stack(list(dataset.images(episode, camera)))
            np.testing.assert_array_equal(images, truth.images_FVSSC[:, view])
        assert dataset.task_of(columns) == [truth.task] * 3


def test_figures_of_the_dataset_are_those_of_its_columns(data: Path) -> None:
    stats = json.loads((data / "robot/meta/stats.json").read_text())
    dataset = Dataset(data / "robot")
    state = np.concatenate([dataset.columns(episode)["observation.state"] for episode in dataset.episodes])
    np.testing.assert_allclose(stats["observation.state"]["mean"], state.mean(axis=0, dtype=float))
    assert np.shape(stats["action_chunk"]["q99"]) == (5, 7)
    images = np.stack([i for e in dataset.episodes for i in dataset.images(e, "scene")]) / 255
    np.testing.assert_allclose(np.ravel(stats["observation.images.scene"]["mean"]), images.mean(axis=(0, 1, 2)))


def test_held_out_combinations_are_commanded_in_validation_alone(data: Path) -> None:
    for source, held_out in (("robot", False), ("validation", True)):
        for task in Dataset(data / source).tasks.values():
            assert (tuple(task.split()[-2:]) in HELD_OUT) == held_out


def test_a_split_without_the_novel_colour_commands_and_shows_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr(module, "World", lambda **_: None)
    monkeypatch.setattr(module, "record_episode", lambda _, seed, split, *__: asked.append((seed, split)))
    for source in ("robot", "validation"):
        module._record_many((source, [1], replace(SETTINGS, split="known")))
        module._record_many((source, [2], SETTINGS))
    assert asked == [(1, "known"), (2, "train"), (1, "recombined"), (2, "held_out")]


def test_questions_are_paligemmas_lines_and_have_the_place_of_what_they_ask(data: Path) -> None:
    rows = lines(data / "scenes.jsonl")
    assert len(rows) == 15 and all(row["image"].endswith("_scene.png") for row in rows)
    assert cv2.imread(str(data / rows[0]["image"])).shape == (48, 48, 3)
    where = [row for row in rows if row["prefix"].startswith("Question: where is the")]
    assert where and all(row["prefix"].endswith(" ?\nAnswer:") for row in where)
    for row in where:
        u, v = row["place"]
        assert row["suffix"] == f"<loc{int(v * 1024):04d}><loc{int(u * 1024):04d}>"


def test_views_say_what_each_cell_shows(data: Path) -> None:
    """A red ball that a question places is in the cells of the scene camera's image, at that place."""
    views = {row["image"]: np.array(row["cells"]) for row in lines(data / "views.jsonl")}
    assert len(views) == 6 and all(cells.shape == (1, 36) and cells.max() == BACKGROUND for cells in views.values())
    found = 0
    for row in lines(data / "scenes.jsonl"):
        if row["prefix"].startswith("Question: where is the"):
            kind = COMBINATIONS.index(tuple(row["prefix"].split("the ")[1].split()[:2]))
            u, v = row["place"]
            near = views[row["image"]].reshape(6, 6)[max(0, int(v * 6) - 1) :, max(0, int(u * 6) - 1) :][:3, :3]
            found += kind in near
    assert found >= 3


def test_the_same_settings_make_nothing_anew_and_others_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, make = tmp_path / "data", write_demo_data
    small = replace(SETTINGS, robot_episodes=1, frames=1, scenes=1, questions=1)
    first = make(out, small)
    meta = json.loads((out / "meta.json").read_text())
    del meta["settings"]["split"]
    (out / "meta.json").write_text(json.dumps(meta))  # as versions before there were splits wrote it
    left = out / "robot/left by an earlier version"
    left.touch()
    assert make(out, small) == meta and left.exists()
    second = make(out, replace(small, seed=1))
    assert second["fingerprint"] != first["fingerprint"] and not left.exists()
    assert make(out, small)["fingerprint"] == first["fingerprint"], "the same data again"

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Maker, "episodes", fail)
    with pytest.raises(KeyboardInterrupt):
        make(out, replace(small, seed=2))
    assert json.loads((out / "meta.json").read_text()) == first, "whole, as it was"
    assert module.fingerprint(out) == first["fingerprint"]


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("thesis")
    assert main([str(tmp_path)]) == 2
    assert "expected a new folder, or one with such data" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "thesis"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--grid", "7"], "--grid: expected a divisor of 288, got 7"),
        (["--image-size", "300"], "--image-size: expected at most 288, as the cameras have, got 300"),
        (["--robot", "so101"], "cameras: expected wrist, scene"),
    ],
)
def test_what_the_simulator_cannot_make_is_refused(
    arguments: list[str], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "data"), *arguments]) == 2
    assert fault in capsys.readouterr().err


def test_an_episode_without_a_free_position_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(generate, "_is_free", lambda *_: tried.append(1))
    assert record_episode(World(render_size=32), 0, "train", 3, SETTINGS.sizes) is None
    assert len(tried) == generate.MOST_TRIES


def test_a_damaged_meta_is_named(tmp_path: Path) -> None:
    for content in (
        '{"settings": {',
        "[]",
        '{"settings": {}}',
        "\udcff".encode(errors="surrogateescape").decode("latin"),
    ):
        (tmp_path / "meta.json").write_text(content, encoding="latin")
        with pytest.raises(ConfigurationError, match=r"meta\.json: expected settings, counts .*delete the folder"):
            write_demo_data(tmp_path)
