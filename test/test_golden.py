"""The golden pi0.5: openpi's own outputs, reproduced by the classes that we train and export."""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError
from training.checkpoints import import_openpi
from training.model.gemma import GemmaConfig
from training.model.siglip import VisionConfig
from training.model.vla import VLA, Cache, VLAConfig

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
def model() -> VLA:
    model = VLA(CONFIG)
    import_openpi(model, draw_weights(), "golden")
    return model.eval()


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


def test_import_accepts_other_hands(model: VLA) -> None:
    """LeRobot's prefix, a table stored only as `embed_tokens`, half precision."""
    weights = draw_weights()
    table = weights.pop("paligemma_with_expert.paligemma.lm_head.weight")
    weights["paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"] = table
    other = VLA(CONFIG)
    import_openpi(other, {f"model.{key}": tensor.bfloat16() for key, tensor in weights.items()}, "other")
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor.bfloat16().float()), name


def test_import_lists_what_does_not_fit() -> None:
    weights = draw_weights()
    weights["state_proj.weight"] = torch.zeros(32, 7)
    with pytest.raises(ConfigurationError, match=r"golden: .*\n.*1 unknown: state_proj\.weight"):
        import_openpi(VLA(CONFIG), weights, "golden")
    del weights["state_proj.weight"], weights["time_mlp_in.bias"]
    weights["action_in_proj.weight"] = torch.zeros(32, 32)
    with pytest.raises(ConfigurationError) as error:
        import_openpi(VLA(CONFIG), weights, "golden")
    assert "1 missing: time_mlp_in.bias" in str(error.value)
    assert "1 misshapen: action_in_proj.weight: expected [32, 7], got [32, 32]" in str(error.value)


@pytest.mark.parametrize("change", [{"state_dim": 7}, {"vision": dataclasses.replace(CONFIG.vision, stem="conv")}])
def test_import_refuses_models_that_are_not_pi05(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"no counterpart of (state_in|vision\.stem\.0)\.weight"):
        import_openpi(VLA(dataclasses.replace(CONFIG, **change)), draw_weights(), "golden")
