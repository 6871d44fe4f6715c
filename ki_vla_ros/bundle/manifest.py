"""The manifest: everything that a robot must know about a policy besides its weights.

Training writes a `PolicySpec` beside each checkpoint; export adds the graphs' dimensions and the files' hashes.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ki_vla_ros.records import to_ns
from ki_vla_ros.robot import ActionPeriod, CameraSpec, Finite, Frozen, Horizon, JointSpec, Name, check_parts

PAD_TOKEN = "<pad>"
UNKNOWN_TOKEN = "<unk>"

Positive = Annotated[int, Field(gt=0, lt=2**63)]


PromptStyle = Literal["words", "openpi"]
"""How instruction and state become text: one token per state bin, or as openpi writes them (pi0, pi0.5)."""


class ImageSpec(Frozen):
    """Square model input of `size` pixels in [-1, 1]; other aspect ratios are padded with `pad_value` (black)."""

    size: Positive
    pad_value: Literal[-1] = -1
    resize: Literal["pad"] = "pad"


class PromptSpec(Frozen):
    """`template` with {task} and, for a state as text, {state}; `length` tokens after padding."""

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
            if not low < high:
                raise ValueError(f"dimension {j}: expected low < high, got {low} and {high}")
            if not math.isfinite(2.0 * (high - low)):
                raise ValueError(f"dimension {j}: expected a range that a number can hold, got {low} and {high}")
        return self


class StateSpec(_Range):
    """low..high of each joint map to [-1, 1]; the state enters the prompt as text, the expert as a token, or both."""

    encoding: Literal["text", "token", "both"]

    @property
    def in_prompt(self) -> bool:
        return self.encoding != "token"

    @property
    def as_token(self) -> bool:
        return self.encoding != "text"


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
    cameras: Annotated[tuple[CameraSpec, ...], Field(min_length=1)]
    image: ImageSpec
    prompt: PromptSpec
    joints: Annotated[tuple[JointSpec, ...], Field(min_length=1)]
    state: StateSpec
    action: ActionStats
    horizon: Horizon
    action_period_s: ActionPeriod
    flow: FlowSpec = FlowSpec()
    max_prefix_delay: Annotated[int, Field(ge=0)] = 0
    pad_to: Positive | None = Field(default=None, description="zeros after the joints, up to this width of the model")
    provenance: Provenance

    @property
    def joint_names(self) -> tuple[str, ...]:
        return tuple(joint.name for joint in self.joints)

    @property
    def width(self) -> int:
        """Width of the model's actions and of its state token: the joints, perhaps followed by zeros."""
        return self.pad_to or len(self.joints)

    @property
    def action_period_ns(self) -> int:
        return to_ns(self.action_period_s)

    @model_validator(mode="after")
    def _consistent(self) -> PolicySpec:
        check_parts(self.cameras, self.joints)
        for what, stats in (("state", self.state), ("action", self.action)):
            if len(stats.low) != len(self.joints):
                raise ValueError(f"{what}: expected {len(self.joints)} values (one per joint), got {len(stats.low)}")
        if self.width < len(self.joints):
            raise ValueError(f"pad_to: expected at least {len(self.joints)} (the joints), got {self.pad_to}")
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

    format_version: Literal[2] = 2
    files: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]
    graph: GraphSpec

    @model_validator(mode="after")
    def _graphs_fit(self) -> Manifest:
        prefix_length = len(self.cameras) * self.graph.image_tokens + self.prompt.length
        if self.graph.prefix_length != prefix_length:
            raise ValueError(
                f"graph.prefix_length: expected {prefix_length} ({len(self.cameras)} cameras of "
                f"{self.graph.image_tokens} tokens + {self.prompt.length} of prompt), got {self.graph.prefix_length}"
            )
        for name, expected in (("action_dim", self.width), ("state_dim", self.width if self.state.as_token else None)):
            if getattr(self.graph, name) != expected:
                why = "one per joint, or pad_to" if expected else "the state is in the prompt"
                raise ValueError(f"graph.{name}: expected {expected} ({why}), got {getattr(self.graph, name)}")
        return self
