"""The numbers that normalisation and FAST are fitted on: an even draw from all of a robot's data, without any image.

Legend: F frames of one piece, N frames that are kept, H horizon, S state, D actions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ki_vla_ros.errors import ConfigurationError
from training.action_space import Numbers
from training.data.samples import RobotSamples

MOST_FRAMES = 50_000  # more change quantiles by less than they differ between data sets
MOST_NUMBERS = 20_000_000  # of all chunks: 160 MB


def draw_numbers(data: Sequence[RobotSamples], seed: int, most: int = MOST_FRAMES) -> Numbers:
    """About `most` frames, or fewer of long chunks, of these data sets of one robot; memory does not grow with them."""
    robot = data[0].robot
    most = min(most, MOST_NUMBERS // (robot.horizon * len(robot.actions)))
    share = min(1.0, most / max(1, sum(len(samples) for samples in data)))
    kept, ends = [], []
    for index, samples in enumerate(data):
        rng = np.random.default_rng([seed, index])
        lowest, highest = [], []
        for state_FS, chunk_FHD, known_FH in samples.numbers():
            chosen = rng.random(len(state_FS)) < share
            kept.append((state_FS[chosen], chunk_FHD[chosen], known_FH[chosen]))
            lowest.append(state_FS.min(axis=0))
            highest.append(state_FS.max(axis=0))
        if lowest:
            ends.append((np.min(lowest, axis=0), np.max(highest, axis=0)))
    if not sum(len(state_FS) for state_FS, _, _ in kept):
        names = ", ".join(samples.name for samples in data) or "no data set"
        raise ConfigurationError(f"normalisation: expected frames in {names}, got none")
    state_NS, chunk_NHD, known_NH = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    lowest_S, highest_S = np.min([low for low, _ in ends], axis=0), np.max([high for _, high in ends], axis=0)
    return Numbers(state_NS, chunk_NHD, known_NH, lowest_S, highest_S)
