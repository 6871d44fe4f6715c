"""What acts in an environment: a bundle, a policy behind a server, or the environment's own expert.

Legend: D actions, S state.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle import MANIFEST, Bundle, file_sha256, load_bundle
from ki_vla_ros.engines import open_engine
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy import Policy
from ki_vla_ros.settings import Settings, read_changes, settings_from_parameters
from training.evaluate.environment import Environment, at_period
from training.evaluate.rollouts import Act, Images, act_as, check_robot

OWN: Final = ("flow_steps", "noise_seed")  # parameters that figures name by themselves
# Those that act in an environment, where each chunk is executed without delay; all act in the robot's own loop.
ACTING: Final = (*OWN, "engine", "provider", "torch_mode", "threads", "engine_cache")


@dataclass(frozen=True)
class Chosen:
    """What is to act, in words that a process can be told: a bundle, or a server, or with neither the expert."""

    bundle: Path | None = None
    parameters: tuple[str, ...] = ()  # of the node, as NAME=VALUE
    server: str | None = None
    keys: str = "robot"
    token: Path | None = None

    @property
    def expert(self) -> bool:
        return self.bundle is None and self.server is None


class Driver(Protocol):
    @property
    def told(self) -> dict[str, Any]:
        """What decides its actions, for those who read the figures."""
        ...

    @property
    def horizon(self) -> int | None:
        """Actions of a chunk; None: nobody says."""
        ...

    def meet(self, environment: Environment, name: str) -> tuple[Act, Environment]:
        """What acts in the environment, and the environment with its period; ConfigurationError if they do not fit."""
        ...

    def close(self) -> None: ...


def open_driver(chosen: Chosen) -> Driver:
    if chosen.bundle is not None:
        return BundleDriver(chosen)
    if chosen.server is not None:
        from training.evaluate.served import ServerDriver  # websockets and msgpack need not be there without it

        return ServerDriver(chosen.server, chosen.keys, chosen.token)
    return ExpertDriver()


def read_settings(chosen: Chosen, bundle: Bundle) -> Settings:
    # No ramp-in: every scene is a start with its clock set back, so the ramp would slow each episode's beginning.
    values: dict[str, Any] = {"ramp_in_s": 0.0}
    settings = settings_from_parameters(values | read_changes(chosen.parameters))
    settings.validate_against(bundle.manifest)
    return settings


def open_policy(chosen: Chosen, bundle: Bundle) -> Policy:
    """As it runs on the robot."""
    settings = read_settings(chosen, bundle)
    engine = open_engine(bundle, settings)
    return Policy(bundle, engine, settings.flow_steps or None, settings.noise_seed, settings.guidance_jacobian)


class BundleDriver:
    """Its engine is opened when there is something to do: who shares the work out needs none."""

    def __init__(self, chosen: Chosen) -> None:
        assert chosen.bundle is not None
        self._chosen, self._bundle = chosen, load_bundle(chosen.bundle)
        self._act: Act | None = None
        settings, changes = read_settings(chosen, self._bundle), read_changes(chosen.parameters)
        if idle := sorted(changes.keys() - ACTING):
            raise ConfigurationError(
                f"--set {idle[0]}: in environments expected one of {', '.join(ACTING)}: each chunk is executed without "
                "delay there, as far as --execute says"
            )
        manifest = self._bundle.manifest
        self._robot, self.horizon = manifest.robot, manifest.horizon
        self.told: dict[str, Any] = {
            "bundle": manifest.name,
            "manifest_sha256": file_sha256(self._bundle.path / MANIFEST),  # which has those of all other files
            "flow_steps": settings.flow_steps or manifest.flow.steps,
            "noise_seed": settings.noise_seed,
            "set": sorted(f"{name}={value}" for name, value in changes.items() if name not in OWN),
        }

    def meet(self, environment: Environment, name: str) -> tuple[Act, Environment]:
        slowed = at_period(environment, self._robot.action_period_s)
        check_robot(self._robot, slowed, name)
        self._act = self._act or act_as(open_policy(self._chosen, self._bundle))
        return self._act, slowed

    def close(self) -> None: ...


class ExpertDriver:
    """The environment's own: scripted, or recorded demonstrations. An upper bound, and a check of its conventions."""

    horizon = 1

    def __init__(self) -> None:
        self.told: dict[str, Any] = {"policy": "the environment's expert"}

    def meet(self, environment: Environment, name: str) -> tuple[Act, Environment]:
        def act(images: Images, state_S: NDArray[np.float64], instruction: str, number: int) -> NDArray[np.float64]:
            return environment.demonstrate()[None]

        return act, environment

    def close(self) -> None: ...
