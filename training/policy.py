"""What a bundle's manifest says about a policy before any export, from its robot file and from training."""

from __future__ import annotations

import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ki_vla_ros.bundle import PolicySpec, PromptSpec
from ki_vla_ros.errors import ConfigurationError, describe_validation
from ki_vla_ros.robot import Robot

PROMPTS = {  # as openpi has them
    "pi0": PromptSpec(template="{task}\n", length=48, style="openpi"),
    "pi05": PromptSpec(template="Task: {task}, State: {state};\nAction: ", length=200, style="openpi"),
    "pi05 without state": PromptSpec(template="{task}\n", length=200, style="openpi"),
}
ENCODINGS = {"pi0": "token", "pi05": "text", "pi05 without state": "none"}


def describe_policy(robot: Robot, **fields: Any) -> PolicySpec:
    """A policy; `fields` are what the robot file does not give; ConfigurationError if they do not fit."""
    try:
        return PolicySpec(
            created=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            robot=robot,
            **fields,
        )
    except ValidationError as error:
        raise ConfigurationError(f"policy for robot {robot.name!r}: {describe_validation(error)}") from error


def describe_random_policy(joints: int, seed: int = 0, **fields: Any) -> PolicySpec:
    """A policy with random weights for an arm that does not exist; `fields` are the other ones of `PolicySpec`.

    Its joints go from -3 to 3 rad, and its actions are absolute, one every 0.02 s.
    """
    joint = {"unit": "rad", "lower": -3.0, "upper": 3.0, "max_velocity": 3.0, "relative": False}
    return PolicySpec.model_validate(
        {
            "joints": [{"name": f"joint{n + 1}", **joint} for n in range(joints)],
            "action_period_s": 0.02,
            "provenance": {"recipe": "random weights", "seed": seed, "commit": "none", "data_fingerprint": "none"},
            **fields,
        }
    )


def commit() -> str:
    """The commit of this code, with '+' when tracked files differ from it; 'unknown' if it is in no checkout."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # installed within the checkout of something else, it is unknown
        return git("describe", "--always", "--dirty=+", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
