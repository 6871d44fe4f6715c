"""LoRA by peft: two small factors beside each linear layer learn, while the layer's own weight stays.

Insulation is where it was: keys and values reach the expert through a stop-gradient, whatever made them. A run's
checkpoints hold the factors and what else is trained; the weights that they belong to come from where the run began.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError
from training.config import LoraSettings
from training.model import VLA, VLAConfig
from training.storage import whole_folder, writing
from training.weights import ADAPTER, their_name

BASE = ".base_layer."
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.default\.weight")
SAMPLED = 4096  # numbers of each weight in a fingerprint


def add_lora(model: VLA, settings: LoraSettings, seed: int) -> None:
    """Put factors beside the linear layers that the settings name, in place; at first they change nothing."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    linear = rf"\.layers\.\d+\.((attention|mlp)\.)?({'|'.join(settings.targets)})"
    for part in settings.parts:
        if not any(re.fullmatch(part + linear, name) for name, _ in model.named_modules()):
            raise ConfigurationError(
                f"lora: targets: expected linear layers of {part}, got {', '.join(settings.targets)}, none of which it "
                "has; vision has q, k, v, out, up and down"
            )
    within = f"({'|'.join(settings.parts)}){linear}"
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=within)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def fingerprint(model: VLA) -> str:
    """A hash of the weights without the factors, from some thousand numbers of each: of what a run began with."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not FACTOR.fullmatch(name):
            flat = parameter.detach().flatten()
            found.update(name.replace(BASE, ".").encode())
            found.update(flat[:: max(1, len(flat) // SAMPLED)].float().cpu().numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def merge(weights: Mapping[str, Tensor], settings: LoraSettings) -> dict[str, Tensor]:
    """The weights by the names of a model without LoRA: W + alpha / rank * B A, as peft merges."""
    merged = {name.replace(BASE, "."): tensor for name, tensor in weights.items() if not FACTOR.fullmatch(name)}
    for name in weights:
        if (found := FACTOR.fullmatch(name)) and found["factor"] == "A":
            module = found["module"]
            product = weights[f"{module}.lora_B.default.weight"] @ weights[name]
            merged[f"{module}.weight"] = merged[f"{module}.weight"] + settings.alpha / settings.rank * product
    return merged


def save_adapter(
    folder: Path, weights: Mapping[str, Tensor], trained: Iterable[str], settings: LoraSettings, config: VLAConfig
) -> None:
    """Write what was trained as peft does, to be merged with `--lora` of training.import_weights or `start.adapter`.

    Names are openpi's where the model has that form, else ours.
    """
    from peft import LoraConfig

    def named(parameter: str) -> str:
        return their_name(parameter, config) if config.vision.stem == "patch" else parameter

    factors, whole = {}, {}
    for name in trained:
        if found := FACTOR.fullmatch(name):
            module = named(f"{found['module']}.weight").removesuffix(".weight")
            factors[f"base_model.model.{module}.lora_{found['factor']}.weight"] = weights[name]
        else:
            whole[f"base_model.model.{named(name.replace(BASE, '.'))}"] = weights[name]
    modules = [
        {re.sub(pattern, "", key.removeprefix("base_model.model.")) for key in keys}
        for keys, pattern in ((factors, r"\.lora_[AB]\.weight$"), (whole, r"\.(weight|bias)$"))
    ]
    described = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=sorted(modules[0]),
        modules_to_save=sorted(modules[1]) or None,
    )
    with whole_folder(folder) as part, writing(folder / ADAPTER):
        described.save_pretrained(str(part))
        save_file({key: tensor.contiguous() for key, tensor in (factors | whole).items()}, part / ADAPTER)
