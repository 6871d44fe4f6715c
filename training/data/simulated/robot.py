"""What the robot must know of a policy trained on the simulated arm, as the part of the manifest that training fills
in.
"""

from __future__ import annotations

from datetime import datetime, timezone

from ki_vla_ros.bundle.manifest import (
    ActionStats,
    FlowSpec,
    ImageSpec,
    PolicySpec,
    PromptSpec,
    Provenance,
    StateSpec,
)
from ki_vla_ros.robot.robot import CameraSpec, JointSpec
from ki_vla_ros.sim.world import JOINTS, World
from training.action_space import ActionSpace
from training.config import TrainingConfig
from training.data.simulated.generate import CAMERAS
from training.policy import commit
from training.tokens.words import DEMO_PROMPT

HORIZON = 16
ACTION_PERIOD_S = 0.05
FLOW_STEPS = 10
MAX_VELOCITY = {"rad": 3.0, "m": 0.2}  # per second; the demonstrator's fastest motions stay below (tested)


def describe_policy(
    config: TrainingConfig, space: ActionSpace, *, fingerprint: str, figures: dict[str, float] | None = None
) -> PolicySpec:
    """The spec of a run: sizes from its configuration, limits from the arm, normalisation from its data."""
    arm = World(render=False)
    units = ["m" if name == "gripper" else "rad" for name in JOINTS]
    return PolicySpec(
        name=config.name,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        cameras=tuple(CameraSpec(name=name) for name in CAMERAS),
        image=ImageSpec(size=config.model.vision.image_size),
        prompt=PromptSpec(template=DEMO_PROMPT, length=config.prompt_length, max_instruction_chars=80),
        joints=tuple(
            JointSpec(name=name, unit=unit, lower=low, upper=high, max_velocity=MAX_VELOCITY[unit], relative=True)
            for name, unit, low, high in zip(JOINTS, units, arm.lower_J.tolist(), arm.upper_J.tolist(), strict=True)
        ),
        state=StateSpec(
            encoding="both" if config.model.state_token else "text", low=space.state_low, high=space.state_high
        ),
        action=ActionStats(low=space.action_low, high=space.action_high),
        horizon=HORIZON,
        action_period_s=ACTION_PERIOD_S,
        flow=FlowSpec(steps=FLOW_STEPS),
        max_prefix_delay=config.max_prefix_delay,
        provenance=Provenance(
            recipe="knowledge insulation",
            seed=config.seed,
            commit=commit(),
            data_fingerprint=fingerprint,
            figures=figures or {},
        ),
    )
