"""The moving average of the weights, which is measured and exported in place of the weights where it is on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MovingAverage:
    """`average = decay * average + (1 - decay) * weight` after each step, from the first weights on, as in openpi.

    In float32, one shard of each parameter that the run trains in each process, where the parameter is.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.averages = {name: p.detach().clone().float() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        pairs = [(local(self.averages[name]), local(p)) for name, p in self.parameters.items()]
        averages, weights = ([pair[i] for pair in pairs] for i in (0, 1))
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it, the averages are the model's weights, for measuring and saving."""
        kept = {name: local(p).detach().clone() for name, p in self.parameters.items()}
        self._set({name: local(average) for name, average in self.averages.items()})
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            local(self.parameters[name]).copy_(value)
