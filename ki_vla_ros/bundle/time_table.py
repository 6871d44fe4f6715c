"""The expert's conditioning on the flow time, computed once per time instead of in every step.

It depends on the time alone, and the Euler steps visit few times. So its layers stay out of the expert's graph: their
weights are in `time.npz`, and their result for one time is a row that the graph takes as `modulation`. For pi0.5's
300 M expert that keeps 116 M weights out of each step.

The file holds `periods` [E / 2] of the waves that embed the time (sines, then cosines), then `weight0` [out, in],
`bias0`, `weight1`, ...: linear layers with silu between them. Weights may be bfloat16, stored as uint16.

Legend: E embedding, M modulation.
"""

from __future__ import annotations

import io
import math
import tokenize
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import BundleError, EngineError
from ki_vla_ros.files import open_stored

MOST_ROWS = 256  # more than the times of any two values of flow_steps together


class TimeTable(dict[float, NDArray[np.float32]]):
    """Rows [M] by flow time, each computed on first use; the caller must not change them.

    BundleError if the file is not as the module's docstring says.
    """

    def __init__(self, path: Path, modulation: int) -> None:
        super().__init__()
        try:
            arrays = _read_arrays(path)
            self._periods = np.asarray(arrays["periods"], dtype=np.float64)
            layers = (len(arrays) - 1) // 2
            self._layers = [(arrays[f"weight{n}"], arrays[f"bias{n}"]) for n in range(layers)]
            names = {"periods", *(f"{kind}{n}" for kind in ("weight", "bias") for n in range(layers))}
            if names != set(arrays) or self._periods.ndim != 1:
                raise ValueError(f"arrays {sorted(arrays)}")
        except (OSError, ValueError, KeyError) as error:
            raise BundleError(
                f"{path}: expected arrays of numbers in an npz file, got {error}; export again"
            ) from error
        width = 2 * len(self._periods)
        for n, (weight, bias) in enumerate(self._layers):
            if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
                raise BundleError(
                    f"{path}: layer {n}: expected weights [out, {width}] and biases [out], got {weight.shape} and "
                    f"{bias.shape}; export again"
                )
            width = len(bias)
        if not self._layers or width != modulation:
            raise BundleError(f"{path}: expected a modulation of {modulation} (graph.modulation), got {width}")

    def __missing__(self, time: float) -> NDArray[np.float32]:
        self.rows([time])
        return self[time]

    def rows(self, times: Sequence[float]) -> NDArray[np.float32]:
        """The rows of these times [N, M]; those not yet in the table are computed together."""
        missing = sorted({time for time in times if time not in self})
        if missing:
            if not all(0.0 <= time <= 1.0 for time in missing):
                raise EngineError(f"flow time: expected 0 to 1, got {missing}")
            if len(self) + len(missing) > MOST_ROWS:
                self.clear()
                missing = sorted(set(times))
            self.update(zip(missing, self._compute(missing), strict=True))
        return np.stack([self[time] for time in times])

    def _compute(self, times: Sequence[float]) -> NDArray[np.float32]:
        # The shortest period is 4e-3, so angles reach 1570 rad: float64 until they are sines.
        angle = np.asarray(times, dtype=np.float64)[:, np.newaxis] * (2.0 * np.pi / self._periods)
        x = np.concatenate((np.sin(angle), np.cos(angle)), axis=1).astype(np.float32)
        for n, (weight, bias) in enumerate(self._layers):
            if n:
                x = x * (np.float32(0.5) * (np.tanh(np.float32(0.5) * x) + np.float32(1.0)))  # silu, without overflow
            # Row by row: in one matrix product the last bits of a row would depend on the other rows.
            weight = _float32(weight)
            x = np.stack([weight @ row for row in x]) + _float32(bias)
        return x


def _read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """The arrays of an npz file by name; OSError or ValueError if it is not as np.savez writes numbers.

    numpy's own reader believes the size that an array says it has, and decompresses whatever comes.
    """
    arrays: dict[str, NDArray[np.generic]] = {}
    with open_stored(path) as archive:
        for member in archive.infolist():
            content = archive.read(member)
            file = io.BytesIO(content)
            try:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError(f"{member.filename!r} of another version")
                shape, transposed, dtype = np.lib.format.read_array_header_1_0(file)
            except (SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError) as error:
                raise ValueError(f"{member.filename!r} without a header ({error})") from error
            numbers = len(content) - file.tell()
            if (
                dtype.kind not in "fiu"
                or transposed
                or math.prod(shape) * dtype.itemsize != numbers
                or min(shape, default=0) < 0
            ):
                raise ValueError(f"{member.filename!r} of {numbers} bytes as {dtype} {list(shape)}")
            arrays[member.filename.removesuffix(".npy")] = np.frombuffer(content, dtype, offset=file.tell()).reshape(
                shape
            )
    return arrays


def _float32(values: NDArray[np.generic]) -> NDArray[np.float32]:
    if values.dtype == np.uint16:  # bfloat16: the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)
