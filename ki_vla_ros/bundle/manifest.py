"""The manifest: everything that a robot must know about a policy besides its weights.

Training writes a `PolicySpec` beside each checkpoint; export adds the graphs' dimensions and the files' hashes.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ki_vla_ros.bundle.format2 import FIELDS as OLD_FIELDS
from ki_vla_ros.bundle.format2 import robot_from
from ki_vla_ros.records import to_ns
from ki_vla_ros.robot import Axis, CameraSpec, Finite, Frozen, Name, Robot

PAD_TOKEN = "<pad>"
UNKNOWN_TOKEN = "<unk>"

Positive = Annotated[int, Field(gt=0, lt=2**63)]


StateEncoding = Literal["text", "special", "token", "both", "none"]
"""How the state enters the model: as numbers in the prompt's text, as special tokens there, one of 256 for each
dimension, as one continuous token of the expert, as text and as that token, or not at all."""
IN_PROMPT: frozenset[StateEncoding] = frozenset({"text", "special", "both"})
AS_TOKEN: frozenset[StateEncoding] = frozenset({"token", "both"})
"""Of the expert."""
PromptStyle = Literal["words", "openpi"]
"""How instruction and state become text: one token per state bin, or as openpi writes them (pi0, pi0.5)."""


def state_bin_token(n: int) -> str:
    """The special token for bin n of any of the state's dimensions."""
    return f"<state_{n}>"


class ImageSpec(Frozen):
    """Square model input of `size` pixels in [-1, 1]; other aspect ratios are padded with `pad_value` (black)."""

    size: Positive
    pad_value: Literal[-1] = -1
    resize: Literal["pad"] = "pad"


class PromptSpec(Frozen):
    """`template` with {task} and, for a state in the prompt, {state}; `length` tokens after padding."""

    template: Annotated[str, Field(max_length=2000)]
    length: Annotated[int, Field(gt=0, le=16384)]
    max_instruction_chars: Annotated[int, Field(gt=0, le=2000)] = 200
    state_bins: Annotated[int, Field(ge=2, le=4096)] = 256
    style: PromptStyle = "words"


class _Range(Frozen):
    low: tuple[Finite, ...]
    high: tuple[Finite, ...]

    @model_validator(mode="after")
    def _ordered(self) -> _Range:
        if len(self.low) != len(self.high):
            raise ValueError(f"expected low and high of equal length, got {len(self.low)} and {len(self.high)}")
        for j, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if low == high:
                raise ValueError(f"dimension {j}: expected two values, got {low} twice")
            if not math.isfinite(2.0 * (high - low)):
                raise ValueError(f"dimension {j}: expected a range that a number can hold, got {low} and {high}")
        return self


class StateSpec(_Range):
    """low..high of each dimension map to [-1, 1], and enter the prompt, the expert, both or none."""

    encoding: StateEncoding

    @property
    def in_prompt(self) -> bool:
        return self.encoding in IN_PROMPT

    @property
    def as_token(self) -> bool:
        return self.encoding in AS_TOKEN


class ActionStats(_Range):
    """low..high of each action dimension (after subtracting the state where relative) map to [-1, 1], unclipped."""


class FlowSpec(Frozen):
    """Euler steps that the model was evaluated with.

    `noise_at_one`: x_t = t * noise + (1 - t) * action, integrated from t = 1 to 0.
    """

    steps: Annotated[int, Field(ge=1, le=100)] = 10
    convention: Literal["noise_at_one"] = "noise_at_one"


class GraphSpec(Frozen):
    """Dimensions of the two graphs.

    `image_tokens` per camera, `vocab_size` embedding rows of the prompt, `modulation` numbers that stand for the flow
    time; `dtype` of keys, values and the large weights; `state_dim` of the state token, if any. `*_flops`:
    floating-point multiplications and additions of one prefill and one expert step.
    """

    layers: Positive
    kv_heads: Positive
    head_dim: Positive
    image_tokens: Positive
    prefix_length: Positive
    action_dim: Positive
    state_dim: Positive | None = None
    modulation: Positive
    vocab_size: Positive
    dtype: Literal["float32", "bfloat16"] = "float32"
    prefill_flops: Positive
    step_flops: Positive


class Provenance(Frozen):
    """Where the weights come from; `figures` are measured results by name."""

    recipe: str
    seed: int
    commit: str
    data_fingerprint: str
    figures: dict[str, Finite] = Field(default_factory=dict)


