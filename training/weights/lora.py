"""LoRA adapters as peft writes them: `adapter_config.json` and `adapter_model.safetensors`, merged into the weights.

A linear layer's weight W becomes W + alpha / rank * B A. Layers that were trained whole (peft's modules_to_save) and
trained biases take the place of their base's. What else peft can do is refused by name: nothing of an adapter is left
out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError, describe_validation
from training.weights.files import WeightFiles, refuse_pickle, shorten
from training.weights.statistics import read_json

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
WHOLE = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)")
# Keys of any LoRA: peft's (lora_A, lora_magnitude_vector, base_layer), or openpi's in JAX (lora_a, linear_lora_b).
TRACES = re.compile(r"(^|[._/])lora_|\.base_layer\.|\.modules_to_save\.")
MERGE = "merge it with peft's merge_and_unload, and import the result"
Positive = Annotated[float, Field(gt=0, le=1e6)]
Rank = Annotated[int, Field(gt=0, le=1 << 20)]
# How the adapter was trained, or which layers it was put on: its keys say that too.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config", "exclude_modules"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "modules_to_save"),
    *("peft_version", "qalora_group_size", "revision", "target_modules", "task_type"),
}
# A regular expression in peft; from a file that someone else made, only plain names are taken.
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")]


class AdapterConfig(BaseModel):
    """What of peft's adapter_config.json decides how the adapter is merged."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    peft_type: Literal["LORA"]
    r: Rank
    lora_alpha: Positive
    use_rslora: bool = False
    rank_pattern: dict[ModuleName, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[ModuleName, Positive] = Field(default_factory=dict)
    # The others (pissa, olora, loftq) change the base.
    init_lora_weights: Literal[True, False, "gaussian", "eva", "orthogonal"] = True

    @model_validator(mode="before")
    @classmethod
    def _nothing_else(cls, content: Any) -> Any:
        """DoRA and other kinds are settings too, and new ones come: what is unknown must be off."""
        given = {key: value for key, value in content.items() if value is not None}
        if on := sorted(key for key, value in given.items() if value and key not in cls.model_fields.keys() | HARMLESS):
            raise ValueError(f"expected a plain LoRA, got one with {', '.join(on)}")
        return given

    def rank(self, module: str) -> float:
        return of_module(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What B A is multiplied by."""
        rank = self.rank(module)
        return of_module(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def of_module(values: Mapping[str, float], module: str, default: float) -> float:
    """peft's rule: the first key that is the module's name, or that it ends with after a dot."""
    return next((value for key, value in values.items() if f".{module}".endswith(f".{key}")), default)


class Adapter:
    """An adapter; `spell` brings its keys to the spelling in which weights are named here."""

    def __init__(self, folder: Path, spell: Callable[[Iterable[str], Path], dict[str, str]]) -> None:
        """ConfigurationError if the folder holds no adapter, or one that cannot be merged."""
        self.path = folder / ADAPTER
        if not self.path.exists() and (pickle := folder / "adapter_model.bin").exists():
            refuse_pickle(pickle)
        try:
            self.config = AdapterConfig.model_validate(read_json(folder / ADAPTER_CONFIG))
        except ValueError as error:  # pydantic also raises it for what is no text
            fault = describe_validation(error) if isinstance(error, ValidationError) else error
            raise ConfigurationError(
                f"{folder / ADAPTER_CONFIG}: expected a LoRA that can be merged: {fault}; {MERGE}"
            ) from error
        self._files = WeightFiles([self.path])
        keys = [key for key in self._files.shapes if ".original_module." not in key]  # what training started from
        bare = {WHOLE.sub("", key.removeprefix(PREFIX)): key for key in keys}
        if len(bare) < len(keys):
            twice = sorted(set(keys) - set(bare.values()))
            raise ConfigurationError(f"{self.path}: expected each weight once, got {shorten(twice)} twice; {MERGE}")
        self._whole: dict[str, str] = {}  # their key, by the weight's name
        self._factors: dict[str, dict[str, str]] = {}  # their keys of A and B, by the module's name
        self._peft_name: dict[str, str] = {}  # by the module's name: patterns go by it
        faults = []
        for spelled, key in spell(bare, self.path).items():
            if match := FACTOR.fullmatch(spelled):
                self._factors.setdefault(match["module"], {})[match["factor"]] = bare[key]
                self._peft_name[match["module"]] = FACTOR.sub(r"\g<module>", key)
            elif TRACES.search(spelled):
                faults.append(bare[key])
            else:
                self._whole[spelled] = bare[key]
        faults += [f"{module}.lora_{only} alone" for module, (only, *rest) in self._factors.items() if not rest]
        if faults:
            raise ConfigurationError(
                f"{self.path}: expected lora_A and lora_B of linear layers, and whole weights, got {shorten(faults)}; "
                f"{MERGE}"
            )

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """ConfigurationError unless all of the adapter fits weights of the model, whose shapes these are."""
        faults = []
        for module, keys in self._factors.items():
            expected = shapes.get(f"{module}.weight", ())
            a, b = (self._files.shapes[keys[factor]] for factor in "AB")
            rank = self.config.rank(self._peft_name[module])
            if not expected and not self._files.get(keys["B"]).any():
                continue  # peft also adapts layers that the model does not run; there is nothing to merge
            if not (len(expected) == len(a) == len(b) == 2 and (b[0], a[1]) == expected and a[0] == b[1] == rank):
                wanted = f"B [{expected[0]}, {rank:g}], A [{rank:g}, {expected[1]}]" if len(expected) == 2 else "none"
                faults.append(f"{module}: expected {wanted}, got B {list(b)}, A {list(a)}")
        for name, key in self._whole.items():
            if (got := self._files.shapes[key]) != shapes.get(name):
                faults.append(f"{name}: expected {list(shapes[name]) if name in shapes else 'none'}, got {list(got)}")
        if faults:
            raise ConfigurationError(f"{self.path}: expected an adapter of these weights\n  {shorten(faults)}\n{MERGE}")

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """The weight with the adapter in it, in its own type; the sum is computed in float32."""
        if name in self._whole:
            weight = self._files.get(self._whole[name], weight.dtype)
        module = name.removesuffix(".weight")
        if module == name or module not in self._factors:
            return weight
        a, b = (self._files.get(self._factors[module][factor], torch.float32) for factor in "AB")
        return (weight.float() + self.config.scale(self._peft_name[module]) * (b @ a)).to(weight.dtype)


def refuse_lora(keys: Iterable[str], path: Path, lora: Path | None) -> None:
    """ConfigurationError if there is LoRA in the weights at `path`, or beside them unless it is the adapter `lora`."""
    found = [key for key in keys if TRACES.search(key)]
    if lora is None and (path / ADAPTER).exists():
        found.append(ADAPTER)
    if found:
        raise ConfigurationError(
            f"{path}: expected whole weights, got LoRA beside them: {shorten(found)}; merge it first (peft: "
            "merge_and_unload; openpi: as docs/weights.md shows, before the conversion), or give the folder of peft's "
            f"{ADAPTER} with --lora, and the weights that it was trained on with --from"
        )
