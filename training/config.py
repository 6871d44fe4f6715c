"""A training run as data: one YAML file, checked before anything is computed."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from ki_vla_ros.bundle import AS_TOKEN, IN_PROMPT, PromptStyle, StateEncoding
from ki_vla_ros.errors import ConfigurationError, did_you_mean, short_repr
from ki_vla_ros.robot import ActionPeriod, Frozen, Horizon
from ki_vla_ros.yaml_file import Place, read_yaml
from training.action_space import Normalization, StateRange
from training.data import Augmentation
from training.data.language import LanguageEntry
from training.model import Actions, Conditioning, GemmaConfig, SamplerName, VisionConfig, VLAConfig
from training.recipe import WARMUP_STEPS, find_recipe, lay_recipe
from training.tokens import BEGIN, PostfixKind, VocabularyConfig

Loss = Literal["cells", "text", "pointing", "grounding", "fast", "tokens", "readout", "flow", "regression"]
Part = Literal["stem", "vision", "backbone", "expert", "heads"]
StartPart = Literal["vision", "backbone", "expert"]
LoraTarget = Literal["q", "k", "v", "out", "gate", "up", "down"]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=1e-6, le=1e6)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Bound = Annotated[float, Field(allow_inf_nan=False)]


HINTS: frozenset[Loss] = frozenset({"cells", "pointing", "grounding", "readout"})


class LeRobotEntry(Frozen):
    """One LeRobot dataset among a source's."""

    lerobot: Path = Field(description="folder of the dataset, v2.0, v2.1 or v3.0 (docs/data.md)")
    robot: str | None = Field(
        default=None, description="robot file, or the name of one in config/robots/, whose data it is; default: robot"
    )
    weight: Weight = Field(default=1.0, description="how often samples come from here, beside the source's other data")
    episodes: tuple[int, int | None] | None = Field(
        default=None, description="[first, end): only these of its episodes, counted from 0; end may be null"
    )
    ends: Literal["mask", "hold", "drop"] = Field(
        default="mask",
        description="chunks that reach past an episode's end: learned up to there, learned as if the last action went "
        "on (right if the robot then rests), or not drawn",
    )
    chunk: str | None = Field(
        default=None, description="column with each frame's whole chunk, for data whose frames do not follow each other"
    )

    @field_validator("episodes")
    @classmethod
    def _check_episodes(cls, episodes: tuple[int, int | None] | None) -> tuple[int, int | None] | None:
        if episodes is not None and not 0 <= episodes[0] < (math.inf if episodes[1] is None else episodes[1]):
            raise ValueError(f"expected [first, end) with 0 <= first < end, got {list(episodes)}")
        return episodes


KINDS = ("lerobot", "paligemma", "llava", "parquet")
"""Keys that say what an entry's data is, and where."""


def _kind(entry: Any) -> str:
    named = "lerobot" in entry if isinstance(entry, Mapping) else hasattr(entry, "lerobot")
    return "<lerobot>" if named else "<language>"


Entry = Annotated[
    Annotated[LeRobotEntry, Tag("<lerobot>")] | Annotated[LanguageEntry, Tag("<language>")], Discriminator(_kind)
]


class HintsConfig(Frozen):
    """The hints of `training.losses.hints`, which are not in the paper; without them no stage may list their losses."""

    readout_frequencies: int = Field(
        default=0,
        ge=0,
        description="lowest DCT frequencies that the learned prompt tokens name; one of vocabulary.queries each",
    )
    probe_layer: int = Field(description="backbone layer whose attention learns to point")
    probe_head: int = 0
    cell_classes: int = Field(default=0, ge=0, description="classes of the data's image cells; the last is background")

    @property
    def probe(self) -> tuple[int, int]:
        return self.probe_layer, self.probe_head


