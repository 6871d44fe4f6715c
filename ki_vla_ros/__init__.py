"""Vision-language-action policies on a robot: from images, joint states and an instruction to joint positions.

The front door for use as a library, without ROS (docs/library.md). A name is loaded when it is first used, so that
`import ki_vla_ros` costs nothing and needs no engine.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ki_vla_ros.bags import open_bag
    from ki_vla_ros.bundle import load_bundle
    from ki_vla_ros.engines import open_engine
    from ki_vla_ros.errors import KiVlaError
    from ki_vla_ros.policy import Policy
    from ki_vla_ros.records import ActionChunk, CameraFrame, Observation
    from ki_vla_ros.settings import Settings
    from ki_vla_ros.share import find_bundle

__all__ = [
    "ActionChunk",
    "CameraFrame",
    "KiVlaError",
    "Observation",
    "Policy",
    "Settings",
    "find_bundle",
    "load_bundle",
    "open_bag",
    "open_engine",
]

_HOMES = {
    "bags": ("open_bag",),
    "bundle": ("load_bundle",),
    "engines": ("open_engine",),
    "errors": ("KiVlaError",),
    "policy": ("Policy",),
    "records": ("ActionChunk", "CameraFrame", "Observation"),
    "settings": ("Settings",),
    "share": ("find_bundle",),
}


if sys.argv[:1] == ["-m"]:  # `python -m ki_vla_ros.doctor`: its own first import would already end in a traceback
    import_module("ki_vla_ros.console").check_pydantic()


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"ki_vla_ros.{home}"), name)
    raise AttributeError(f"module 'ki_vla_ros' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
