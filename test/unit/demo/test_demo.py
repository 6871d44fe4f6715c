"""The demo before its processes start: which options it takes and refuses, and an episode with a scripted driver."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.bundles import write_test_bundle
from support.demo_runs import episode, observed, tick

from ki_vla_ros.demo import __main__ as demo
from ki_vla_ros.demo.driver import Observed
from ki_vla_ros.demo.report import EpisodeResult
from ki_vla_ros.errors import ConfigurationError, InstructionError, KiVlaError, SimulationError
from ki_vla_ros.share import find_share
from ki_vla_ros.sim.task import sample_scene

# --- one episode, against a driver that answers from a script


class ScriptedDriver:
    def __init__(self, *, statuses: list[dict[str, Any]], seen: Observed) -> None:
        self.calls: list[Any] = []
        self.observed = seen
        self._statuses: Iterator[dict[str, Any]] = iter(statuses)
        self._status = {"done": False}

    @property
    def status(self) -> dict[str, Any]:
        self._status = next(self._statuses, self._status)
        return self._status

    def reset(self, *scene: Any) -> dict[str, Any]:
        self.calls.append(scene)
        return {"instruction": "touch the red cube"}

    def instruct(self, instruction: str) -> None:
        self.calls.append(instruction)

    def activate(self) -> None:
        self.calls.append("activate")

    def deactivate(self) -> Observed:
        self.calls.append("deactivate")
        return self.observed

    def sleep(self, _duration_s: float) -> None:
        pass


VERDICT = {
    "done": True,
    "success": True,
    "reached": 1,
    "target": 1,
    "time_s": 3.25,
    "objects": [{"colour": "red", "shape": "ball"}, {"colour": "red", "shape": "cube"}],
}
TOLD = observed(10.0, tick(9.0, instruction="touch the red cube"))


def options(**fields: Any) -> demo.DemoOptions:
    whole = demo.DemoOptions(3, "", 2, "held_out", Path("bundle"), Path("out"), Path("params"), False)
    return replace(whole, **fields)


def run_scripted(driver: ScriptedDriver) -> tuple[EpisodeResult, Observed]:
    return demo.run_episode(driver, options(), 5, demo.StatusLine(3))  # type: ignore[arg-type]


def test_an_episode_goes_from_reset_to_verdict() -> None:
    driver = ScriptedDriver(statuses=[{"done": False}, VERDICT], seen=TOLD)
    result, seen = run_scripted(driver)
    assert driver.calls == [(5, "held_out", ""), "touch the red cube", "activate", "deactivate"]
    assert result == EpisodeResult(5, "touch the red cube", 2, "red cube", True, True, 3.25)
    assert seen is TOLD


@pytest.mark.parametrize(
    ("verdict", "reached", "followed"), [({"reached": 0}, "red ball", False), ({"reached": None}, None, False)]
)
def test_reaching_another_object_or_none_is_not_following(
    verdict: dict[str, Any], reached: str | None, followed: bool
) -> None:
    driver = ScriptedDriver(statuses=[{**VERDICT, **verdict, "success": False}], seen=TOLD)
    result, _ = run_scripted(driver)
    assert (result.reached, result.followed, result.success) == (reached, followed, False)


def test_a_policy_that_publishes_nothing_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "FIRST_CHUNK_LIMIT_S", 0.0)
    holding = {**tick(1.0, chunk_index=None), "hold": "camera 'wrist': no image yet"}
    with pytest.raises(KiVlaError, match="no chunk within 0 s: camera 'wrist': no image yet"):
        run_scripted(ScriptedDriver(statuses=[], seen=Observed(ticks=[holding])))
    with pytest.raises(KiVlaError, match="it makes no ticks"):
        run_scripted(ScriptedDriver(statuses=[], seen=Observed()))


def test_an_endless_episode_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "EPISODE_LIMIT_S", 0.0)
    with pytest.raises(KiVlaError, match="no verdict within 0 s"):
        run_scripted(ScriptedDriver(statuses=[], seen=TOLD))


def test_acting_on_another_instruction_is_an_error() -> None:
    seen = observed(10.0, tick(9.0, instruction="touch the blue cube"))
    with pytest.raises(KiVlaError, match=r"told 'touch the red cube', but acted on \['touch the blue cube'\]"):
        run_scripted(ScriptedDriver(statuses=[VERDICT], seen=seen))


def test_without_a_terminal_each_episode_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = demo.StatusLine(12)
    line.update("touch the red cube", TOLD)
    line.finish(episode())
    line.finish(episode(success=False, reached="red ball"))
    line.finish(episode(success=False, reached=None))
    printed = capsys.readouterr().out
    assert "\r" not in printed
    first, second, third = printed.splitlines()
    assert first.startswith("[ 1/12] touch the red disc")
    assert "10.0 Hz, tick 9/9 ms p50/p99 | success 1/1 | success" in first
    assert second.endswith("success 1/2 | reached red ball")
    assert third.endswith("success 1/3 | time is up")


def test_on_a_terminal_the_line_renews_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    line = demo.StatusLine(3)
    line.update("touch the red cube", TOLD)
    printed = capsys.readouterr().out
    assert printed.startswith("\r\x1b[K[1/3] touch the red cube")
    assert not printed.endswith("\n")


def test_the_scripted_expert_is_judged_on_the_same_scenes() -> None:
    assert demo.run_demonstrator(options(episodes=3)) == [True, True, True]
    assert demo.run_demonstrator(options(episodes=1, split="all", instruction="point at the blue cube")) == [True]


# --- what a user gives


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_test_bundle(tmp_path_factory.mktemp("bundle") / "random").path


def test_defaults_ask_for_held_out_combinations_and_an_instruction_for_all(bundle: Path) -> None:
    chosen = demo.parse_options(["--bundle", str(bundle), "--no-video"])
    assert (chosen.episodes, chosen.split, chosen.video, chosen.out) == (20, "held_out", False, Path("out/demo"))
    assert chosen.params == find_share("config/demo.yaml")
    chosen = demo.parse_options(["--bundle", str(bundle), "--instruction", "Touch  the blue ball", "--seed", "2"])
    assert (chosen.instruction, chosen.split) == ("touch the blue ball", "all")
    assert not set(chosen.seeds) & set(replace(chosen, seed=3, episodes=1000).seeds)


def test_any_32_bit_seed_has_its_own_scenes(bundle: Path) -> None:
    most = demo.parse_options(["--bundle", str(bundle), "--no-video", "--seed", str(2**32 - 1)]).seeds
    assert (most[0], most[-1]) == (429_496_729_500_000, 429_496_729_500_019)
    # As in every run so far: figures in docs/results name scenes by their seeds.
    usual = demo.parse_options(["--bundle", str(bundle), "--no-video", "--seed", "21473"]).seeds
    assert usual[0] == 2_147_300_000
    assert len({sample_scene(seed, split="held_out").objects for seed in (*most, *usual)}) == 40


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["--instruction", "sing"], InstructionError, "'sing'.*touch the red cube"),
        (
            ["--instruction", "touch the red disc", "--split", "train"],
            SimulationError,
            "never commanded.*use split 'all'",
        ),
        (["--episodes", "0"], ConfigurationError, "--episodes 0: expected 1 to"),
        (["--seed", "-1"], ConfigurationError, "--seed -1: expected 0 to 4294967295"),
        (["--seed", str(2**32)], ConfigurationError, "--seed 4294967296: expected 0 to 4294967295"),
        (["--params", "nowhere.yaml"], ConfigurationError, "--params nowhere.yaml: no such file"),
        (["--bundle", "nosuchbundle"], ConfigurationError, "nosuchbundle"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(
    bundle: Path, arguments: list[str], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        demo.parse_options(["--bundle", str(bundle), "--no-video", *arguments])


def test_a_film_without_its_encoder_is_refused_before_anything_starts(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigurationError, match="--no-video"):
        demo.parse_options(["--bundle", str(bundle)])


def test_an_earlier_run_is_cleared_but_nothing_else(tmp_path: Path) -> None:
    bag = tmp_path / "bag"
    bag.mkdir()
    for path in (bag / "bag.mcap", bag / "metadata.yaml", tmp_path / "summary.json", tmp_path / "notes.txt"):
        path.touch()
    demo.clear_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    bag.mkdir()
    (bag / "thesis.doc").touch()
    with pytest.raises(ConfigurationError, match=r"expected only an earlier demo's files in bag/, got .*thesis.doc"):
        demo.clear_results(tmp_path)
    assert (bag / "thesis.doc").exists()
