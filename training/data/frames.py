"""A source of robot frames: images, instruction and joint state, and the chunk that follows, as actions and as FAST.

Legend: B batch, F frames, V cameras, S image side, H horizon, J joints, K readout frequencies, A action dim (here J).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ki_vla_ros.policy import normalize, render_prompt, state_to_bins
from training.action_space import ActionSpace
from training.data.batch import Arrays, Batch, BatchMaker
from training.tokens import FastTokenizer, fast_id


class RobotFrames:
    """Draws frames from `arrays`, which are in memory.

    They are `images` [F, V, S, S, 3] uint8, `state` [F, J], `chunk` [F, H, J], `task` [F] (text), and optionally
    `place` [F, 2]: where the last camera's image shows the object of the task. `asking` lists the ids of the readout
    tokens at the prompt's end, one for each of FAST's lowest frequencies that they learn to name; none without hints.
    """

    def __init__(
        self,
        arrays: Arrays,
        maker: BatchMaker,
        space: ActionSpace,
        fast: FastTokenizer,
        *,
        prompt: str,
        asking: Sequence[int] = (),
    ) -> None:
        self.arrays, self.maker, self.space, self.fast = arrays, maker, space, fast
        self.prompt, self.asking = prompt, asking
        self.first_fast = fast_id(maker.tokenizer, 0)

    def draw(self, count: int, rng: np.random.Generator) -> Batch:
        """A batch of `count` different frames."""
        return self.take(np.sort(rng.choice(len(self.arrays["state"]), size=count, replace=False)), rng)

    def take(self, frames: NDArray[np.int64], rng: np.random.Generator) -> Batch:
        """A batch of these frames; `rng` augments their images."""
        state_BJ = self.arrays["state"][frames].astype(np.float64)
        action_BHA = self.space.normalize_chunk(self.arrays["chunk"][frames].astype(np.float64), state_BJ)
        labels = {
            "action_BHA": torch.from_numpy(action_BHA.astype(np.float32)),
            "state_BJ": torch.from_numpy(self.normalize_state(state_BJ).astype(np.float32)),
        }
        if self.asking:
            readout_BKA = self.fast.coefficients(action_BHA)[:, : len(self.asking)]
            labels["readout_BKA"] = torch.from_numpy(readout_BKA.astype(np.float32))
        return self.maker.make(
            self.arrays["images"][frames],
            [
                self.render(str(self.arrays["task"][frame]), state_S)
                for frame, state_S in zip(frames, state_BJ, strict=True)
            ],
            [[self.first_fast + i for i in self.fast.encode(action_HA)] for action_HA in action_BHA],
            rng,
            fast=True,
            asking=self.asking,
            place_B2=self.arrays["place"][frames] if "place" in self.arrays else None,
            **labels,
        )

    def render(self, task: str, state_S: NDArray[np.float64]) -> str:
        """The prompt, exactly as the robot renders it."""
        return render_prompt(self.prompt, task, state_to_bins(self.normalize_state(state_S)))

    def normalize_state(self, state: NDArray[np.float64]) -> NDArray[np.float64]:
        return normalize(state, self.space.state_low, self.space.state_high)
