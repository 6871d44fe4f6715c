"""The running chunk in an observation, our addition to openpi's protocol: what real-time chunking goes on from.

A server that takes it says so in its metadata: `running` is the most actions of it that may be clean. A client of ours
then sends, under the same key, `actions` [H, D] in the units of its keys, `weight` [H], `clean` and `strength`, as
`records.Condition` has them; others send nothing of it.

Legend: H horizon, D dimensions of an action, S state.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError, short_repr
from ki_vla_ros.policy import Guide, Policy
from ki_vla_ros.serve.keys import LARGEST_NUMBER, RUNNING, Keys

STRONGEST: Final = 1e3


def running_message(guide: Guide, state_S: NDArray[np.float64], policy: Policy, keys: Keys) -> dict[str, Any]:
    """What to send of a guide that the policy here has made for an observation's state."""
    actions_HD = keys.actions(policy.actions(guide.action_HA, state_S), policy.bundle.manifest.robot)
    return {"actions": actions_HD, "weight": guide.weight_H, "clean": guide.clean, "strength": guide.strength}


def read_running(running: Any, state_S: NDArray[np.float64], policy: Policy, keys: Keys) -> Guide:
    """The inverse of `running_message`; InputError for anything else."""
    manifest = policy.bundle.manifest
    if not isinstance(running, dict) or running.keys() != {"actions", "weight", "clean", "strength"}:
        raise InputError(f"'{RUNNING}': expected actions, weight, clean, strength, got {short_repr(running)}")
    actions_HD = _numbers(running, "actions", (manifest.horizon, len(manifest.robot.actions)), -LARGEST_NUMBER)
    weight_H = _numbers(running, "weight", (manifest.horizon,), 0.0, 1.0)
    clean, strength = running["clean"], running["strength"]
    if not isinstance(clean, bool):
        raise InputError(f"'{RUNNING}/clean': expected true or false, got {short_repr(clean)}")
    if not isinstance(strength, float) or not 0.0 <= strength <= STRONGEST:
        raise InputError(f"'{RUNNING}/strength': expected 0 to {STRONGEST:g}, got {short_repr(strength)}")
    if clean and np.any(weight_H[manifest.max_prefix_delay :]):
        raise InputError(
            f"'{RUNNING}/weight': expected at most {manifest.max_prefix_delay} clean actions, on which the model was "
            f"trained, got {np.flatnonzero(weight_H)[-1] + 1}"
        )
    action_HA = policy.normalized(keys.robot_actions(actions_HD, manifest.robot), state_S)
    return Guide(action_HA, weight_H.astype(np.float32), clean, strength)


def _numbers(
    running: dict[str, Any], name: str, shape: tuple[int, ...], least: float, most: float = LARGEST_NUMBER
) -> NDArray[np.float64]:
    given = running[name]
    if not isinstance(given, np.ndarray) or given.dtype.kind != "f" or given.shape != shape:
        got = f"{given.dtype} {list(given.shape)}" if isinstance(given, np.ndarray) else short_repr(given)
        raise InputError(f"'{RUNNING}/{name}': expected float {list(shape)}, got {got}")
    numbers = given.astype(np.float64)
    if not np.all((numbers >= least) & (numbers <= most)):
        raise InputError(f"'{RUNNING}/{name}': expected numbers from {least:g} to {most:g}, got others")
    return numbers
