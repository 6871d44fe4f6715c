"""A policy in environments: what is executed, what counts, and what a bundle's command says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT
from support.slider import TARGET, Slider

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy import Policy
from ki_vla_ros.robot import find_robot, read_robot
from training.evaluate.__main__ import main
from training.evaluate.environment import at_period
from training.evaluate.rollouts import check_robot, roll_out

Array = np.ndarray
HORIZON = 4


class Walker:
    """Goes a tenth per action, of which it makes `HORIZON` at once; into the wrong direction from seed 11."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self, images: Mapping[str, Array], state_S: Array, instruction: str, number: int) -> Array:
        assert set(images) == {"front", "wrist"} and instruction == "slide"
        self.numbers.append(number)
        step = -0.1 if number >> 16 == 11 else 0.1
        actions_HD = np.tile(state_S, (HORIZON, 1))
        actions_HD[:, 0] += step * np.arange(1, HORIZON + 1)
        return actions_HD


@pytest.mark.parametrize(("execute", "calls"), [(None, 2), (1, 1), (4, 4)])
def test_so_many_actions_of_a_chunk_are_executed_as_were_asked_for(execute: int | None, calls: int) -> None:
    slider, walker = Slider(), Walker()
    found = roll_out(walker, slider, [10], execute)
    steps = round(found["mean_seconds"] / slider.robot.action_period_s)
    assert steps == len(slider.executed) and slider.success
    assert len(walker.numbers) == -(-steps // calls)


def test_figures_name_the_seeds_that_failed_and_how_long_the_others_took() -> None:
    walker, done = Walker(), []
    found = roll_out(walker, Slider(), [10, 11, 12, 13], report=done.append)
    assert (found["episodes"], found["successes"], found["success_rate"], found["failed_seeds"]) == (4, 3, 0.75, [11])
    assert found["success_95"] == pytest.approx([0.3006, 0.9544], abs=1e-4)
    assert 0.1 < found["mean_seconds"] < 0.3 and done == [1, 2, 3, 4]
    assert len(set(walker.numbers)) == len(walker.numbers), "every chunk has noise of its own"
    again = Walker()
    assert roll_out(again, Slider(), [12])["mean_seconds"] is not None
    assert set(again.numbers) < set(walker.numbers), "and the same, whichever episodes came before"


def test_where_nothing_succeeds_there_is_no_mean() -> None:
    slider = Slider()
    found = roll_out(Walker(), slider, [11])
    assert (found["success_rate"], found["mean_seconds"]) == (0.0, None)
    assert len(slider.executed) == round(slider.time_limit_s / slider.robot.action_period_s)
    assert slider.place_D[0] < TARGET


def test_an_episode_without_a_chunk_has_failed_and_nothing_is_executed_in_its_place() -> None:
    slider, walker = Slider(), Walker()

    def act(images: Mapping[str, Array], state_S: Array, instruction: str, number: int) -> Array:
        actions_HD = walker(images, state_S, instruction, number)
        return actions_HD * np.nan if number == (12 << 16) + 1 else actions_HD

    found = roll_out(act, slider, [10, 11, 12])
    assert (found["successes"], found["failed_seeds"], found["malformed"]) == (1, [11, 12], 1)
    assert len(slider.executed) == HORIZON // 2 and np.isfinite(slider.executed).all()


def test_a_bundle_of_another_robot_is_refused() -> None:
    slider = Slider()
    check_robot(slider.robot, slider, "slide")
    longer = slider.robot.model_copy(update={"horizon": 7, "cameras": slider.robot.cameras[:1]})
    check_robot(longer, slider, "slide")
    with pytest.raises(
        ConfigurationError, match="environment slide: expected the robot of the bundle, droid, got so101"
    ):
        check_robot(read_robot(find_robot("droid")), slider, "slide")
    unseen = slider.robot.cameras[0].model_copy(update={"name": "top"})
    with pytest.raises(ConfigurationError, match="camera top in the bundle, front, wrist in the robot file"):
        check_robot(slider.robot.model_copy(update={"cameras": (unseen,)}), slider, "slide")


def test_a_policy_of_a_longer_period_goes_in_straight_lines() -> None:
    slider = Slider()
    own_s = slider.robot.action_period_s
    slowed = at_period(slider, 3 * own_s)
    slowed.reset(2)
    begin_D = slider.observe()[1].copy()
    first_D, second_D = begin_D + 0.3, begin_D
    slowed.step(first_D)
    slowed.step(second_D)
    parts = [begin_D + 0.1, begin_D + 0.2, first_D, begin_D + 0.2, begin_D + 0.1, second_D]
    np.testing.assert_allclose(slider.executed, parts)
    check_robot(slider.robot.model_copy(update={"action_period_s": 3 * own_s}), slowed, "slide")
    assert slowed.time_limit_s == slider.time_limit_s
    slowed.reset(2)
    slowed.step(first_D)
    np.testing.assert_allclose(slider.executed[0], begin_D + 0.1)  # from where it is, not from the last episode
    for period_s in (own_s, 2.5 * own_s, own_s / 2):
        assert at_period(slider, period_s) is slider
    steps = Slider()
    steps.robot = read_robot(find_robot("metaworld"))
    assert at_period(steps, 2 * steps.robot.action_period_s) is steps, "no step of a hand may be left out"


@pytest.mark.slow
def test_the_shipped_bundle_in_its_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    demo = str(ROOT / "models" / "demo")
    assert main([demo, "--environment", "arm", "--episodes", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    printed = json.loads(capsys.readouterr().out)
    assert found == {"format": 1} | printed | {key: found[key] for key in ("outcomes", "made_of")}
    assert (found["execute"], found["seeds"], found["environments"]["arm"]["successes"]) == (
        8,
        [1_000_000, 1_000_001],
        2,
    )


@pytest.mark.parametrize("where", [(), ("--environment", "arm")])
@pytest.mark.parametrize(
    "given", [("--flow-steps", "3", "--noise-seed", "5"), ("--set", "noise_seed=5", "--set=flow_steps=3")]
)
def test_steps_and_noise_are_those_that_were_asked_for(
    given: tuple[str, ...], where: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However they are spelled, in an environment and through the robot's loop: what acts and what is reported."""
    acting = set()

    def note(self: Policy, chunk_index: int) -> Any:
        acting.add((self.flow_steps, self.noise_seed))
        raise KeyboardInterrupt

    monkeypatch.setattr(Policy, "noise", note)
    main([str(ROOT / "models" / "demo"), "--episodes", "1", *given, *where])
    assert acting == {(3, 5)}


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--environment", "arms"), "environment: expected one of arm, "),
        (("--environment", "arm", "--execute", "17"), "--execute: expected 1 to 16, the horizon, got 17"),
        (("--environment", "arm", "--episodes", "0"), "--episodes: expected at least 1, got 0"),
        (("--environment", "arm", "--delay-s", "0.1"), "--delay-s: expected it only without --environment and --p"),
        (("--environment", "arm", "--protocol", "aloha_insertion"), "expected --environment or --protocol, got both"),
        (("--protocol", "aloha_insert"), "or one of aloha_insertion, aloha_transfer_cube, "),
        (("--protocol", "aloha_insertion", "--seed", "3"), "--seed: expected it only without --protocol"),
        (("--environment", "arm", "--videos", "2"), "--videos: expected it only with --video"),
        (("--environment", "arm", "--workers", "0"), "--workers: expected at least 1, got 0"),
        (
            ("--expert", "--environment", "arm"),
            "expected one of a bundle, --policy-server and --expert, got bundle and",
        ),
        (("--environment", "arm", "--out", "nowhere/f.json"), "expected a folder at "),
        (("--execute", "2"), "--execute: expected it only with --environment or --protocol"),
        (("--environment", "arm", "--workers", "2", "--ray", "local"), "--ray: expected it only without --workers"),
        (("--ray", "local"), "--ray: expected it only with --environment or --protocol"),
        (("--set", "engine"), "--set engine: expected NAME=VALUE, for example executor=rtc"),
        (("--set", "noise_seed=1", "--noise-seed", "2"), "--noise-seed: expected it once, got --set noise_seed=1, too"),
        (("--noise-seed", "-1"), "parameter 'noise_seed': Input should be greater than or equal to 0, got '-1'"),
        (("--environment", "arm", "--noise-seed", "-1"), "parameter 'noise_seed': Input should be greater than or e"),
        (("--environment", "arm", "--flow-steps", "101"), "parameter 'flow_steps': Input should be less than or equ"),
        (("--environment", "arm", "--set", "executor=rtc"), "--set executor: in environments expected one of flow_s"),
        (("--delay-s", "-1"), "--delay-s: expected 0 to 10, got -1.0"),
        (("--delay-s", "nan"), "--delay-s: expected 0 to 10, got nan"),
        (("--first-scene", "-1"), "--first-scene: expected at least 0, got -1"),
        (("--environment", "arm", "--seed", "-1"), "--seed: expected at least 0, got -1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], fault: str
) -> None:
    assert main([str(ROOT / "models" / "demo"), *arguments]) == 2
    assert fault in capsys.readouterr().err
