"""A model in training drives simulated robots: success over held-out starts, as a figure like the others.

Legend: H horizon, A actions of the model, S state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ki_vla_ros.bundle import PolicySpec
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy import make_model_input
from ki_vla_ros.records import CameraFrame, Observation
from ki_vla_ros.statistics import wilson_95
from training.action_space import ActionSpace
from training.config import EnvironmentConfig
from training.evaluate.environment import Environment, at_period
from training.evaluate.environments import open_environment
from training.evaluate.rollouts import Act, Images, check_robot, roll_out
from training.export import as_batch
from training.model import VLA, Sampler

SUCCESS: Final = ("success", "success_low", "success_high")
MALFORMED: Final = "malformed"


def is_driven(figure: str) -> bool:
    """Whether a figure comes from here."""
    return figure.partition(".")[0] in (*SUCCESS, MALFORMED)


def success_names(config: EnvironmentConfig) -> list[str]:
    """The figures of `drive`: over all environments, and of each."""
    return [*SUCCESS, MALFORMED, *(f"{name}.{environment}" for environment in config.names for name in SUCCESS)]


def act_in_training(model: VLA, spec: PolicySpec, tokenizer: Tokenizer, space: ActionSpace, sampler: Sampler) -> Act:
    """What the model does, through the same preprocessing and with the same noise as its bundle.

    Actions are NaN where the sampler found no chunk.
    """
    device = next(model.parameters()).device

    def act(seen: Images, state_S: NDArray[np.float64], instruction: str, number: int) -> NDArray[np.float64]:
        frames = {name: CameraFrame(name, 0, image) for name, image in seen.items()}
        given = make_model_input(spec, tokenizer, Observation(0, frames, state_S), instruction)
        prefix, state = as_batch(given, model.config.state_dim)
        shape = (1, model.config.horizon, model.config.action_dim)
        noise = np.random.default_rng((0, number)).standard_normal(shape, dtype=np.float32)
        images, image_mask, tokens, token_mask = (tensor.to(device) for tensor in prefix)
        noise_1HA, state = torch.from_numpy(noise).to(device), None if state is None else state.to(device)
        action_HA = sampler(model, (images, image_mask, tokens, token_mask), state, noise_1HA)[0]
        return space.unnormalize_chunk(action_HA[:, : len(space.robot.actions)], state_S)

    return act


@contextmanager
def opened(name: str, spec: PolicySpec) -> Iterator[Environment]:
    """Opened each time anew: between two times the trainer may fork, which few simulators stand."""
    environment = open_environment(name)
    try:
        slowed = at_period(environment, spec.robot.action_period_s)
        check_robot(spec.robot, slowed, name)
        yield slowed
    finally:
        environment.close()


def try_environments(act: Act, spec: PolicySpec, config: EnvironmentConfig) -> None:
    """Fails now with what would fail in `drive` after a stage: a missing package, another robot, an unknown word."""
    if config.execute is not None and config.execute > spec.horizon:
        raise ConfigurationError(
            f"environment.execute: expected at most {spec.horizon}, the horizon, got {config.execute}"
        )
    for name in config.names:
        with opened(name, spec) as environment:
            environment.reset(config.first_seed)
            actions_HD = act(*environment.observe(), environment.instruction, 0)
            if not np.isnan(actions_HD).any():  # a model that has learned nothing names no chunk yet
                environment.step(actions_HD[0])


def drive(act: Act, spec: PolicySpec, config: EnvironmentConfig) -> dict[str, float]:
    """`success`, with `success_low` and `success_high` (Wilson, 95 %), over all environments, and of each.

    `malformed` is the share of episodes that ended, as failures, with tokens that stand for no chunk.
    """
    seeds = range(config.first_seed, config.first_seed + config.episodes)
    successes, malformed = dict[str, int](), 0
    for name in config.names:
        with opened(name, spec) as environment:
            driven = roll_out(act, environment, seeds, config.execute)
        successes[name] = driven["successes"]
        malformed += driven["malformed"]
    found = rates("", sum(successes.values()), len(seeds) * len(successes))
    for name, count in successes.items():
        found |= rates(f".{name}", count, len(seeds))
    found[MALFORMED] = malformed / (len(seeds) * len(successes))
    return found


def rates(of: str, successes: int, episodes: int) -> dict[str, float]:
    low, high = wilson_95(successes, episodes)
    return dict(zip((f"{name}{of}" for name in SUCCESS), (successes / episodes, low, high), strict=True))
