"""Checkpoints of named sizes with random weights, to export, build and time untrained; never for an arm.

    python -m training.export.random_weights --size pi05 --out out/random/pi05

writes a checkpoint folder that `training.export` reads; `--bundle FOLDER` exports it too. The weights are drawn so that
activations keep about unit size in every layer, every residual branch is open and time conditioning has an effect: so a
wrong layer shows in the chunk. With freshly initialised weights (closed branches) it would not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ki_vla_ros.bundle import PolicySpec
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.errors import ConfigurationError
from training.export.bundle import DTYPES, export_bundle
from training.model import GemmaConfig, VisionConfig, VLAConfig, paligemma_3b
from training.policy import describe_random_policy
from training.tokens import (
    LEAST_SIZE,
    VOCABULARY,
    VocabularyConfig,
    make_vocabulary,
    prompt_template,
    prompt_vocab_size,
)
from training.weights import empty_model, save_checkpoint, shapes

PROMPT_ROWS = 256_000  # of PaliGemma's token table; the rest are places and segments, which no prompt holds
PLAIN_PROMPT = "{task}\n"  # pi0's
OUTLIERS = 3.0  # where weights are clamped, in standard deviations


def pi05_slice() -> VLAConfig:
    """Two layers of each part of pi0.5 at full width, for builders that care only about widths and types."""
    config = paligemma_3b("pi05")
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, depth=2),
        backbone=dataclasses.replace(config.backbone, depth=2),
        expert=dataclasses.replace(config.expert, depth=2),
        vocab_size=1024,
    )


def hundred_million() -> VLAConfig:
    """About 100 M weights: large enough for arithmetic to dominate on a CPU, small enough for a thousand calls."""
    return VLAConfig(
        VisionConfig(image_size=224, patch_size=28, width=384, depth=12, heads=6, mlp=1536),
        GemmaConfig(width=768, depth=10, mlp=2304, heads=8, kv_heads=1, head_dim=64),
        GemmaConfig(width=320, depth=10, mlp=1280, heads=8, kv_heads=1, head_dim=64),
        vocab_size=1024,
        action_dim=7,
        horizon=50,
    )


SIZES: dict[str, Callable[[], VLAConfig]] = {
    "100m": hundred_million,
    "pi05-slice": pi05_slice,
    "pi05": lambda: paligemma_3b("pi05"),
    "pi0": lambda: paligemma_3b("pi0"),
}
PROMPT_LENGTH = {"100m": 48, "pi05-slice": 200, "pi05": 200, "pi0": 48}


def policy_spec(config: VLAConfig, name: str, cameras: int, prompt_length: int, seed: int) -> PolicySpec:
    """The policy of an arm that does not exist: `action_dim` joints, absolute actions over their whole range."""
    text_state = config.state_dim is None
    everywhere = {"low": [-3.0] * config.action_dim, "high": [3.0] * config.action_dim}
    return describe_random_policy(
        config.action_dim,
        seed,
        name=f"random {name}",
        created="2026-11-21",
        cameras=[{"name": camera} for camera in ("base", "left_wrist", "right_wrist")[:cameras]],
        image={"size": config.vision.image_size},
        prompt={"template": prompt_template(0) if text_state else PLAIN_PROMPT, "length": prompt_length},
        state={"encoding": "text" if text_state else "token", **everywhere},
        action=everywhere,
        horizon=config.horizon,
    )


def stand_in_tokenizer(vocab_size: int) -> Tokenizer:
    """A vocabulary of the model's size, for which no instruction is unknown; the rest is filler that no text yields.

    At PaliGemma's size a prompt can hold 256000 ids, as PaliGemma's can; the others stay behind at export.
    """
    small = VocabularyConfig(kind="bpe", size=LEAST_SIZE, locations=32)
    smallest = make_vocabulary(small, (), 1)
    answers = smallest.get_vocab_size() - prompt_vocab_size(smallest) - 1
    rows = PROMPT_ROWS if vocab_size == VOCABULARY else prompt_vocab_size(smallest)
    fast = vocab_size - rows - answers
    if fast < 1:
        raise ConfigurationError(f"vocab_size: expected at least {rows + answers + 1} for any text, got {vocab_size}")
    tokenizer = make_vocabulary(small, (), fast)
    description = json.loads(tokenizer.to_str())
    first, shift = prompt_vocab_size(tokenizer), rows - prompt_vocab_size(tokenizer)
    vocabulary = {token: i + shift * (i >= first) for token, i in description["model"]["vocab"].items()}
    vocabulary |= {f"<filler {n}>": first + n for n in range(shift)}
    description["model"]["vocab"] = vocabulary
    for token in description["added_tokens"]:
        token["id"] = vocabulary[token["content"]]
    return Tokenizer.from_str(json.dumps(description))


def draw_weights(config: VLAConfig, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """One tensor of `dtype` per weight; the model is never built, so this takes their size in memory only once."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(config).items():
        mean, std = _distribution(name, shape)
        weight = torch.empty(shape, dtype=dtype)
        torch.nn.init.normal_(weight, mean, std, generator=generator)
        weights[name] = weight.clamp_(mean - OUTLIERS * std, mean + OUTLIERS * std)
    return weights


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of one weight."""
    fan_in = math.prod(shape[1:])
    if ".dense.bias" in name:
        return 0.0, 0.3  # gates, scales and shifts: the branches of the expert are open
    if ".dense.weight" in name:
        return 0.0, 0.3 * fan_in**-0.5
    if name.startswith("vision.") and "norm" in name and name.endswith("weight"):
        return 1.0, 0.1  # LayerNorm; Gemma's norms store the distance from 1
    if name.startswith("backbone.embedding") or name.startswith("vision.position"):
        return 0.0, shape[1] ** -0.5
    if len(shape) == 1:
        return 0.0, 0.1
    return 0.0, fan_in**-0.5


def write_checkpoint(
    folder: Path, config: VLAConfig, policy: PolicySpec, seed: int = 0, dtype: torch.dtype = torch.float32
) -> None:
    """A folder that `training.export` and `training.weights.checkpoints.load_checkpoint` read."""
    weights, tokenizer = draw_weights(config, seed, dtype), stand_in_tokenizer(config.vocab_size)
    save_checkpoint(folder, empty_model(config), weights=weights, tokenizer=tokenizer, policy=policy)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.export.random_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--bundle", type=Path, help="export it to this folder as well")
    parser.add_argument("--cameras", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torch", action="store_true", help="with --bundle: both graphs for the torch engine as well")
    return run_command("random_weights", partial(_write, parser.parse_args(arguments)))


def _write(chosen: argparse.Namespace) -> int:
    config = SIZES[chosen.size]()
    policy = policy_spec(config, chosen.size, chosen.cameras, PROMPT_LENGTH[chosen.size], chosen.seed)
    write_checkpoint(chosen.out, config, policy, chosen.seed, DTYPES[chosen.dtype])
    if chosen.bundle is not None:
        export_bundle(chosen.out, chosen.bundle, "Random weights: **never for an arm**.", chosen.torch, chosen.dtype)
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
