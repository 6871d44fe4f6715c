"""A model that is small but deep enough for its activations to say something."""

from training.model.gemma import GemmaConfig
from training.model.siglip import VisionConfig
from training.model.vla import VLAConfig

SMALL = VLAConfig(
    vision=VisionConfig(image_size=56, patch_size=28, width=64, depth=6, heads=2, mlp=128),
    backbone=GemmaConfig(width=128, depth=6, mlp=256, heads=4, kv_heads=1, head_dim=32),
    expert=GemmaConfig(width=64, depth=6, mlp=128, heads=4, kv_heads=1, head_dim=32),
    vocab_size=512,
    action_dim=5,
    horizon=8,
)
