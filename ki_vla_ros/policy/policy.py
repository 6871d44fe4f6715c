"""From one observation to one action chunk: prefix once, then Euler steps of the expert on the cached keys and values.

Legend: L prompt tokens, H horizon, D dimensions of an action, A width of the model's actions (D, perhaps more), S
dimensions of the state, W width of the state token, J axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle import Bundle
from ki_vla_ros.engines.base import DifferentiableEngine, Engine, IntegratingEngine, KVCache, step_times
from ki_vla_ros.errors import ConfigurationError, EngineError, InputError
from ki_vla_ros.policy.guidance import Guide, guidance
from ki_vla_ros.policy.preprocess import make_model_input, normalize, state_token, trained_turn, unnormalize
from ki_vla_ros.records import ActionChunk, Condition, ModelInput, Observation
from ki_vla_ros.robot import CommandSpace, nearest_rotation
from ki_vla_ros.settings import JacobianName

Stage = Callable[[str], AbstractContextManager[None]]


def _ignore(stage: str) -> None:
    """Stands in for a stopwatch."""


def untimed(stage: str) -> AbstractContextManager[None]:
    """The same for one that is entered and left."""
    return nullcontext()


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
        self.space = CommandSpace(bundle.manifest.robot)
        self._middle_D = (np.array(bundle.manifest.action.low) + np.array(bundle.manifest.action.high)) / 2.0
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
        chunk = self.decode(self.sample(observation, instruction, chunk_index, mark), observation)
        mark("decode")
        return chunk

    def sample(
        self,
        observation: Observation,
        instruction: str,
        chunk_index: int,
        mark: Callable[[str], None] = _ignore,
        guide: Guide | None = None,
    ) -> NDArray[np.float32]:
        """The stages of `infer` up to the normalised actions [H, A], which `actions` and `decode` take."""

        @contextmanager
        def marked(stage: str) -> Iterator[None]:
            yield
            mark(stage)

        cache = self.see(observation, instruction, marked)
        state_S = state_token(self.bundle.manifest, observation.state_S)
        actions_HA = self.denoise(cache, self.noise(chunk_index), state_S, guide)
        mark("denoise")
        return actions_HA

    def noise(self, chunk_index: int) -> NDArray[np.float32]:
        """The chunk's starting point [H, A], the same for the same seed and index on every machine."""
        shape = (self.bundle.manifest.horizon, self.bundle.manifest.graph.action_dim)
        generator = np.random.default_rng((self.noise_seed, chunk_index))
        return generator.standard_normal(shape, dtype=np.float32)

    def see(self, observation: Observation, instruction: str, stage: Stage = untimed) -> KVCache:
        """What `denoise` goes on from: the prefill of an observation, its stages timed by `stage`."""
        with stage("preprocess"):
            model_input = make_model_input(self.bundle.manifest, self.bundle.tokenizer, observation, instruction)
        with stage("prefill"):
            return self.prefill(model_input)

    def prefill(self, model_input: ModelInput) -> KVCache:
        """The backbone's keys and values, on the engine's device, valid until the next prefill."""
        return self.engine.prefill(model_input)

    def denoise(
        self,
        cache: KVCache,
        noise_HA: NDArray[np.float32],
        state_S: NDArray[np.float32] | None = None,
        guide: Guide | None = None,
    ) -> NDArray[np.float32]:
        """Integrate x_t = t * noise + (1 - t) * action from t = 1 to 0 (`noise_at_one`) -> normalised actions.

        The clean rows of a guide stay as they are, with time 0 in every step (arXiv 2512.05964). A soft guide pulls
        each step so that the action it predicts, x_t - t * v_t, comes nearer to the guide's (arXiv 2506.07339, eq. 2 to
        4, written for t = 1 - tau). The Jacobian of that prediction is I - t * dv/dx_t (`guidance_jacobian` "exact"),
        or is taken as the identity, which any engine can do.
        """
        steps, state_W = self.flow_steps, self.widen_state(state_S)
        clean_H, x_t_HA = np.zeros(len(noise_HA), dtype=np.bool_), noise_HA
        if guide is not None and guide.clean:
            clean_H = np.asarray(guide.weight_H == 1.0)
            x_t_HA = np.where(clean_H[:, None], guide.action_HA, noise_HA)
        if self._integrating is not None and (guide is None or guide.clean):
            return self._integrating.integrate(cache, state_W, x_t_HA, steps, clean_H)
        for t in step_times(steps):
            v_t_HA = self.engine.velocity(cache, state_W, x_t_HA, t, clean_H)
            if guide is not None and not guide.clean:
                error_HA = guide.weight_H[:, None] * (guide.action_HA - (x_t_HA - np.float32(t) * v_t_HA))
                if self._backward is not None:
                    pulled_HA = self._backward.pullback(cache, state_W, x_t_HA, t, clean_H, error_HA)
                    error_HA = error_HA - np.float32(t) * pulled_HA
                v_t_HA = v_t_HA - guidance(t, guide.strength) * error_HA
            v_t_HA[clean_H] = 0.0
            x_t_HA = x_t_HA - np.float32(1.0 / steps) * v_t_HA  # as the graph does, to the last bit
        return x_t_HA

    def widen_state(self, state_S: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        """The state as the expert's graph takes it: as wide as the model, which may be wider than the robot."""
        width = self.bundle.manifest.graph.state_dim
        return state_S if state_S is None or width is None else widen(state_S, width)

    def guide(self, condition: Condition, observation: Observation) -> Guide:
        """The condition as actions of the new chunk: normalised, and relative to the new observation's state."""
        action_HD = self.encode(condition.position_HJ, condition.velocity_HJ, observation)
        action_HA = widen(action_HD, self.bundle.manifest.graph.action_dim)
        return Guide(action_HA, condition.weight_H.astype(np.float32), condition.clean, condition.strength)

    def encode(
        self, position_HJ: NDArray[np.float64], velocity_HJ: NDArray[np.float64], observation: Observation
    ) -> NDArray[np.float32]:
        """A path of the axes -> normalised actions [H, D]: the inverse of `decode`."""
        manifest, measured_J = self.bundle.manifest, self._measured(observation)
        actions_HD = self.space.actions(position_HJ, velocity_HJ, measured_J) - self._origin(observation.state_S)
        actions_HD = nearest_rotation(actions_HD, self._middle_D, manifest.robot.actions)
        return normalize(actions_HD, manifest.action.low, manifest.action.high).astype(np.float32)

    def actions(self, actions_HA: NDArray[np.float32], state_S: NDArray[np.float64]) -> NDArray[np.float64]:
        """Normalised actions -> actions [H, D] in the robot file's units; none is relative to the state any more."""
        manifest = self.bundle.manifest
        width = len(manifest.robot.actions)
        actions_HD = unnormalize(actions_HA[:, :width], manifest.action.low, manifest.action.high)
        actions_HD = actions_HD + self._origin(state_S)
        if not np.all(np.isfinite(actions_HD)):
            raise EngineError("policy: expected finite positions, got NaN or infinity; is the bundle damaged?")
        return actions_HD

    def normalized(self, actions_HD: NDArray[np.float64], state_S: NDArray[np.float64]) -> NDArray[np.float32]:
        """The inverse of `actions`: actions in the robot file's units -> normalised ones [H, A]."""
        manifest = self.bundle.manifest
        given_HD = normalize(actions_HD - self._origin(state_S), manifest.action.low, manifest.action.high)
        return widen(given_HD.astype(np.float32), manifest.graph.action_dim)

    def decode(
        self,
        actions_HA: NDArray[np.float32],
        observation: Observation,
        commanded_J: NDArray[np.float64] | None = None,
    ) -> ActionChunk:
        """Normalised actions -> a path of the axes that goes on from where they were at the observation.

        `commanded_J`: where the axes were told to be then, which counts for those that nobody measures.
        """
        manifest, space = self.bundle.manifest, self.space
        actions_HD = self.actions(actions_HA, observation.state_S)
        try:
            position_HJ, velocity_HJ = space.path(
                actions_HD, self._measured(observation), commanded_J, manifest.action_period_s
            )
        except ValueError as error:
            raise EngineError(f"policy: {error}") from None
        return ActionChunk(
            start_ns=observation.stamp_ns,
            period_ns=manifest.action_period_ns,
            joints=manifest.axis_names,
            position_HJ=position_HJ,
            velocity_HJ=velocity_HJ,
        )

    def _measured(self, observation: Observation) -> NDArray[np.float64]:
        signals = self.bundle.manifest.robot.signals
        if len(observation.signals) != len(signals):
            raise InputError(
                f"observation: expected signal_M, the {len(signals)} numbers that manifest.robot.signals names, got "
                f"{len(observation.signals)}: the state alone does not say where this robot's axes are"
            )
        return self.space.measured(observation.signals)

    def _origin(self, state_S: NDArray[np.float64]) -> NDArray[np.float64]:
        """What actions are counted from [D]: the state where they are relative, else zero in the state's turn."""
        turns_S = state_S - trained_turn(self.bundle.manifest, state_S)
        return self.space.origin(state_S, turns_S)

    def warm_up(self) -> None:
        """Run both graphs once on a blank input, so that the first real chunk is as fast as the rest."""
        manifest = self.bundle.manifest
        size, length, cameras = manifest.image.size, manifest.prompt.length, len(manifest.cameras)
        state_S = np.zeros(len(manifest.robot.state), dtype=np.float32) if manifest.state.as_token else None
        blank = ModelInput(
            images_VCHW=np.full((cameras, 3, size, size), -1.0, dtype=np.float32),
            image_mask_V=np.ones(cameras, dtype=np.bool_),
            tokens_L=np.zeros(length, dtype=np.int64),
            token_mask_L=np.ones(length, dtype=np.bool_),
            state_S=state_S,
        )
        cache, noise_HA = self.prefill(blank), self.noise(0)
        self.denoise(cache, noise_HA, state_S)
        if self._backward is not None:
            state_W = self.widen_state(state_S)
            clean_H = np.zeros(len(noise_HA), dtype=np.bool_)
            self._backward.pullback(cache, state_W, noise_HA, 1.0, clean_H, noise_HA)


def widen(values: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Append zeros after the dimensions, as models wider than the robot (pi0, pi0.5) were trained with."""
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])])
