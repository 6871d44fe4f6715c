"""A small pi0.5 as openpi would publish it, for docs/results/fine_tuning.md: new, or with weights that we trained.

    PYTHONPATH=test python -m support.small_pi05 new ROBOT OUT
    PYTHONPATH=test python -m support.small_pi05 publish POLICY OUT

Real ones cannot be downloaded everywhere, nor trained on a CPU. Each writes what `training.import_weights` reads:
weights in openpi's naming, sizes, sentencepiece tokenizer, norm_stats.json. FAST's ids are ours alone, so `publish`
leaves them out, as openpi's checkpoints do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from torch import Tensor

from ki_vla_ros.robot import Robot, find_robot, read_robot
from support.sentencepieces import train
from training.model import VLA, GemmaConfig, VisionConfig, VLAConfig
from training.weights.checkpoints import POLICY, load_checkpoint, read_policy
from training.weights.foreign import TABLE, their_name
from training.weights.statistics import OPENPI_EPSILON

# PaliGemma has seen every word; this tokenizer sees those of the robots' instructions and of the prompt.
WORDS = """Task: State: Action: pick up lift place put the a red green blue cube ball on in to of and
open close press push pull turn slide reach move goal door drawer window button faucet handle lever plate top side wall
"""


def small(vocabulary: int) -> VLAConfig:
    """pi0.5's form, with the widths of config/training/metaworld.yaml, and images in patches as PaliGemma has them."""
    return VLAConfig(
        vision=VisionConfig(image_size=96, patch_size=12, width=128, depth=4, heads=4, mlp=256),
        backbone=GemmaConfig(width=128, depth=5, mlp=256, heads=4, kv_heads=1, head_dim=32),
        expert=GemmaConfig(width=64, depth=5, mlp=256, heads=4, kv_heads=1, head_dim=32),
        vocab_size=vocabulary,
        action_dim=32,
        horizon=16,
    )


def write(out: Path, config: VLAConfig, weights: Mapping[str, Tensor], tokenizer: bytes, stats: object) -> None:
    out.mkdir(parents=True)
    theirs = {their_name(name, config): tensor.contiguous() for name, tensor in weights.items()}
    save_file(theirs, out / "model.safetensors")
    (out / "sizes.json").write_text(json.dumps(asdict(config), indent=1))
    (out / "paligemma_tokenizer.model").write_bytes(tokenizer)
    (out / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}, indent=1))


def tokenizer() -> ModelProto:
    return train(texts=[WORDS], vocab_size=640)


def new(robot: Robot, out: Path, seed: int) -> None:
    """Untrained: its statistics are those of no robot, of as many dimensions as `robot` has."""
    pieces = tokenizer()
    config = small(len(pieces.pieces))
    torch.manual_seed(seed)
    stats = {
        group: {"q01": [-1.0] * len(dimensions), "q99": [1.0] * len(dimensions)}
        for group, dimensions in (("state", robot.state), ("actions", robot.actions))
    }
    write(out, config, VLA(config).state_dict(), pieces.SerializeToString(), stats)


def publish(policy: Path, out: Path) -> None:
    """A policy that began as `new`, on whatever robot it was trained."""
    model, pieces = load_checkpoint(policy), tokenizer()
    weights, spec = model.state_dict(), read_policy(policy / POLICY)
    table = next(name for name in weights if their_name(name, model.config) == TABLE)
    weights[table] = weights[table][: len(pieces.pieces)]
    stats = {}
    for group, numbers in (("state", spec.state), ("actions", spec.action)):
        assert numbers.low is not None and numbers.high is not None
        # openpi divides by q99 - q01 + 1e-6.
        stats[group] = {"q01": list(numbers.low), "q99": [high - OPENPI_EPSILON for high in numbers.high]}
    write(out, replace(model.config, vocab_size=len(pieces.pieces)), weights, pieces.SerializeToString(), stats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("new")
    command.add_argument("robot")
    command.add_argument("out", type=Path)
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("publish")
    command.add_argument("policy", type=Path)
    command.add_argument("out", type=Path)
    given = parser.parse_args()
    if given.command == "new":
        new(read_robot(find_robot(given.robot)), given.out, given.seed)
    else:
        publish(given.policy, given.out)


if __name__ == "__main__":
    main()
