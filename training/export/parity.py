"""Whether a bundle computes what the model computes: both are given random inputs.

Legend: H horizon, A action dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from ki_vla_ros.bundle import PREFILL, Bundle
from ki_vla_ros.engines.base import prefill_inputs
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.engines.torch_engine import TorchEngine
from ki_vla_ros.policy import Policy, longest_input, widen
from ki_vla_ros.records import ModelInput
from training.export.graphs import put_first
from training.model import VLA, Cache
from training.weights import load_checkpoint

CASES = 4

PrefixTensors = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images [1, V, C, S, S], image mask [1, V], tokens [1, L], token mask [1, L]."""


def parity_error(
    model: VLA, bundle: Bundle, cases: int = CASES, engine: OnnxEngine | TorchEngine | None = None
) -> float:
    """Largest difference between bundle and torch, over keys, values and whole chunks for random inputs.

    `engine` (default: onnxruntime) runs the bundle and is closed afterwards.
    """
    engine = engine or OnnxEngine(bundle)
    policy = Policy(bundle, engine)
    session = onnxruntime.InferenceSession(str(bundle.path / PREFILL), providers=["CPUExecutionProvider"])
    worst = 0.0
    for case in range(cases):
        given, noise_HA = random_input(bundle, case), policy.noise(case)
        cache, chunk_HA = answer(model, given, noise_HA, bundle.manifest.flow.steps)
        got_HA = policy.denoise(policy.prefill(given), noise_HA, given.state_S)
        if isinstance(engine, TorchEngine):
            keys, values, mask = (engine.prefix[name].numpy() for name in ("keys", "values", "prefix_mask"))
        else:
            keys, values, mask = session.run(None, prefill_inputs(given))
        for expected, got in (
            (cache.keys_NBKPD[:, 0], keys),
            (cache.values_NBKPD[:, 0], values),
            (cache.mask_BP[0].float(), mask.astype(np.float32)),
            (chunk_HA, got_HA),
        ):
            worst = float(np.maximum(worst, np.abs(expected.numpy() - got).max()))  # NaN stays NaN
    engine.close()
    return worst


def lowest_cosine(
    checkpoint: Path,
    bundle: Bundle,
    rows: Sequence[int],
    open_engine: Callable[[Bundle], OnnxEngine | TorchEngine],
    cases: int = CASES,
) -> float:
    """Lowest cosine between whole chunks for random inputs: the bundle's on the engine, the model's in float32.

    `rows` are the model's ids of the bundle's tokens. They run one after the other, because memory would not hold both
    copies of a large model.
    """
    steps, shape = bundle.manifest.flow.steps, (bundle.manifest.horizon, bundle.manifest.graph.action_dim)
    noise = [np.random.default_rng(case).standard_normal(shape, dtype=np.float32) for case in range(cases)]
    given = [random_input(bundle, case) for case in range(cases)]
    model = load_checkpoint(checkpoint).eval()
    put_first(model, rows)
    expected = [answer(model, *case, steps)[1].numpy() for case in zip(given, noise, strict=True)]
    del model
    engine = open_engine(bundle)
    policy = Policy(bundle, engine)
    got = [policy.denoise(policy.prefill(case), x_t, case.state_S) for case, x_t in zip(given, noise, strict=True)]
    engine.close()
    return float(np.min([cosine(*chunks) for chunks in zip(got, expected, strict=True)]))  # NaN stays NaN


def cosine(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """The cosine of two chunks as vectors: 1 if they point the same way."""
    a, b = ours.ravel().astype(np.float64), theirs.ravel().astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def answer(model: VLA, given: ModelInput, noise_HA: NDArray[np.float32], steps: int) -> tuple[Cache, Tensor]:
    """The model's own cache and chunk [H, A] for one input."""
    prefix, state_RS = as_batch(given, model.config.state_dim)
    with torch.no_grad():
        cache = model.prefill(*prefix)
        return cache, model.sample_actions(cache, torch.from_numpy(noise_HA)[None], steps, state_RS)[0]


def as_batch(given: ModelInput, state_dim: int | None) -> tuple[PrefixTensors, Tensor | None]:
    """A batch of one, as `VLA.prefill` takes it, and the state token [1, S] of a model that has one."""
    images, image_mask = torch.from_numpy(given.images_VCHW)[None], torch.from_numpy(given.image_mask_V)[None]
    tokens, token_mask = torch.from_numpy(given.tokens_L)[None], torch.from_numpy(given.token_mask_L)[None]
    if state_dim is None or given.state_S is None:
        return (images, image_mask, tokens, token_mask), None
    return (images, image_mask, tokens, token_mask), torch.from_numpy(widen(given.state_S, state_dim))[None]


def random_input(bundle: Bundle, case: int) -> ModelInput:
    """Noise images, a random prompt of random length; every other case lacks the last of several cameras."""
    manifest, rng = bundle.manifest, np.random.default_rng(case)
    cameras, length = len(manifest.cameras), manifest.prompt.length
    image_mask_V = np.ones(cameras, dtype=np.bool_)
    image_mask_V[-1] = cameras == 1 or case % 2 == 0
    token_mask_L = np.arange(length) < rng.integers(1, length + 1)
    given = longest_input(manifest, manifest.graph.vocab_size, seed=case)
    return replace(given, image_mask_V=image_mask_V, token_mask_L=token_mask_L)
