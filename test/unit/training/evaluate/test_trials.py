"""A protocol's episodes: kept one by one, gone on with, refused for anything else, filmed where they fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from support import ROOT
from support.slider import Slider

from ki_vla_ros.errors import ConfigurationError
from training.evaluate import trials
from training.evaluate.drivers import Chosen, ExpertDriver
from training.evaluate.protocol import Protocol, find_protocol, read_protocol
from training.evaluate.trials import Films, run_protocol
from training.storage import only_writer

EXPERT = Chosen()
DEMO = str(ROOT / "models" / "demo")
Episodes = list[tuple[str, int]]


class Sliders(Slider):
    """Its expert goes the wrong way from odd seeds."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def demonstrate(self) -> np.ndarray:
        action_D = self.place_D.copy()
        action_D[0] += -0.1 if self.seed % 2 else 0.1
        return action_D


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[Episodes]:
    """Every episode that is begun."""
    begun: Episodes = []
    run = trials.run_episode

    def note(act: Any, environment: Any, seed: int, *more: Any) -> Any:
        begun.append((environment.name, seed))
        return run(act, environment, seed, *more)

    monkeypatch.setattr(trials, "open_environment", lambda name, **_: Sliders(name))
    monkeypatch.setattr(trials, "run_episode", note)
    yield begun
    assert trials._Worker.driver is None and trials._Worker.environment is None, "nothing is left open"


def foretell(driver: ExpertDriver, environment: Any, name: str) -> Any:
    """Chunks of eight actions, of which one is executed."""

    def act(*_: Any) -> np.ndarray:
        step_D = environment.demonstrate() - environment.place_D
        return environment.place_D + np.arange(1, 9)[:, None] * step_D

    return act, environment


def slides(**fields: Any) -> Protocol:
    given = {"name": "slides", "tasks": {"near": ("a", "b"), "far": ("c",)}, "trials": 4, "first_seed": 10}
    return Protocol.model_validate(given | fields)


def outcomes(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())["outcomes"]
    return found


