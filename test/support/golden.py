"""The golden pi0.5's sizes and weights (test/contracts/golden/README.md), in openpi's spelling."""

import json
import zlib

import numpy as np
import torch
from torch import Tensor

from support import ROOT
from training.model.gemma import GemmaConfig
from training.model.siglip import VisionConfig
from training.model.vla import VLAConfig
from training.weights.foreign import HEAD, TABLE

GOLDEN = ROOT / "test" / "contracts" / "golden"


CONFIG = VLAConfig(
    vision=VisionConfig(image_size=28, patch_size=14, width=48, depth=2, heads=4, mlp=96),
    backbone=GemmaConfig(width=64, depth=4, mlp=128, heads=8, kv_heads=1, head_dim=16),
    expert=GemmaConfig(width=32, depth=4, mlp=64, heads=8, kv_heads=1, head_dim=16),
    vocab_size=512,
    action_dim=7,
    horizon=10,
)


def draw_weights() -> dict[str, Tensor]:
    """The golden's weights, each drawn by its key (see golden/README.md)."""
    shapes: dict[str, list[int]] = json.loads((GOLDEN / "pi05_small.keys.json").read_text())
    weights = {}
    for key, shape in shapes.items():
        generator = np.random.default_rng(zlib.crc32(key.encode()))
        weights[key] = torch.from_numpy(generator.standard_normal(shape).astype(np.float32) * np.float32(0.15))
    # One tensor in openpi's model, where the draw for the head's key is in force.
    weights[TABLE] = weights[HEAD].clone()
    return weights
