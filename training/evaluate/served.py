"""A policy behind a server in an environment: ours, or any that speaks openpi's protocol (docs/serve.md).

Legend: H horizon, D actions, S state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.records import CameraFrame, Observation
from ki_vla_ros.robot import Robot
from ki_vla_ros.serve import Keys, ServerEngine, open_keys, read_token
from training.evaluate.environment import Environment, at_period
from training.evaluate.rollouts import CHUNKS, Act, Images

# What a server of ours says of its policy beyond its name; openpi's says nothing.
IDENTITY: Final = ("policy", "manifest_sha256", "flow_steps", "noise_seed")
PATIENCE_S: Final = 120.0  # somebody's server may compile its model when it is first asked


class ServerDriver:
    """A server that is there; ConfigurationError or EngineError says why it is not."""

    horizon = None

    def __init__(self, address: str, keys: str = "robot", token_file: Path | None = None) -> None:
        token = read_token(token_file, "--policy-server-token") if token_file else ""
        self._server, self._keys = ServerEngine(address, token, PATIENCE_S), keys
        try:
            said = self._server.metadata()
        except BaseException:
            self._server.close()
            raise
        self.told: dict[str, Any] = {"policy_server": address, "keys": keys}
        self.told |= {name: _plain(said[name]) for name in IDENTITY if name in said}

    def meet(self, environment: Environment, name: str) -> tuple[Act, Environment]:
        """The environment has the server's period if it names one.

        ConfigurationError if it says that its policy is of another robot, or if the keys are.
        """
        said_s = self._server.metadata().get("action_period_s")
        if isinstance(said_s, float) and said_s > 0.0:
            environment = at_period(environment, said_s)
        names = open_keys(self._keys, environment.robot)
        self._server.agree(names.meaning(environment.robot), f"environment {name}")
        return act_by(self._server, names, environment.robot), environment

    def close(self) -> None:
        self._server.close()


def _plain(said: object) -> str | int | None:
    """What a file of results can hold."""
    return said if isinstance(said, (str, int)) else None


def act_by(server: ServerEngine, keys: Keys, robot: Robot) -> Act:
    """A server's policy as an `Act`; EngineError for whatever it does wrong.

    Each episode has a connection of its own: so its noise, with a server of ours, depends on no other episode.
    """

    def act(images: Images, state_S: NDArray[np.float64], instruction: str, number: int) -> NDArray[np.float64]:
        if number % CHUNKS == 0:
            server.disconnect()
        frames = {name: CameraFrame(name, 0, image) for name, image in images.items()}
        message = keys.message(Observation(0, frames, state_S), instruction, robot)
        return keys.robot_actions(server.actions(message, None, len(robot.actions)), robot)

    return act