class ModelConfig(Frozen):
    """The sizes that a configuration chooses; tokenizer and robots determine the others."""

    # Left out with `start`, which fills them in before anything else reads them.
    vision: VisionConfig = Field(default=None)  # type: ignore[assignment]
    backbone: GemmaConfig = Field(default=None)  # type: ignore[assignment]
    expert: GemmaConfig | None = Field(
        default=None,
        description="sizes of the action expert; of no use where actions go through the backbone",
    )
    actions: Actions = Field(
        default="expert", description="what action tokens go through: an expert's layers, or the backbone's own"
    )
    hybrid_mask: bool = Field(
        default=False,
        description="whether FAST tokens see the noisy actions, as in HybridVLA",
    )
    state: StateEncoding = Field(
        default="text",
        description="how the state enters: as text in the prompt or as special tokens there, as one exact token of the "
        "expert, as text and as that token (both), or not at all",
    )
    conditioning: Conditioning = Field(
        default="adarms",
        description="how the flow time gets in: by the expert's norms (pi0.5), or concat (pi0; actions: backbone too)",
    )
    width: Positive | None = Field(
        default=None,
        description="dimensions of actions and of the state token; default: as many as the widest robot has",
    )

    def vla(self, *, vocab_size: int, action_dim: int, horizon: int, state_dim: int) -> VLAConfig:
        """The whole model's sizes, with what the data say."""
        return VLAConfig(
            vision=self.vision,
            backbone=self.backbone,
            expert=self.expert_sizes,
            vocab_size=vocab_size,
            action_dim=action_dim,
            horizon=horizon,
            state_dim=state_dim if self.state_token else None,
            conditioning=self.conditioning,
            actions=self.actions,
            hybrid_mask=self.hybrid_mask,
        )

    @property
    def expert_sizes(self) -> GemmaConfig:
        """Those of the layers that actions go through."""
        return self.backbone if self.actions == "backbone" or self.expert is None else self.expert

    @property
    def state_in_prompt(self) -> bool:
        return self.state in IN_PROMPT

    @property
    def state_token(self) -> bool:
        return self.state in AS_TOKEN


class PromptConfig(Frozen):
    """How a robot's instruction and state become text."""

    length: Positive = Field(description="tokens of the longest prompt; the robot refuses longer ones")
    template: str | None = Field(
        default=None, description="with {task}, and {state} where it is in the prompt; default: as pi0.5 has it"
    )
    style: PromptStyle = "words"
    longest_text: Positive = Field(default=256, description="tokens of a question, and of an answer, in other data")

    def text(self, state_in_prompt: bool, postfix: PostfixKind = "bare", queries: str = "") -> str:
        """The template; `queries` are the learned tokens at its end. A whole postfix says `Action: ` itself."""
        if self.template is not None:
            return self.template + queries
        end = "" if postfix == "whole" else BEGIN
        return ("Task: {task}, State: {state};\n" + end if state_in_prompt else "Task: {task}\n") + queries


class AugmentationConfig(Augmentation):
    """How images are changed: all cameras alike, but for those that have their own."""

    cameras: dict[str, Augmentation] = Field(default_factory=dict, description="by the robot file's name of the camera")


class EnvironmentConfig(Frozen):
    """Closed loop during training: the policy drives a simulated robot (docs/environments.md)."""

    names: tuple[str, ...] = Field(min_length=1, description="such as aloha/transfer_cube")
    episodes: Positive = 10
    first_seed: int = Field(default=1_000_000, description="of the first start; demonstrations have smaller seeds")
    execute: Positive | None = Field(default=None, description="actions of a chunk before the next; default: half")
    every: Positive | None = Field(
        default=None, description="steps between two times that it drives; default: at the end of each stage"
    )


class StartConfig(Frozen):
    """Where a run begins: parts of a checkpoint (training.import_weights, or `policy` of a run), the rest new."""

    checkpoint: Path
    parts: Annotated[tuple[StartPart, ...], Field(min_length=1)] = Field(
        default=get_args(StartPart), description="what is taken; [vision, backbone] gives a new expert"
    )
    adapter: Path | None = Field(default=None, description="folder of a LoRA adapter of these weights, to merge")
    statistics: Literal["data", "keep"] = Field(
        default="data",
        description="normalisation and action tokens: fitted on the new data, or the checkpoint's, for the same robot",
    )


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


