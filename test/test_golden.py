"""The golden pi0.5: openpi's own outputs, reproduced by the classes that we train and export."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from training.model.gemma import GemmaConfig
from training.model.siglip import VisionConfig
from training.model.vla import VLA, Cache, VLAConfig
from training.weights.foreign import import_weights

GOLDEN = Path(__file__).parent / "golden"
CONFIG = VLAConfig(
    vision=VisionConfig(image_size=28, patch_size=14, width=48, depth=2, heads=4, mlp=96),
    backbone=GemmaConfig(width=64, depth=4, mlp=128, heads=8, kv_heads=1, head_dim=16),
    expert=GemmaConfig(width=32, depth=4, mlp=64, heads=8, kv_heads=1, head_dim=16),
    vocab_size=512,
    action_dim=7,
    horizon=10,
)
ATOL = 1e-4


def draw_weights() -> dict[str, Tensor]:
    """The golden's weights, each drawn by its key (see golden/README.md)."""
    shapes: dict[str, list[int]] = json.loads((GOLDEN / "pi05_small.keys.json").read_text())
    weights = {}
    for key, shape in shapes.items():
        generator = np.random.default_rng(zlib.crc32(key.encode()))
        weights[key] = torch.from_numpy(generator.standard_normal(shape).astype(np.float32) * np.float32(0.15))
    return weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VLA:
    path = tmp_path_factory.mktemp("golden") / "pi05.safetensors"
    save_file(draw_weights(), path)
    return import_weights(CONFIG, path, "pi05").eval()


@pytest.fixture(scope="module")
def case() -> dict[str, Tensor]:
    with np.load(GOLDEN / "pi05_small.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture(scope="module")
def cache(model: VLA, case: dict[str, Tensor]) -> Cache:
    with torch.no_grad():
        return model.prefill(case["images"], case["image_mask"], case["tokens"], case["token_mask"])


def test_prefix_embeddings(model: VLA, case: dict[str, Tensor]) -> None:
    with torch.no_grad():
        embed, mask = model.embed_prefix(case["images"], case["image_mask"], case["tokens"], case["token_mask"])
    assert mask.sum() == 2 * 4 + 8
    torch.testing.assert_close(embed, case["prefix_embeddings"], atol=ATOL, rtol=0)


@pytest.mark.parametrize(("name", "layer"), [("first", 0), ("last", -1)])
def test_keys_and_values(case: dict[str, Tensor], cache: Cache, name: str, layer: int) -> None:
    valid = cache.mask_BP[0]
    for kind, ours in (("k", cache.keys_NBKPD), ("v", cache.values_NBKPD)):
        torch.testing.assert_close(ours[layer][:, :, valid], case[f"{kind}_{name}"][:, :, valid], atol=ATOL, rtol=0)


@pytest.mark.parametrize("time", [1.0, 0.3])
def test_velocity(model: VLA, case: dict[str, Tensor], cache: Cache, time: float) -> None:
    with torch.no_grad():
        velocity = model.velocity(cache, case["noise"], torch.full((1, 10), time))
    torch.testing.assert_close(velocity, case[f"v_at_{time}"], atol=ATOL, rtol=0)


def test_actions(model: VLA, case: dict[str, Tensor], cache: Cache) -> None:
    with torch.no_grad():
        actions = model.sample_actions(cache, case["noise"], steps=10)
    torch.testing.assert_close(actions, case["actions"], atol=ATOL, rtol=0)
