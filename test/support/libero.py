"""LIBERO lives in an environment of its own (`make libero`), which a machine may lack; demonstrations for its tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from training.evaluate.libero import Libero

needs_libero = pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="libero is not installed")

OPEN, CLOSED = -1.0, 1.0


def put_into_basket(environment: Libero, thing: str) -> list[np.ndarray]:
    """The package's actions with which a thing of the suite `object` comes into the basket, as they are executed.

    They are made from where thing, basket and hand really are; they end with the success, or after 200.
    """
    simulation, made = environment._now, list[np.ndarray]()
    thing_3, basket_3 = (np.array(simulation._raw[f"{name}_pos"]) for name in (thing, "basket_1"))

    def towards(place_3: np.ndarray, gripper: float, near: float) -> Iterator[np.ndarray]:
        while np.abs(error_3 := place_3 - simulation._raw["robot0_eef_pos"]).max() > near:
            yield np.array([*np.clip(12.0 * error_3, -1.0, 1.0), 0.0, 0.0, 0.0, gripper])

    def above(place_3: np.ndarray, height: float) -> np.ndarray:
        return np.array([place_3[0], place_3[1], place_3[2] + height])

    def plan() -> Iterator[np.ndarray]:
        yield from towards(above(thing_3, 0.1), OPEN, 0.01)
        yield from towards(thing_3, OPEN, 0.008)
        yield from 8 * [np.array([0.0] * 6 + [CLOSED])]
        yield from towards(above(thing_3, 0.25), CLOSED, 0.03)
        yield from towards(above(basket_3, 0.3), CLOSED, 0.02)
        yield from towards(above(basket_3, 0.17), CLOSED, 0.02)
        yield from 20 * [np.array([0.0] * 6 + [OPEN])]

    for raw_D in plan():
        simulation.step(raw_D)
        made.append(raw_D)
        if simulation.success or len(made) == 200:
            break
    return made


def write_recording(file: Path, episodes: list[tuple[np.ndarray, np.ndarray]]) -> Path:
    """First states [S] and actions [T, D], as LIBERO's own files have them."""
    import h5py

    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as written:
        for number, (state_S, action_TD) in enumerate(episodes):
            demo = written.create_group(f"data/demo_{number}")
            demo["states"], demo["actions"] = state_S[None], action_TD
    return file
