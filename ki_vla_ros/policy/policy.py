"""From one observation to one action chunk: prefix once, then Euler steps of the expert on the cached keys and values.

Legend: L prompt tokens, H horizon, A action dim (the joints, perhaps more), J joints, S width of the state token.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle import Bundle
from ki_vla_ros.engines.base import DifferentiableEngine, Engine, IntegratingEngine, KVCache, step_times
from ki_vla_ros.errors import ConfigurationError, EngineError
from ki_vla_ros.policy.guidance import Guide, guidance
from ki_vla_ros.policy.preprocess import make_model_input, normalize, trained_turn, unnormalize
from ki_vla_ros.records import ActionChunk, Condition, ModelInput, Observation
from ki_vla_ros.robot import continuous
from ki_vla_ros.settings import JacobianName


def _ignore(stage: str) -> None:
    """Stands in for a stopwatch."""


class Policy:
    """A bundle on an engine. `flow_steps` and `noise_seed` may be set between two chunks.

    ConfigurationError for `guidance_jacobian` "exact" on an engine without a backward pass.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        flow_steps: int | None = None,
        noise_seed: int = 0,
        guidance_jacobian: JacobianName = "identity",
    ) -> None:
        self.bundle = bundle
        self.engine = engine
        self.flow_steps = bundle.manifest.flow.steps if flow_steps is None else flow_steps
        self.noise_seed = noise_seed
        self._relative_J = np.array([joint.relative for joint in bundle.manifest.joints])
        if self.flow_steps < 1:
            raise ConfigurationError(f"flow_steps: expected at least 1, got {self.flow_steps}")
        # Checked once: a runtime check of a protocol costs more than a small expert's step.
        self._integrating = engine if isinstance(engine, IntegratingEngine) else None
        self._backward: DifferentiableEngine | None = None
        if guidance_jacobian == "exact":
            if not isinstance(engine, DifferentiableEngine):
                raise ConfigurationError(
                    f"guidance_jacobian exact: expected an engine with a backward pass, got {engine.description}; "
                    "set engine to torch, or guidance_jacobian to identity"
                )
            self._backward = engine

    def infer(
        self, observation: Observation, instruction: str, chunk_index: int, mark: Callable[[str], None] = _ignore
    ) -> ActionChunk:
        """All stages in order; `mark` is called with the name of each one when it is done, for a stopwatch."""
        manifest = self.bundle.manifest
        model_input = make_model_input(manifest, self.bundle.tokenizer, observation, instruction)
        mark("preprocess")
        cache = self.prefill(model_input)
        mark("prefill")
        actions_HA = self.denoise(cache, self.noise(chunk_index), model_input.state_J)
        mark("denoise")
        chunk = self.decode(actions_HA, observation)
        mark("decode")
        return chunk

    def noise(self, chunk_index: int) -> NDArray[np.float32]:
        """The chunk's starting point [H, A], the same for the same seed and index on every machine."""
        shape = (self.bundle.manifest.horizon, self.bundle.manifest.graph.action_dim)
        generator = np.random.default_rng((self.noise_seed, chunk_index))
        return generator.standard_normal(shape, dtype=np.float32)

    def prefill(self, model_input: ModelInput) -> KVCache:
        """The backbone's keys and values, on the engine's device, valid until the next prefill."""
        return self.engine.prefill(model_input)

    def denoise(
        self,
        cache: KVCache,
        noise_HA: NDArray[np.float32],
        state_J: NDArray[np.float32] | None = None,
        guide: Guide | None = None,
    ) -> NDArray[np.float32]:
        """Integrate x_t = t * noise + (1 - t) * action from t = 1 to 0 (`noise_at_one`) -> normalised actions.

        The clean rows of a guide stay as they are, with time 0 in every step (arXiv 2512.05964). A soft guide pulls
        each step so that the action it predicts, x_t - t * v_t, comes nearer to the guide's (arXiv 2506.07339, eq. 2 to
        4, written for t = 1 - tau). The Jacobian of that prediction is I - t * dv/dx_t (`guidance_jacobian` "exact"),
        or is taken as the identity, which any engine can do.
        """
        steps, state_S = self.flow_steps, self.widen_state(state_J)
        clean_H, x_t_HA = np.zeros(len(noise_HA), dtype=np.bool_), noise_HA
        if guide is not None and guide.clean:
            clean_H = np.asarray(guide.weight_H == 1.0)
            x_t_HA = np.where(clean_H[:, None], guide.action_HA, noise_HA)
        if self._integrating is not None and (guide is None or guide.clean):
            return self._integrating.integrate(cache, state_S, x_t_HA, steps, clean_H)
        for t in step_times(steps):
            v_t_HA = self.engine.velocity(cache, state_S, x_t_HA, t, clean_H)
            if guide is not None and not guide.clean:
                error_HA = guide.weight_H[:, None] * (guide.action_HA - (x_t_HA - np.float32(t) * v_t_HA))
                if self._backward is not None:
                    pulled_HA = self._backward.pullback(cache, state_S, x_t_HA, t, clean_H, error_HA)
                    error_HA = error_HA - np.float32(t) * pulled_HA
                v_t_HA = v_t_HA - guidance(t, guide.strength) * error_HA
            v_t_HA[clean_H] = 0.0
            x_t_HA = x_t_HA - np.float32(1.0 / steps) * v_t_HA  # as the graph does, to the last bit
        return x_t_HA

    def widen_state(self, state_J: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        """The state as the expert's graph takes it: as wide as the model, which may be wider than the robot."""
        width = self.bundle.manifest.graph.state_dim
        return state_J if state_J is None or width is None else widen(state_J, width)

    def guide(self, condition: Condition, observation: Observation) -> Guide:
        """The condition as actions of the new chunk: normalised, and relative to the new observation's state."""
        action_HJ = self.encode(condition.position_HJ, observation.state_J)
        action_HA = widen(action_HJ, self.bundle.manifest.graph.action_dim)
        return Guide(action_HA, condition.weight_H.astype(np.float32), condition.clean, condition.strength)

    def encode(self, position_HJ: NDArray[np.float64], state_J: NDArray[np.float64]) -> NDArray[np.float32]:
        """Joint positions -> normalised actions [H, J]: the inverse of `decode`."""
        manifest = self.bundle.manifest
        actions_HJ = position_HJ - self._origin(state_J)
        return normalize(actions_HJ, manifest.action.low, manifest.action.high).astype(np.float32)

    def decode(self, actions_HA: NDArray[np.float32], observation: Observation) -> ActionChunk:
        """Normalised actions -> joint positions, and velocities of the path from the observed state through them."""
        manifest = self.bundle.manifest
        actions_HJ = unnormalize(actions_HA[:, : len(manifest.joints)], manifest.action.low, manifest.action.high)
        position_HJ = actions_HJ + self._origin(observation.state_J)
        if not np.all(np.isfinite(position_HJ)):
            raise EngineError("policy: expected finite positions, got NaN or infinity; is the bundle damaged?")
        path = np.concatenate([observation.state_J[np.newaxis], position_HJ])
        # Absolute angles of a joint that turns without end may be a turn apart: the arm takes the shortest way.
        if (wound_J := continuous(manifest.joints) & ~self._relative_J).any():
            path[:, wound_J] = np.unwrap(path[:, wound_J], axis=0)
            position_HJ = path[1:]
        # Central differences; the last point has no successor and takes the difference to its predecessor.
        velocity_HJ = np.gradient(path, manifest.action_period_s, axis=0)[1:]
        return ActionChunk(
            start_ns=observation.stamp_ns,
            period_ns=manifest.action_period_ns,
            joints=manifest.joint_names,
            position_HJ=position_HJ,
            velocity_HJ=velocity_HJ,
        )

    def _origin(self, state_J: NDArray[np.float64]) -> NDArray[np.float64]:
        """What actions are counted from [J]: the state where they are relative, else zero in the state's turn."""
        turns_J = state_J - trained_turn(self.bundle.manifest, state_J)
        return np.where(self._relative_J, state_J, turns_J)

    def warm_up(self) -> None:
        """Run both graphs once on a blank input, so that the first real chunk is as fast as the rest."""
        manifest = self.bundle.manifest
        size, length, cameras = manifest.image.size, manifest.prompt.length, len(manifest.cameras)
        state_J = np.zeros(len(manifest.joints), dtype=np.float32) if manifest.state.as_token else None
        blank = ModelInput(
            images_VCHW=np.full((cameras, 3, size, size), -1.0, dtype=np.float32),
            image_mask_V=np.ones(cameras, dtype=np.bool_),
            tokens_L=np.zeros(length, dtype=np.int64),
            token_mask_L=np.ones(length, dtype=np.bool_),
            state_J=state_J,
        )
        cache, noise_HA = self.prefill(blank), self.noise(0)
        self.denoise(cache, noise_HA, state_J)
        if self._backward is not None:
            state_S = self.widen_state(state_J)
            clean_H = np.zeros(len(noise_HA), dtype=np.bool_)
            self._backward.pullback(cache, state_S, noise_HA, 1.0, clean_H, noise_HA)


def widen(values: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Append zeros after the joints, as models wider than the robot (pi0, pi0.5) were trained with."""
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])])