def test_a_group_counts_once_however_many_tasks_it_has(begun: Episodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sliders, "success", property(lambda self: self.name == "c" and len(self.executed) > 2))
    found = run_protocol(slides(), EXPERT)
    assert (found["successes"], found["episodes"], found["complete"]) == (4, 12, True)
    assert [found["groups"][group]["success_rate"] for group in ("near", "far")] == [0.0, 1.0]
    assert found["mean_of_groups"] == 0.5 and found["success_rate"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["environments"]["a"]["failed_seeds"] == [10, 11, 12, 13]
    assert begun == [(task, seed) for task in "abc" for seed in range(10, 14)]


def test_an_episode_has_no_more_steps_than_the_protocol_says(begun: Episodes) -> None:
    seconds = run_protocol(slides(), EXPERT)["environments"]["a"]["mean_seconds"]
    needed = round(seconds / Slider().robot.action_period_s)
    assert needed > 2
    assert run_protocol(slides(steps=needed + 2), EXPERT)["successes"] == 6
    assert run_protocol(slides(steps=needed - 2), EXPERT)["successes"] == 0


def test_what_is_over_is_kept_and_not_run_again(
    begun: Episodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.json", tmp_path / "figures.json"
    expected = run_protocol(slides(), EXPERT, whole)
    every = begun.copy()
    begun.clear()
    run = trials.run_episode

    def stop(*given: Any) -> Any:
        if len(begun) == 5:
            raise KeyboardInterrupt
        return run(*given)

    with monkeypatch.context() as patched:
        patched.setattr(trials, "run_episode", stop)
        with pytest.raises(KeyboardInterrupt):
            run_protocol(slides(), EXPERT, out)
    partly = json.loads(out.read_text())
    assert (partly["episodes"], partly["complete"], partly["mean_of_groups"]) == (5, False, None)
    assert run_protocol(slides(), EXPERT, out) == expected
    assert begun == every and out.read_text() == whole.read_text()
    begun.clear()
    assert run_protocol(slides(), EXPERT, out) == expected and begun == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "whole.json"]


def test_the_first_trials_of_each_task_may_be_run_before_the_others(begun: Episodes, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    first = run_protocol(slides(), EXPERT, out, now=1)
    assert begun == [("a", 10), ("b", 10), ("c", 10)] and (first["episodes"], first["complete"]) == (3, False)
    assert run_protocol(slides(), EXPERT, out, now=1) == first and len(begun) == 3
    assert run_protocol(slides(), EXPERT, out) == run_protocol(slides(), EXPERT)
    assert begun[3:12] == [(task, seed) for task in "abc" for seed in (11, 12, 13)]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"protocol": slides(trials=5)}, "protocol.trials: expected 5, got 4"),
        ({"protocol": slides(tasks={"near": ("a",)})}, "protocol.tasks: expected {'near': \\['a'\\]}, got "),
        ({"chosen": Chosen(bundle=Path(DEMO))}, "policy.bundle: expected 'demo', got None; policy.flow_steps"),
        ({"versions": {"mujoco": "3.3.0"}}, "package.mujoco: expected '3.3.0', got None"),
    ],
)
def test_a_file_of_another_protocol_policy_or_simulator_is_refused(
    other: dict[str, Any], said: str, begun: Episodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "figures.json"
    run_protocol(slides(), EXPERT, out)
    before = out.read_bytes()
    monkeypatch.setattr(trials, "versions", lambda names: other.get("versions", {}))
    with pytest.raises(ConfigurationError, match=f"figures.json: expected a run of this configuration, .*{said}"):
        run_protocol(other.get("protocol", slides()), other.get("chosen", EXPERT), out)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value"), [("10", 2), ("10", "done"), ("10", True), ("99", 1.0), ("task", {}), ("all", [])]
)
def test_outcomes_that_cannot_be_are_refused(
    key: str, value: Any, begun: Episodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "figures.json"
    run_protocol(slides(), EXPERT, out)
    content = json.loads(out.read_text())
    if key == "all":
        content["outcomes"] = value
    elif key == "task":
        content["outcomes"][key] = value
    else:
        content["outcomes"]["a"][key] = value
    out.write_text(json.dumps(content))
    if value == 2:  # a whole number of seconds
        assert run_protocol(slides(), EXPERT, out)["complete"]
        return
    with pytest.raises(ConfigurationError, match="expected outcomes of the protocol's tasks and seeds, got something"):
        run_protocol(slides(), EXPERT, out)


def test_two_who_write_one_file_are_told(begun: Episodes, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    with (
        only_writer(out),
        pytest.raises(ConfigurationError, match="expected to be the only one who writes it, got ano"),
    ):
        run_protocol(slides(), EXPERT, out)
    assert run_protocol(slides(), EXPERT, out)["complete"]


def test_failures_are_filmed_first_with_what_the_chunk_foretold(
    begun: Episodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slider, "time_limit_s", 1.0)
    monkeypatch.setattr(ExpertDriver, "meet", foretell)
    films = Films(tmp_path / "films", 3)
    run_protocol(slides(tasks={"all": ("x/y",)}), EXPERT, None, 1, films)
    names = sorted(path.name for path in films.folder.glob("*.mp4"))
    assert names == ["x_y_10_success.mp4", "x_y_11_failed.mp4", "x_y_13_failed.mp4"]
    (films.folder / names[1]).unlink()
    begun.clear()
    run_protocol(slides(tasks={"all": ("x/y",)}), EXPERT, None, 1, films)
    assert begun[4:] == [("x/y", 11)], "what is there is not filmed again"
    with av.open(str(films.folder / names[1])) as container:
        pictures = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
        seconds = len(pictures) / float(container.streams.video[0].average_rate)
    assert abs(seconds - Slider.time_limit_s) < 0.1
    images = [picture[76:316] for picture in pictures]
    assert pictures[0][:28].max() > 150, "the instruction"
    assert images[0].mean() > images[-1].mean() + 20.0, "it goes the wrong way"
    plots = [picture[316:] for picture in pictures]
    orange = [int(((plot[..., 0] - plot[..., 2]) > 60).sum()) for plot in plots[:-1]]
    assert min(orange) > 0, "what the chunk has is drawn in each picture"
    assert int((plots[8].min(axis=2) > 180).sum()) > int((plots[1].min(axis=2) > 180).sum()), "and what was executed"


def test_films_of_another_policy_are_not_taken_for_this_ones(
    begun: Episodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    films = Films(tmp_path / "films", 1)
    run_protocol(slides(), EXPERT, None, 1, films)
    more = slides(tasks={"all": ("c", "d")}, trials=2)  # each film is of the same start, and ends as late
    run_protocol(more, EXPERT, None, 1, films)
    assert sorted(path.stem[0] for path in films.folder.glob("*.mp4")) == ["a", "b", "c", "d"]
    begun.clear()
    with pytest.raises(ConfigurationError, match=r"films\.json: expected a run of .*protocol\.steps: expected 9, got"):
        run_protocol(slides(steps=9), EXPERT, None, 1, films)
    other = pytest.raises(ConfigurationError, match=r"films\.json: expected .*policy\.policy: expected 'another', got")
    with monkeypatch.context() as patched, other:
        patched.setattr(ExpertDriver, "__init__", lambda self: setattr(self, "told", {"policy": "another"}))
        run_protocol(slides(), EXPERT, None, 1, films)
    (films.folder / "films.json").unlink()
    with pytest.raises(ConfigurationError, match=r"_failed.mp4: expected films.json beside films, which says whose th"):
        run_protocol(slides(), EXPERT, None, 1, films)
    assert begun == []


def test_an_episode_without_a_chunk_is_filmed_too(
    begun: Episodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sliders, "demonstrate", lambda self: self.place_D * np.nan)
    found = run_protocol(slides(tasks={"all": ("a",)}), EXPERT, None, 1, Films(tmp_path, 1))
    assert (found["successes"], found["environments"]["a"]["malformed"]) == (0, 4)
    assert [path.name for path in tmp_path.glob("*.mp4")] == ["a_10_malformed.mp4"]


def test_films_that_cannot_be_are_found_before_the_first_episode(begun: Episodes, tmp_path: Path) -> None:
    (tmp_path / "films").write_text("a file")
    with pytest.raises(FileExistsError):
        run_protocol(slides(), EXPERT, None, 1, Films(tmp_path / "films", 3))
    assert begun == []


def test_a_policy_that_does_not_do_the_same_twice_is_told(
    begun: Episodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Sliders, "demonstrate", lambda self: self.place_D + (0.1 if len(begun) > 4 else -0.1))
    films = Films(tmp_path, 1)
    assert run_protocol(slides(tasks={"all": ("a",)}), EXPERT, None, 1, films)["successes"] == 0
    assert [path.name for path in tmp_path.glob("*.mp4")] == ["a_10_success.mp4"]
    assert "a_10_success.mp4: it had ended otherwise (failed) when it was counted" in capsys.readouterr().err


def test_a_protocol_is_a_file_that_names_sets_of_tasks(tmp_path: Path) -> None:
    found = read_protocol(find_protocol("metaworld_mt50"))
    assert {group: len(tasks) for group, tasks in found.tasks.items()} == {
        "easy": 28,
        "medium": 11,
        "hard": 6,
        "very_hard": 5,
    }
    assert len(set(found.environments)) == 50 and (found.trials, found.steps) == (10, 500)
    for wrong, said in (
        ("tasks: {all: [metaworld/easy, metaworld/reach-v3]}", "tasks: expected each once, got metaworld/reach-v3 mor"),
        ("tasks: {all: [metaworld/mt51]}", "tasks: environment metaworld/mt51: expected a task such as"),
        ("tasks: {}", "tasks"),
        ("tasks: {all: [arm]}\ntrails: 3", "trails"),
        ("tasks: {all: [arm]}\nsteps: 0", "steps"),
    ):
        path = tmp_path / "p.yaml"
        path.write_text(f"name: p\n{wrong}\n")
        with pytest.raises(ConfigurationError, match=f"protocol {path}.*{said}"):
            read_protocol(path)
