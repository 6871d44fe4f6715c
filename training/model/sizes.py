"""PaliGemma 3B and the policies on it at their published sizes (arXiv 2407.07726, 2410.24164, 2504.16054).

SigLIP So400m/14 at 224 pixels, Gemma 2B, and the 300M expert of pi0 and pi0.5.
"""

from __future__ import annotations

from typing import Literal

from training.model.gemma import GemmaConfig
from training.model.siglip import VisionConfig
from training.model.vla import VLAConfig
from training.tokens import VOCABULARY

SIGLIP_SO400M = VisionConfig(image_size=224, patch_size=14, width=1152, depth=27, heads=16, mlp=4304)
GEMMA_2B = GemmaConfig(width=2048, depth=18, mlp=16_384, heads=8, kv_heads=1, head_dim=256)
GEMMA_300M = GemmaConfig(width=1024, depth=18, mlp=4096, heads=8, kv_heads=1, head_dim=256)
GEMMA_DUMMY = GemmaConfig(width=64, depth=4, mlp=128, heads=8, kv_heads=1, head_dim=16)
# openpi's names, which LeRobot took over.
VARIANTS = {"gemma_2b": GEMMA_2B, "gemma_300m": GEMMA_300M, "dummy": GEMMA_DUMMY}
ACTION_DIM = 32
HORIZON = 50


def paligemma_3b(
    policy: Literal["pi0", "pi05"],
    action_ids: int = 0,
    horizon: int = HORIZON,
    *,
    backbone: GemmaConfig = GEMMA_2B,
    expert: GemmaConfig = GEMMA_300M,
) -> VLAConfig:
    """The sizes of pi0 (state token, time mixed with the actions) or pi0.5 (state as text, adaRMS).

    `action_ids` is the number of our own action tokens after the vocabulary.
    """
    return VLAConfig(
        vision=SIGLIP_SO400M,
        backbone=backbone,
        expert=expert,
        vocab_size=VOCABULARY + action_ids,
        action_dim=ACTION_DIM,
        horizon=horizon,
        state_dim=ACTION_DIM if policy == "pi0" else None,
        conditioning="concat" if policy == "pi0" else "adarms",
    )
