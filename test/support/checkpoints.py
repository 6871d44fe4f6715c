"""Small checkpoints for the tests of the export and of the engines that run it."""

from __future__ import annotations

from pathlib import Path

import torch

from ki_vla_ros.bundle.folder import TOKENIZER
from ki_vla_ros.bundle.manifest import PolicySpec
from support.bundles import demo_policy, state_token_policy
from support.vocabularies import demo_tokenizer
from training.model.gemma import GemmaConfig
from training.model.siglip import VisionConfig
from training.model.vla import VLA, VLAConfig
from training.weights.checkpoints import POLICY, save_checkpoint

FIGURES = {"follow_rate": 0.93}


def small_policy(kind: str) -> PolicySpec:
    policy = demo_policy() if kind == "text" else state_token_policy()
    fields = policy.model_dump()
    fields["image"]["size"] = 24
    fields["provenance"]["figures"] = FIGURES
    return PolicySpec.model_validate(fields)


def write_checkpoint(folder: Path, kind: str) -> Path:
    """Weights far from initial values, with which the expert ignores the prefix and any export would look right."""
    torch.manual_seed(0)
    tokenizer = demo_tokenizer(fast_vocab=16)
    config = VLAConfig(
        vision=VisionConfig(image_size=24, patch_size=12, width=16, depth=1, heads=2, mlp=32, stem="conv"),
        backbone=GemmaConfig(width=32, depth=2, mlp=48, heads=2, kv_heads=1, head_dim=16),
        expert=GemmaConfig(width=24, depth=2, mlp=32, heads=2, kv_heads=1, head_dim=16),
        vocab_size=tokenizer.get_vocab_size(),
        action_dim=7,
        horizon=16,
        state_dim=None if kind == "text" else 7,
    )
    model = VLA(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_checkpoint(folder, model)
    tokenizer.save(str(folder / TOKENIZER))
    (folder / POLICY).write_text(small_policy(kind).model_dump_json())
    return folder
