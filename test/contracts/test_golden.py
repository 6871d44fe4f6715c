"""The golden pi0.5: openpi's own outputs, reproduced by the classes that we train and export."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.golden import CONFIG, GOLDEN, draw_weights
from torch import Tensor

from training.model.vla import VLA, Cache
from training.weights.foreign import import_weights

ATOL = 1e-4


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
