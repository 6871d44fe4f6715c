"""Small models: their sizes, weights away from initial values, and a batch with all that a mask must get right."""

import torch
from torch import Tensor

from training.model.gemma import GemmaConfig
from training.model.siglip import VisionConfig
from training.model.vla import VLA, Output, VLAConfig

CONFIG = VLAConfig(
    vision=VisionConfig(image_size=24, patch_size=12, width=16, depth=1, heads=2, mlp=32, stem="conv"),
    backbone=GemmaConfig(width=32, depth=3, mlp=48, heads=4, kv_heads=2, head_dim=8),
    expert=GemmaConfig(width=16, depth=3, mlp=32, heads=4, kv_heads=2, head_dim=8),
    vocab_size=50,
    action_dim=3,
    horizon=5,
)

# Deep enough for activations to be meaningful.
DEEP = VLAConfig(
    vision=VisionConfig(image_size=56, patch_size=28, width=64, depth=6, heads=2, mlp=128),
    backbone=GemmaConfig(width=128, depth=6, mlp=256, heads=4, kv_heads=1, head_dim=32),
    expert=GemmaConfig(width=64, depth=6, mlp=128, heads=4, kv_heads=1, head_dim=32),
    vocab_size=640,
    action_dim=5,
    horizon=8,
)

BATCH, CAMERAS, PROMPT, POSTFIX = 2, 2, 6, 4


def make_model(config: VLAConfig = CONFIG) -> VLA:
    """Weights away from initial values, with which expert branches are closed and would hide every fault."""
    torch.manual_seed(0)
    model = VLA(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def make_batch(state_dim: int | None = None, repeats: int = 1) -> dict[str, Tensor]:
    """The second sample lacks a camera, and has padding in prompt and postfix."""
    torch.manual_seed(1)
    rows = BATCH * repeats
    batch = {
        "images_BVCSS": torch.rand(BATCH, CAMERAS, 3, 24, 24) * 2 - 1,
        "image_mask_BV": torch.tensor([[True, True], [True, False]]),
        "tokens_BL": torch.randint(0, 50, (BATCH, PROMPT)),
        "token_mask_BL": torch.arange(PROMPT) < torch.tensor([[6], [4]]),
        "postfix_BT": torch.randint(0, 50, (BATCH, POSTFIX)),
        "postfix_mask_BT": torch.arange(POSTFIX) < torch.tensor([[4], [3]]),
        "x_t": torch.randn(rows, CONFIG.horizon, CONFIG.action_dim),
        "time": torch.rand(rows, CONFIG.horizon),
    }
    if state_dim is not None:
        batch["state"] = torch.randn(rows, state_dim)
    return batch


def prefix_of(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return batch["images_BVCSS"], batch["image_mask_BV"], batch["tokens_BL"], batch["token_mask_BL"]


def run(model: VLA, batch: dict[str, Tensor]) -> Output:
    with torch.no_grad():
        output: Output = model(**batch)
    return output
