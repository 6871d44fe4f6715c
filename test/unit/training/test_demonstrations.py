"""Datasets of scripted experts: whole, reproducible, in the robot file's units."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.slider import TARGET, Slider

from ki_vla_ros.errors import ConfigurationError, SimulationError
from training import demonstrations
from training.data.lerobot import Dataset, LeRobotSamples, read_robot_columns
from training.demonstrations import Recipe, action_scale, main, record_episode, write_demonstrations


@pytest.fixture
def slider(monkeypatch: pytest.MonkeyPatch) -> Slider:
    slider = Slider()
    robots = {"slide": slider, "other": Slider("droid")}
    monkeypatch.setattr(demonstrations, "open_environment", lambda name, **_: robots[name])
    demonstrations._opened.clear()
    return slider


def test_an_episode_ends_a_while_after_its_success(slider: Slider) -> None:
    periods = [len(record_episode(slider, "slide", 0, Recipe(linger_s=s)).state_NS) for s in (0.0, 0.5, 100.0)]
    per_s = 1.0 / slider.robot.action_period_s
    assert periods == [periods[0], periods[0] + round(0.5 * per_s), round(2.0 * per_s)]


def test_noise_is_executed_and_the_expert_is_recorded(slider: Slider) -> None:
    episode = record_episode(slider, "slide", 0, Recipe(noise=0.02, linger_s=100.0))
    wanted_ND, executed_ND = np.array(episode.action_ND), np.array(slider.executed)
    scale_D = action_scale(slider.robot)
    np.testing.assert_allclose(scale_D, [(a.span[1] - a.span[0]) / 2.0 for a in slider.robot.actions])
    # Pushes last, so a short episode says little: over all dimensions they are about as large as asked for.
    push = (executed_ND - wanted_ND) / scale_D
    assert 0.01 < np.sqrt(np.square(push).mean()) < 0.04
    assert np.corrcoef(push[:-1].ravel(), push[1:].ravel())[0, 1] > 0.7
    episode = record_episode(slider, "slide", 0, Recipe(noise=0.02, noise_hold_s=0.0, linger_s=100.0))
    push = np.array(slider.executed) - np.array(episode.action_ND)
    assert abs(np.corrcoef(push[:-1].ravel(), push[1:].ravel())[0, 1]) < 0.4, "another with each action"
    wanted_N = np.minimum(np.array(episode.state_NS)[:, 0] + 0.1, TARGET)
    np.testing.assert_allclose(np.array(episode.action_ND)[:, 0], wanted_N)


def test_failures_are_left_out_and_named_by_seed(
    slider: Slider, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["slide", "--episodes", "4", "--seed", "2", "--out", str(tmp_path / "d"), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "slide: 2 episodes" in out and "  seed 3: out of reach\n  seed 5: out of reach\n" in out
    dataset = Dataset(tmp_path / "d")
    assert len(dataset.episodes) == 2 and dataset.info.robot_type == slider.robot.name
    columns = dataset.columns(dataset.episodes[1])
    assert set(dataset.task_of(columns)) == {"slide"}
    state_NS, action_ND = read_robot_columns(dataset, slider.robot, columns)
    expected = record_episode(slider, "slide", 4, Recipe())
    np.testing.assert_allclose(state_NS, np.array(expected.state_NS), atol=1e-5)
    np.testing.assert_allclose(action_ND, np.array(expected.action_ND), atol=1e-5)
    # For hints, where the last image shows what the task is about.
    np.testing.assert_allclose(columns["hint.place"], [(0.5 + state_S[0], 0.25) for state_S in state_NS], atol=1e-5)
    samples = LeRobotSamples(dataset, slider.robot, image_size=32)
    (sample,) = samples.take([len(samples) - 1])
    assert sample.labels.place is not None and sample.labels.place[0] == pytest.approx(0.5 + TARGET, abs=0.11)


def test_nothing_is_left_where_no_episode_succeeds_or_robots_differ(slider: Slider, tmp_path: Path) -> None:
    with pytest.raises(
        SimulationError, match=r"slide: expected an episode that its expert solves, got none in 1 \(seed 1"
    ):
        write_demonstrations(["slide"], [1], Recipe(), tmp_path / "d", workers=1)
    with pytest.raises(
        ConfigurationError, match="environment other: expected the robot of slide, so101_follower, got droid"
    ):
        write_demonstrations(["slide", "other"], [0], Recipe(), tmp_path / "d", workers=1)
    # Even if there were episodes before.
    slider.patience = 10
    with pytest.raises(KeyboardInterrupt):
        write_demonstrations(["slide"], [0, 2, 4], Recipe(linger_s=0.0), tmp_path / "d", workers=1)
    assert list(tmp_path.iterdir()) == [] and demonstrations._opened == {}, "all are closed before the interpreter ends"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--episodes", "0"), "--episodes: expected 1 to 1000000, got 0"),
        (("--seed", "999999"), "--seed: expected 0 to 999998, got 999999"),
        (("--noise", "1.5"), "--noise: expected 0.0 to 1.0, got 1.5"),
        (("--noise-hold", "-1"), "--noise-hold: expected 0.0 to 60.0, got -1.0"),
        (("--noise", "nan"), "--noise: expected 0.0 to 1.0, got nan"),
        (("--image-size", "0"), "--image-size: expected 16 to 1280, got 0"),
        (("--workers", "0"), "--workers: expected 1 to 256, got 0"),
    ],
)
def test_impossible_options_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], fault: str
) -> None:
    assert main(["arm", "--episodes", "2", "--out", str(tmp_path / "d"), *arguments]) == 2
    assert fault in capsys.readouterr().err


@pytest.mark.slow
def test_two_workers_write_what_one_writes(tmp_path: Path) -> None:
    recipe = Recipe(image_size=32, cameras=("scene",), noise=0.003, linger_s=0.0)
    written = []
    for workers in (1, 2):
        write_demonstrations(["arm"], [3, 4], recipe, tmp_path / "d", workers)
        paths = sorted(path for path in (tmp_path / "d").rglob("*") if path.is_file())
        written.append({path.relative_to(tmp_path): path.read_bytes() for path in paths})
        (tmp_path / "d").rename(tmp_path / f"d{workers}")
    assert written[0] == written[1] and len(written[0]) >= 6
