"""A training run as data: one YAML file, checked before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from ki_vla_ros.robot import Frozen
from ki_vla_ros.yaml_file import read_yaml
from training.model import GemmaConfig, VisionConfig

Loss = Literal["cells", "text", "pointing", "grounding", "fast", "readout", "flow"]
Part = Literal["stem", "vision", "backbone", "expert", "heads"]
LoraTarget = Literal["q", "k", "v", "out", "gate", "up", "down"]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


HINTS: frozenset[Loss] = frozenset({"cells", "pointing", "grounding", "readout"})


class DataConfig(Frozen):
    """Simulated data, at the model's image size; `folder` is reused if it was made from the same settings."""

    folder: Path
    seed: int = 0
    robot_episodes: Positive
    frames_per_episode: Positive
    scenes: Positive = Field(description="vision-language frames: random scenes and arm poses, all 24 objects")
    validation_episodes: Positive = Field(description="episodes on held-out combinations, for gates and figures")
    workers: Positive = 1
    recorded: Path | None = Field(
        default=None,
        description="LeRobot dataset with the robot's joints and cameras, whose frames replace the simulated robot "
        "episodes (docs/data.md)",
    )


class HintsConfig(Frozen):
    """The hints of `training.losses.hints`, which are not in the paper; without them no stage may list their losses."""

    readout_frequencies: Positive = Field(
        description="lowest DCT frequencies that the learned prompt tokens name; one token each"
    )
    probe_layer: int = Field(description="backbone layer whose attention learns to point")
    probe_head: int = 0

    @property
    def probe(self) -> tuple[int, int]:
        return self.probe_layer, self.probe_head


class ModelConfig(Frozen):
    """The sizes that a configuration chooses; tokenizer and robot determine the others."""

    vision: VisionConfig
    backbone: GemmaConfig
    expert: GemmaConfig
    state_token: bool = Field(default=False, description="the expert also gets the exact joint state, as one token")


class ParallelConfig(Frozen):
    """How the model is spread over processes; by default whole on each, in float32, with gradients averaged."""

    device: Literal["cpu", "cuda"] = Field(default="cpu", description="cuda: one process per card")
    shard: bool = Field(default=False, description="FSDP2: divide weights, gradients and optimizer state (torchrun)")
    cpu_offload: bool = Field(
        default=False,
        description="with shard: weights, gradients and optimizer state in host memory, where the optimizer runs",
    )
    activation_checkpointing: bool = Field(
        default=False, description="compute each layer, and the logits, again for the backward pass"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of matrix products and activations; weights and optimizer stay float32"
    )

    @model_validator(mode="after")
    def _check_offload(self) -> ParallelConfig:
        if self.cpu_offload and not self.shard:
            raise ValueError("cpu_offload: expected shard with it, got shard: false; set shard as well")
        return self


class LoraSettings(Frozen):
    """Low-rank factors beside the linear layers of these parts (training/lora.py), by peft.

    Where a stage trains such a part by its name, its factors learn, and what is outside its layers: with the expert,
    the maps of actions, state and time.
    """

    parts: Annotated[tuple[Literal["vision", "backbone", "expert"], ...], Field(min_length=1)]
    rank: Positive = 16
    alpha: Positive = Field(default=16, description="the product of the factors counts alpha / rank times")
    targets: Annotated[tuple[LoraTarget, ...], Field(min_length=1)] = get_args(LoraTarget)


class StageConfig(Frozen):
    """One stage of training: which losses count, which parts learn, for how long, from how many samples of what.

    Every step draws one batch from each of `sources` ("views", "scenes", "robot": training/run.py), in their order,
    and computes the losses that the batch has targets for. `gates` are figures of `training.evaluate.offline.measure`
    that must be reached before the next stage. `train`, `freeze` and `learning_rates` name parts (`Part`) or glob
    patterns over the names of parameters (training/optimizer.py).
    """

    name: str
    steps: Positive
    learning_rate: Rate = Field(description="the largest, after warm-up")
    learning_rates: dict[str, Rate] = Field(default_factory=dict, description="of parts; the last that matches counts")
    final_learning_rate: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="where the cosine ends, other parts in proportion; by default a twentieth"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    decay_steps: Positive | None = Field(default=None, description="where the cosine ends, warm-up included; steps")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    weight_decay_on: Literal["matrices", "all"] = Field(
        default="matrices", description="all: norms, biases, the token table and positions too"
    )
    betas: tuple[Share, Share] = (0.9, 0.95)
    largest_norm: Rate = Field(default=1.0, description="of all gradients of a step; longer ones are scaled down to it")
    losses: dict[Loss, Annotated[float, Field(gt=0)]]
    train: Annotated[tuple[str, ...], Field(min_length=1)]
    freeze: tuple[str, ...] = ()
    insulate: bool = True
    sources: Annotated[dict[str, Positive], Field(min_length=1)]
    noise_samples: Positive = Field(default=1, description="flow samples drawn for each prefix")
    checkpoint_every: Positive = 500
    gates: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_schedule(self) -> StageConfig:
        if self.final_learning_rate is not None and self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate: expected at most learning_rate {self.learning_rate:g}, got "
                f"{self.final_learning_rate:g}"
            )
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps: expected more than warmup_steps {self.warmup_steps}, which they include, got "
                f"{self.decay_steps}"
            )
        return self


class TrainingConfig(Frozen):
    """A whole training run."""

    name: str
    robot: str = Field(description="a robot file, or the name of one in config/robots/")
    seed: int = 0
    out: Path
    threads: Positive = 1
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    model: ModelConfig
    fast_vocabulary: Positive = 512
    fast_scale: float = 10.0
    fast_published: Path | None = Field(
        default=None,
        description="folder with a published FAST vocabulary (tokenizer.json, processor_config.json), used in place of "
        "one with fast_vocabulary tokens fitted on the data",
    )
    prompt_length: Positive
    hints: HintsConfig | None = None
    flow_steps: Positive = Field(default=10, description="Euler steps that the model is measured with and runs with")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="decay of the weights' moving average, which is then measured and exported"
    )
    lora: LoraSettings | None = None
    max_prefix_delay: int = Field(description="largest clean chunk prefix (actions) that training conditions on")
    prefix_lead: float = Field(
        default=0.0,
        ge=0.0,
        description="how many actions the clean prefix may be ahead of the arm; for chunks whose velocity is a "
        "function of the position. 0: it begins where the arm is, as in a recording",
    )
    stages: tuple[StageConfig, ...]

    @model_validator(mode="after")
    def _check_hints(self) -> TrainingConfig:
        if self.hints is None:
            for stage in self.stages:
                if given := sorted(HINTS & stage.losses.keys()) + ["heads"] * ("heads" in stage.train):
                    raise ValueError(f"stage {stage.name}: expected hints for {', '.join(given)}, got none")
            return self
        # What the last layer's attention finds goes into no key or value, so the expert could not read it.
        layer, last = self.hints.probe_layer, self.model.backbone.depth - 2
        if not 0 <= layer <= last:
            raise ValueError(f"hints.probe_layer: expected 0..{last}, before the last layer, got {layer}")
        return self


def load_config(path: Path) -> TrainingConfig:
    """Read and check a training YAML; ConfigurationError names file, key and fault."""
    return read_yaml(path, TrainingConfig, "training configuration", "config/training/")
