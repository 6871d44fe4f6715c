"""A policy in an environment: it sees, makes a chunk of actions, executes the first of them, and sees again.

There is no delay and no robot's loop here (for the simulated arm closed_loop.py has both): what counts is what the
policy wants. The trainer calls `roll_out` during training, `python -m training.evaluate` for a bundle.

Legend: H horizon, D actions, S state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy import Policy, make_model_input
from ki_vla_ros.records import CameraFrame, Observation
from ki_vla_ros.robot import Robot, disagreements
from ki_vla_ros.statistics import wilson_95
from training.evaluate.environment import Environment

if TYPE_CHECKING:
    from training.evaluate.films import Film

Images = Mapping[str, NDArray[np.uint8]]
Act = Callable[[Images, NDArray[np.float64], str, int], NDArray[np.float64]]
"""Images by camera, the state [S], the instruction and a number that no other chunk has -> actions [H, D].

Actions with NaN are no chunk: what a model said in tokens stood for none.
"""
Outcome = float | Literal["failed", "malformed"]
"""Of an episode: simulated seconds until success, or why there was none. Malformed: the policy had no chunk."""
FAILED: Final = "failed"
MALFORMED: Final = "malformed"

CHUNKS: Final = 1 << 16  # more than an episode has


def act_as(policy: Policy) -> Act:
    """The robot's own policy as an `Act`: what the node computes before it makes a path of the actions."""

    def act(images: Images, state_S: NDArray[np.float64], instruction: str, number: int) -> NDArray[np.float64]:
        frames = {name: CameraFrame(name, 0, image) for name, image in images.items()}
        bundle = policy.bundle
        model_input = make_model_input(bundle.manifest, bundle.tokenizer, Observation(0, frames, state_S), instruction)
        actions_HA = policy.denoise(policy.prefill(model_input), policy.noise(number), model_input.state_S)
        return policy.actions(actions_HA, state_S)

    return act


def check_robot(trained: Robot, environment: Environment, name: str) -> None:
    """ConfigurationError unless the environment shows and takes what the policy was trained on."""
    faults = [str(d) for d in disagreements(trained, environment.robot) if d.place[0] not in ("cameras", "horizon")]
    shown = environment.robot.camera_names
    faults += [
        f"camera {camera.name} in the bundle, {', '.join(shown)} in the robot file"
        for camera in trained.cameras
        if camera.name not in shown and not camera.optional
    ]
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ConfigurationError(
            f"environment {name}: expected the robot of the bundle, {trained.name}, got {environment.robot.name}: "
            f"{'; '.join(faults[:3])}{more}"
        )


def roll_out(
    act: Act,
    environment: Environment,
    seeds: Sequence[int],
    execute: int | None = None,
    report: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """One episode for each seed. `execute`: how many actions of a chunk are executed; left out: half of them.

    Returns what `summarize` does; `report` gets the number of episodes that are done.
    """
    outcomes = {}
    for done, seed in enumerate(seeds):
        outcomes[seed] = run_episode(act, environment, seed, execute)
        report(done + 1)
    return summarize(outcomes)


def summarize(outcomes: Mapping[int, Outcome]) -> dict[str, Any]:
    """Figures of episodes by seed.

    `episodes`, `successes`, `success_rate` with `success_95` (Wilson), `mean_seconds` of simulated time until success
    (None: there was none), `failed_seeds`, and `malformed`: how many of them ended because there was no chunk.
    """
    seconds = [outcome for outcome in outcomes.values() if not isinstance(outcome, str)]
    return {
        **rate(len(seconds), len(outcomes)),
        "mean_seconds": float(np.mean(seconds)) if seconds else None,
        "failed_seeds": [seed for seed, outcome in outcomes.items() if isinstance(outcome, str)],
        "malformed": sum(outcome == MALFORMED for outcome in outcomes.values()),
    }


def rate(successes: int, episodes: int) -> dict[str, Any]:
    return {
        "episodes": episodes,
        "successes": successes,
        "success_rate": successes / episodes,
        "success_95": wilson_95(successes, episodes),
    }


def run_episode(
    act: Act,
    environment: Environment,
    seed: int,
    execute: int | None,
    limit_s: float | None = None,
    film: Film | None = None,
) -> Outcome:
    """`limit_s`: of simulated time; default: the environment's.

    Without a chunk, a robot would hold, see the same again, and be told the same: so the episode ends.
    """
    environment.reset(seed)
    period_s = environment.robot.action_period_s
    limit = round((limit_s or environment.time_limit_s) / period_s)
    number, step, malformed = 0, 0, False
    while step < limit and not environment.over:
        images, state_S = environment.observe()
        actions_HD = act(images, state_S, environment.instruction, seed * CHUNKS + number)
        number += 1
        if malformed := bool(np.isnan(actions_HD).any()):
            break
        if (execute or 1) > len(actions_HD):
            raise ConfigurationError(f"execute: expected at most {len(actions_HD)}, the horizon, got {execute}")
        count = execute or max(1, len(actions_HD) // 2)
        if film is not None:
            film.expect(actions_HD, count)
        for action_D in actions_HD[:count]:
            if film is not None:
                film.see(environment)
            environment.step(action_D)
            step += 1
            if environment.over or step == limit:
                break
    if film is not None:
        film.see(environment)
    if environment.success:
        return round(step * period_s, 3)
    return MALFORMED if malformed else FAILED
