"""The moving average of the weights, which is measured and exported in place of the weights where it is on."""

from __future__ import annotations

from collections import defaultdict
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

    What a later stage is the first to train (`first`, by the steps before it) has a plain mean of its weights until
    that is as long: such a stage may be short, and the weights before it were never trained. In float32, one shard of
    each parameter that the run trains in each process, where the parameter is.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, first: Mapping[str, int] = {}) -> None:
        self.parameters, self.decay = parameters, decay
        self.averages = {name: p.detach().clone().float() for name, p in parameters.items()}
        self._joining = defaultdict[int, list[str]](list)
        for name in parameters:
            self._joining[first.get(name, 0)].append(name)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the run's step of this number, from 0."""
        for first, names in self._joining.items():
            share = 1.0 - self.decay if first == 0 else max(1.0 - self.decay, 1.0 / max(1, step - first + 1))
            averages = [local(self.averages[name]) for name in names]
            torch._foreach_lerp_(averages, [local(self.parameters[name]) for name in names], share)

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
