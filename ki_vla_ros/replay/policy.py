"""The robot's own policy in a replay: it tells the latency model what ran, and it answers "what if" questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle import Bundle
from ki_vla_ros.engines.base import Engine, KVCache
from ki_vla_ros.errors import EngineError
from ki_vla_ros.policy import Guide, Policy, make_model_input
from ki_vla_ros.records import ActionChunk, ModelInput, Observation
from ki_vla_ros.replay.latency import Latency
from ki_vla_ros.settings import JacobianName

Array = NDArray[np.float64]


class ReplayPolicy(Policy):
    """A policy that keeps its last chunk.

    `decoded` is that chunk with its observation, whether or not it was sent; the caller sets it to None before a tick.
    """

    def __init__(self, bundle: Bundle, engine: Engine, latency: Latency, guidance_jacobian: JacobianName) -> None:
        super().__init__(bundle, engine, guidance_jacobian=guidance_jacobian)
        self._latency = latency
        self.decoded: tuple[ActionChunk, Observation] | None = None
        self._commanded_J: Array | None = None
        self.chunk_index: int | None = None  # replaces the loop's own count, for recorded ticks
        self.drawn_index = 0
        self._input: ModelInput | None = None
        # The cache the loop was given, and the one the engine holds; they differ after a probe has overwritten it.
        self._given: KVCache | None = None
        self._held: KVCache | None = None
        self._call: tuple[NDArray[np.float32] | None, Guide | None] = (None, None)

    def noise(self, chunk_index: int) -> NDArray[np.float32]:
        self.drawn_index = chunk_index if self.chunk_index is None else self.chunk_index
        return super().noise(self.drawn_index)

    def prefill(self, model_input: ModelInput) -> KVCache:
        self._input = model_input
        self._given = self._held = super().prefill(model_input)
        self._latency.computed(prefill=True)
        return self._given

    def denoise(
        self,
        cache: KVCache,
        noise_HA: NDArray[np.float32],
        state_S: NDArray[np.float32] | None = None,
        guide: Guide | None = None,
    ) -> NDArray[np.float32]:
        if cache is not self._given:
            raise EngineError("replay: expected the keys and values of the last prefill, got older ones")
        self._call = state_S, guide
        actions_HA = super().denoise(self._renewed(), noise_HA, state_S, guide)
        self._latency.computed(prefill=False)
        return actions_HA

    def decode(
        self, actions_HA: NDArray[np.float32], observation: Observation, commanded_J: Array | None = None
    ) -> ActionChunk:
        chunk = super().decode(actions_HA, observation, commanded_J)
        self._commanded_J = commanded_J
        self.decoded = chunk, observation
        return chunk

    def probe(self, observation: Observation, other_instruction: str, cameras: Sequence[str]) -> dict[str, Array]:
        """The last chunk's positions [H, J] with one thing changed: the noise, the instruction, or one camera missing.

        A camera that is taken away is masked out and black, like an optional camera that is missing.
        """
        assert self._input is not None
        given, found = self._input, {}
        generator = np.random.default_rng((self.noise_seed, self.drawn_index, 1))
        shape = (self.bundle.manifest.horizon, self.bundle.manifest.graph.action_dim)
        other_HA = generator.standard_normal(shape, dtype=np.float32)
        found["noise"] = self._positions(self._renewed(), other_HA, observation)
        same_HA = super().noise(self.drawn_index)
        changed: dict[str, ModelInput] = {}
        if other_instruction:
            manifest, tokenizer = self.bundle.manifest, self.bundle.tokenizer
            # The backbone's own observation may be older than the chunk's (prefill_period_s): only the words change.
            other = make_model_input(manifest, tokenizer, observation, other_instruction)
            changed["instruction"] = dataclasses.replace(
                given, tokens_L=other.tokens_L, token_mask_L=other.token_mask_L
            )
        names = [camera.name for camera in self.bundle.manifest.cameras]
        for camera in cameras:
            mask_V, images_VCHW = given.image_mask_V.copy(), given.images_VCHW.copy()
            v = names.index(camera)
            mask_V[v], images_VCHW[v] = False, -1.0
            changed[f"camera.{camera}"] = dataclasses.replace(given, image_mask_V=mask_V, images_VCHW=images_VCHW)
        for name, model_input in changed.items():
            self._held = None  # overwritten from here on
            found[name] = self._positions(super().prefill(model_input), same_HA, observation)
        return found

    def _positions(self, cache: KVCache, noise_HA: NDArray[np.float32], observation: Observation) -> Array:
        state_S, guide = self._call
        actions_HA = super().denoise(cache, noise_HA, state_S, guide)
        return super().decode(actions_HA, observation, self._commanded_J).position_HJ

    def _renewed(self) -> KVCache:
        if self._held is None:
            assert self._input is not None
            with self._latency.paused():
                self._held = super().prefill(self._input)
        return self._held