class Gate(Frozen):
    """What a figure must reach: rates at least something, errors and losses at most; a number alone is the least."""

    least: Bound | None = None
    most: Bound | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, given: Any) -> Any:
        return {"least": given} if isinstance(given, (int, float)) else given

    @model_validator(mode="after")
    def _check_bounds(self) -> Gate:
        if self.least is None and self.most is None:
            raise ValueError("expected least or most, got none")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError(f"least: expected at most most ({self.most:g}), got {self.least:g}")
        return self

    def met(self, value: float) -> bool:
        """NaN, a figure without a value, meets nothing."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        bounds = (("at least", self.least), ("at most", self.most))
        return " and ".join(f"{what} {bound:g}" for what, bound in bounds if bound is not None)


Gates = dict[str, Gate]


class StageConfig(Frozen):
    """One stage of training: which losses count, which parts learn, for how long, from how many samples of what.

    Every step draws one batch from each of `sources`, in their order, and computes the losses that the batch has
    targets for. `gates` are figures (docs/training.md lists them) that must be reached before the next stage, and
    `gates_at` those that must be reached after so many of its steps.
    `train`, `freeze` and `learning_rates` name parts (`Part`) or glob patterns over the names of parameters
    (training/optimizer.py).
    """

    name: str
    steps: Positive
    learning_rate: Rate = Field(description="the largest, after warm-up")
    learning_rates: dict[str, Rate] = Field(default_factory=dict, description="of parts; the last that matches counts")
    final_learning_rate: NotNegative | None = Field(
        default=None, description="where the cosine ends, other parts in proportion; by default a twentieth"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = WARMUP_STEPS
    decay_steps: Positive | None = Field(default=None, description="where the cosine ends, warm-up included; steps")
    weight_decay: NotNegative = 0.0
    weight_decay_on: Literal["matrices", "all"] = Field(
        default="matrices", description="all: norms, biases, the token table and positions too"
    )
    betas: tuple[Share, Share] = (0.9, 0.95)
    largest_norm: Rate = Field(default=1.0, description="of all gradients of a step; longer ones are scaled down to it")
    losses: Annotated[dict[Loss, Rate], Field(min_length=1)]
    train: Annotated[tuple[str, ...], Field(min_length=1)]
    freeze: tuple[str, ...] = ()
    insulate: bool = True
    sources: Annotated[dict[str, Positive], Field(min_length=1)]
    noise_samples: Positive = Field(default=1, description="flow samples drawn for each prefix")
    accumulate: Positive = Field(
        default=1, description="pieces that a source's batch is computed in, to save memory; the gradient is the same"
    )
    checkpoint_every: Positive = 500
    evaluate_every: Positive | None = Field(
        default=None, description="steps between figures on held-out data; default: only at the stage's end"
    )
    gates: Gates = Field(default_factory=dict)
    gates_at: dict[Positive, Gates] = Field(default_factory=dict, description="gates by the step they come after")

    @property
    def learns_action_tokens(self) -> bool:
        """Whether chunks must be written as tokens for it."""
        return bool(self.losses.keys() & {"fast", "tokens"})

    @model_validator(mode="after")
    def _check_losses(self) -> StageConfig:
        if {"flow", "regression"} <= self.losses.keys():
            raise ValueError("losses: expected flow or regression, which share their weights, got both")
        if "regression" in self.losses and self.noise_samples > 1:
            raise ValueError(
                f"noise_samples: expected 1 with the loss regression, which draws no noise, got {self.noise_samples}"
            )
        if "tokens" in self.losses and (given := sorted(self.losses.keys() & {"text", "fast"})):
            raise ValueError(
                f"losses: expected tokens, one cross-entropy over text and FAST, or text and fast, got tokens and "
                f"{' and '.join(given)}"
            )
        return self

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
        if late := [step for step in self.gates_at if step > self.steps]:
            raise ValueError(f"gates_at: expected steps of this stage, 1 to {self.steps}, got {late[0]}")
        return self

    @model_validator(mode="after")
    def _check_pieces(self) -> StageConfig:
        if self.accumulate > (most := max(self.sources.values())):
            raise ValueError(
                f"accumulate: expected at most {most}, the samples of the stage's largest source, got "
                f"{self.accumulate}; a piece has at least one sample"
            )
        return self


class TrainingConfig(Frozen):
    """A whole training run."""

    name: str
    robot: str = Field(description="the robot that the policy is for: its file, or the name of one in config/robots/")
    horizon: Horizon | None = Field(
        default=None, description="actions of a chunk, of all robots; default: as the robot file says"
    )
    action_period_s: ActionPeriod | None = Field(
        default=None, description="seconds between a chunk's actions, of all robots; default: as the robot file says"
    )
    recipe: str | None = Field(
        default=None, description="a file in config/training/recipes/, or one's own, that was laid over the file"
    )
    seed: Annotated[int, Field(ge=0)] = 0
    out: Path
    keep: Positive = Field(default=2, description="how many of the run's last checkpoints stay")
    threads: Positive = 1
    workers: int = Field(default=0, ge=0, description="processes that read and decode the next steps' samples")
    cache_gb: NotNegative = Field(
        default=2.0, description="memory for decoded images, at the model's size, over all data"
    )
    parallel: ParallelConfig = ParallelConfig()
    sources: dict[str, Annotated[tuple[Entry, ...], Field(min_length=1)]] = Field(
        min_length=1, description="data by the name that stages draw it under; each is a mixture with weights"
    )
    made_by: str | None = Field(
        default=None, description="the command that makes the data, for whoever has none of it yet"
    )
    held_out: dict[str, Annotated[tuple[Entry, ...], Field(min_length=1)]] = Field(
        default_factory=dict, description="data of these names that figures are measured on, and nothing is trained on"
    )
    held_out_share: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.05, description="of the episodes of a dataset without data under held_out: kept apart for figures"
    )
    normalization: Normalization = "quantile"
    state_range: StateRange = Field(
        default="whole",
        description="with quantile, what -1 and 1 are of the state: all that the data has, or q01 and q99, as in pi0.5",
    )
    # Both are left out with `start`, which fills them in before anything else reads them.
    model: ModelConfig = Field(  # type: ignore[assignment]
        default=None, description="sizes; left out: those of the checkpoint under start"
    )
    vocabulary: VocabularyConfig = VocabularyConfig()
    action_tokens: Literal["fast", "naive"] = Field(
        default="fast", description="how chunks are written as tokens: FAST, or one token of 256 for each number"
    )
    naive_stride: Positive = Field(
        default=1, description="with naive: only every so many-th action is written, and the last; lines between them"
    )
    postfix: PostfixKind = Field(
        default="bare",
        description="what a chunk's tokens stand in: nothing; or whole, as openpi's pi0-FAST: `Action: `, the tokens, "
        "`|` and end-of-sequence, all of them learned",
    )
    fast_vocabulary: Positive = 512
    fast_scale: Rate = 10.0
    fast_merges: Literal["coefficients", "bytes", "none"] = Field(
        default="coefficients",
        description="what the fitted FAST vocabulary merges: whole coefficients; the bytes of their characters, as "
        "the published one (256 of its tokens are the bytes); or none but the zeros at a chunk's end, one token, so "
        "that a token's number says whose coefficient it is: small models learn that soonest",
    )
    fast_merged: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="at most so many of the fitted FAST tokens stand for several coefficients; with few (16), a small "
        "model knows from a token's number which joint comes next; default: as many as fast_vocabulary has room for",
    )
    fast_published: Path | None = Field(
        default=None,
        description="folder with a published FAST vocabulary (tokenizer.json, processor_config.json), used in place of "
        "one with fast_vocabulary tokens fitted on the data",
    )
    prompt: PromptConfig = Field(  # type: ignore[assignment]
        default=None, description="left out: that of the policy under start"
    )
    augmentation: AugmentationConfig = AugmentationConfig()
    hints: HintsConfig | None = None
    sampler: SamplerName = Field(
        default="flow",
        description="how the model is asked for chunks: by the flow, token by token, or all at once",
    )
    token_temperature: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="of sampler tokens: 0 takes the likeliest token, 1 draws by how likely each is",
    )
    flow_steps: Positive = Field(default=10, description="Euler steps that the model is measured with and runs with")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="decay of the weights' moving average, which is then measured and exported"
    )
    start: StartConfig | None = Field(default=None, description="weights to begin with; none: from scratch")
    lora: LoraSettings | None = None
    max_prefix_delay: int = Field(
        default=0, ge=0, description="largest clean chunk prefix (actions) that training conditions on"
    )
    prefix_lead: NotNegative = Field(
        default=0.0,
        description="how many actions the clean prefix may be ahead of the arm; for chunks whose velocity is a "
        "function of the position. 0: it begins where the arm is, as in a recording",
    )
    environment: EnvironmentConfig | None = None
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]

    @field_validator("sources", "held_out", mode="before")
    @classmethod
    def _name_kinds(cls, sources: Any) -> Any:
        """One kind of data under each name: a batch is of robots, or of language."""
        if isinstance(sources, Mapping):
            for name, entries in sources.items():
                entries = [entry for entry in entries if isinstance(entry, Mapping)] if _is_list(entries) else []
                for entry in entries:
                    if len(found := [kind for kind in KINDS if kind in entry]) != 1:
                        near = [did_you_mean(str(key), KINDS) for key in entry if key not in LeRobotEntry.model_fields]
                        raise ValueError(
                            f"{name}: expected one of the keys {', '.join(KINDS)} in each entry, got "
                            f"{' and '.join(found) or short_repr(entry)}{next(filter(None, near), '')}"
                        )
                kinds = {"lerobot" in entry for entry in entries}
                if len(kinds) > 1:
                    raise ValueError(
                        f"{name}: expected LeRobot datasets alone, or vision-language data alone, got both; give each "
                        "a name of its own"
                    )
        return sources

    @model_validator(mode="after")
    def _check_sources(self) -> TrainingConfig:
        if unknown := sorted(self.held_out.keys() - self.sources.keys()):
            raise ValueError(f"held_out: expected some of {', '.join(self.sources)}, got {', '.join(unknown)}")
        names = [stage.name for stage in self.stages]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"stages: expected different names, got {', '.join(twice)} twice")
        for stage in self.stages:
            if unknown := sorted(stage.sources.keys() - self.sources.keys()):
                raise ValueError(
                    f"stage {stage.name}: sources: expected some of {', '.join(self.sources)}, got {', '.join(unknown)}"
                )
        return self

    @model_validator(mode="after")
    def _check_action_tokens(self) -> TrainingConfig:
        if self.action_tokens == "fast":
            if self.naive_stride != 1:
                raise ValueError(f"naive_stride: expected it with action_tokens: naive alone, got {self.naive_stride}")
            if self.fast_merged is not None and self.fast_merges == "none":
                raise ValueError(f"fast_merged: expected none with fast_merges: none, got {self.fast_merged}")
            if self.fast_published is not None and (self.fast_merges != "coefficients" or self.fast_merged is not None):
                raise ValueError(
                    "fast_merges, fast_merged: expected neither with fast_published, whose merges are in its file, got "
                    f"{self.fast_merges}, {self.fast_merged}"
                )
            return self
        for key, field in type(self).model_fields.items():
            if key.startswith("fast_") and getattr(self, key) != field.default:
                raise ValueError(f"{key}: expected it with action_tokens: fast alone, got action_tokens: naive")
        if self.normalization != "quantile":
            raise ValueError(
                f"action_tokens: naive: expected normalization quantile, as bins end at -1 and 1, got "
                f"{self.normalization}"
            )
        if self.hints is not None and self.hints.readout_frequencies:
            raise ValueError(
                "hints.readout_frequencies: expected 0 with action_tokens: naive, as they are FAST's, got "
                f"{self.hints.readout_frequencies}"
            )
        return self

    @model_validator(mode="after")
    def _check_normalization(self) -> TrainingConfig:
        if self.state_range == "quantile" and self.normalization != "quantile":
            raise ValueError(f"state_range: expected quantile with normalization quantile, got {self.normalization}")
        return self

    @model_validator(mode="after")
    def _check_start(self) -> TrainingConfig:
        for key in ("model", "prompt"):
            if self.start is None and getattr(self, key) is None:
                raise ValueError(f"{key}: expected it, or a checkpoint to start from (start), got neither")
        if self.start is None:
            parts = ("vision", "backbone") + (("expert",) if self.model.actions == "expert" else ())
            if without := [part for part in parts if getattr(self.model, part) is None]:
                raise ValueError(
                    f"model.{without[0]}: expected its sizes, or a checkpoint to start from (start), got neither"
                )
        return self

    @model_validator(mode="after")
    def _check_actions(self) -> TrainingConfig:
        for stage in self.stages if self.model is not None else ():
            of_expert = sorted(stage.losses.keys() & {"flow", "regression"})
            if of_expert and self.model.actions == "backbone" and stage.insulate:
                raise ValueError(
                    f"stage {stage.name}: insulate: expected false for the loss {of_expert[0]} with model.actions: "
                    "backbone, whose own layers it trains, got true"
                )
            if of_expert and self.model.hybrid_mask and stage.noise_samples > 1:
                raise ValueError(
                    f"stage {stage.name}: noise_samples: expected 1 with model.hybrid_mask, as FAST tokens see one "
                    f"noisy chunk, got {stage.noise_samples}"
                )
        if self.model is not None and self.model.hybrid_mask and self.sampler == "tokens":
            raise ValueError(
                "sampler: expected flow with model.hybrid_mask, whose tokens come with noisy actions alone, got tokens"
            )
        return self

    @model_validator(mode="after")
    def _check_sampler(self) -> TrainingConfig:
        learned = sorted({loss for stage in self.stages for loss in stage.losses})
        for one, other in (("regression", "flow"), ("flow", "regression")):
            if self.sampler == one and other in learned and one not in learned:
                raise ValueError(f"sampler: expected {other}, the loss that the run learns, got {one}")
        if self.sampler == "tokens" and not any(s.learns_action_tokens for s in self.stages) and self.start is None:
            raise ValueError(
                "sampler: tokens: expected a stage with the loss fast or tokens, which it needs, got only "
                f"{', '.join(learned)}"
            )
        return self

    @property
    def learned_by_expert(self) -> Loss | None:
        """What the expert learns, or has learned where the run begins; None: nothing."""
        learned = {loss for stage in self.stages for loss in stage.losses}
        if "regression" in learned or self.sampler == "regression":
            return "regression"
        return "flow" if "flow" in learned or self.start is not None else None

    @property
    def has_action_tokens(self) -> bool:
        """Whether the run learns actions as tokens, or acts by them."""
        return self.sampler == "tokens" or any(stage.learns_action_tokens for stage in self.stages)

    @model_validator(mode="after")
    def _check_hints(self) -> TrainingConfig:
        if self.hints is None:
            for stage in self.stages:
                if given := sorted(HINTS & stage.losses.keys()) + ["heads"] * ("heads" in stage.train):
                    raise ValueError(f"stage {stage.name}: expected hints for {', '.join(given)}, got none")
            return self
        # What the last layer's attention finds goes into no key or value, so the expert could not read it.
        if self.model is None or self.model.backbone is None:
            return self
        layer, last = self.hints.probe_layer, self.model.backbone.depth - 2
        if not 0 <= layer <= last:
            raise ValueError(f"hints.probe_layer: expected 0..{last}, before the last layer, got {layer}")
        if not 0 <= self.hints.probe_head < self.model.backbone.heads:
            raise ValueError(
                f"hints.probe_head: expected 0..{self.model.backbone.heads - 1}, as the backbone has "
                f"{self.model.backbone.heads} heads, got {self.hints.probe_head}"
            )
        if self.hints.readout_frequencies > self.vocabulary.queries:
            raise ValueError(
                f"hints.readout_frequencies: expected at most vocabulary.queries ({self.vocabulary.queries}), one "
                f"token each, got {self.hints.readout_frequencies}"
            )
        return self


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def load_config(path: Path) -> TrainingConfig:
    """Read and check a training YAML; ConfigurationError names file, key and fault."""
    laid: list[str] = []
    common: dict[str, Any] = {}  # what each stage of a recipe has

    def prepare(content: Any) -> Any:
        whole = lay_recipe(content, lambda line: print(f"{path}: {line}", file=sys.stderr, flush=True))
        if whole is not content:
            laid.append(f"; the recipe {find_recipe(str(content['recipe']))} is laid over it")
            common.update(content["stage"])
        return whole

    def origin(place: Place) -> Place:
        if not laid or place[:1] != ("stages",):
            return place
        return ("stage", *place[2:]) if place[2:] and place[2] in common else ()

    try:
        return read_yaml(path, TrainingConfig, "training configuration", "config/training/", prepare, origin)
    except ConfigurationError as error:
        if laid:  # the fault may be there, and no line of this file
            raise ConfigurationError(f"{error}{laid[0]}") from error
        raise