class PolicySpec(Frozen):
    """What training knows before any export; stored as `policy.json` beside a checkpoint."""

    name: Name
    created: str
    robot: Robot
    image: ImageSpec
    prompt: PromptSpec
    state: StateSpec
    action: ActionStats
    flow: FlowSpec | None = Field(default=FlowSpec(), description="none: it does not act by a flow; no bundle has it")
    max_prefix_delay: Annotated[int, Field(ge=0)] = 0
    pad_to: Positive | None = Field(
        default=None, description="zeros after state and actions, up to this width of the model"
    )
    provenance: Provenance

    @model_validator(mode="before")
    @classmethod
    def _from_format_2(cls, content: Any) -> Any:
        """Files of format 2 have cameras, joints and times beside each other instead of a robot."""
        if not isinstance(content, dict) or content.get("format_version") == 3:
            return content
        old = sorted(OLD_FIELDS & content.keys())
        if "robot" in content and (old or content.get("format_version") == 2):
            raise ValueError(f"robot: expected none {'beside ' + ', '.join(old) if old else 'in format 2'}")
        if not old:
            return content
        rest = {name: value for name, value in content.items() if name not in OLD_FIELDS}
        return {**rest, "robot": robot_from({name: content[name] for name in OLD_FIELDS & content.keys()})}

    @property
    def cameras(self) -> tuple[CameraSpec, ...]:
        return self.robot.cameras

    @property
    def horizon(self) -> int:
        return self.robot.horizon

    @property
    def action_period_s(self) -> float:
        return self.robot.action_period_s

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What the runtime moves."""
        return self.robot.axes

    @property
    def axis_names(self) -> tuple[str, ...]:
        return self.robot.axis_names

    @property
    def action_width(self) -> int:
        """Width of the model's actions: the robot's, perhaps followed by zeros."""
        return self.pad_to or len(self.robot.actions)

    @property
    def state_width(self) -> int:
        """Width of the model's state token: the robot's state, perhaps followed by zeros."""
        return self.pad_to or len(self.robot.state)

    @property
    def action_period_ns(self) -> int:
        return to_ns(self.action_period_s)

    @model_validator(mode="after")
    def _consistent(self) -> PolicySpec:
        counts = {"state": len(self.robot.state), "action": len(self.robot.actions)}
        for what, stats in (("state", self.state), ("action", self.action)):
            if len(stats.low) != counts[what]:
                raise ValueError(f"{what}: expected {counts[what]} values (one per dimension), got {len(stats.low)}")
        if self.pad_to is not None and self.pad_to < max(counts.values()):
            raise ValueError(f"pad_to: expected at least {max(counts.values())} (the dimensions), got {self.pad_to}")
        if self.max_prefix_delay >= self.horizon:
            raise ValueError(
                f"max_prefix_delay: expected less than the horizon {self.horizon}, got {self.max_prefix_delay}"
            )
        if self.prompt.template.count("{task}") != 1:
            raise ValueError(f"prompt.template: expected {{task}} exactly once, got {self.prompt.template!r}")
        expected = 1 if self.state.in_prompt else 0
        if self.prompt.template.count("{state}") != expected:
            raise ValueError(
                f"prompt.template: expected {{state}} {expected} times (state.encoding is {self.state.encoding!r}), "
                f"got {self.prompt.template!r}"
            )
        return self


class Manifest(PolicySpec):
    """`manifest.json`: the policy, the dimensions of its graphs and the sha256 of every other file of the bundle."""

    format_version: Literal[2, 3] = 3
    flow: FlowSpec = FlowSpec()
    files: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]
    graph: GraphSpec

    @model_validator(mode="after")
    def _graphs_fit(self) -> Manifest:
        for what, stats in (("state", self.state), ("action", self.action)) if self.format_version == 2 else ():
            for j, (low, high) in enumerate(zip(stats.low, stats.high, strict=True)):
                if low > high:
                    raise ValueError(f"{what}: dimension {j}: expected low < high, got {low} and {high}")
        prefix_length = len(self.cameras) * self.graph.image_tokens + self.prompt.length
        if self.graph.prefix_length != prefix_length:
            raise ValueError(
                f"graph.prefix_length: expected {prefix_length} ({len(self.cameras)} cameras of "
                f"{self.graph.image_tokens} tokens + {self.prompt.length} of prompt), got {self.graph.prefix_length}"
            )
        state_dim = self.state_width if self.state.as_token else None
        for name, expected in (("action_dim", self.action_width), ("state_dim", state_dim)):
            if getattr(self.graph, name) != expected:
                why = "one per dimension, or pad_to" if expected else "the state is in the prompt"
                raise ValueError(f"graph.{name}: expected {expected} ({why}), got {getattr(self.graph, name)}")
        return self
