"""`CudaStream` on a double of torch.cuda: the order of copies, waits and captures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.exported import draw

from ki_vla_ros.bundle.onnx_header import TensorType
from ki_vla_ros.engines.torch_stream import WARM_UP, CudaStream

REAL = {name: getattr(torch.cuda, name) for name in ("graph", "Stream", "Event", "CUDAGraph")}


class Card:
    """A double of the parts of torch.cuda that CudaStream calls, which needs no card: it records their order.

    Each call is held against the signature of torch's own function.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self.object("Stream", synchronize="wait"))
        monkeypatch.setattr(torch.cuda, "Event", lambda: self.object("Event", synchronize="wait for copy", record="at"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self.object("CUDAGraph", replay="replay"))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
        monkeypatch.setattr(torch.Tensor, "copy_", lambda to, *given, **named: self.copy(to, *given, **named))

    def object(self, kind: str, **methods: str) -> SimpleNamespace:
        def method(name: str, said: str) -> Callable[..., None]:
            def call(*given: Any) -> None:
                inspect.signature(getattr(REAL[kind], name)).bind(None, *given)
                self.log.append(said)

            return call

        return SimpleNamespace(**{name: method(name, said) for name, said in methods.items()})

    @contextmanager
    def graph(self, *given: Any, **named: Any) -> Iterator[None]:
        inspect.signature(REAL["graph"]).bind(*given, **named)
        self.log.append(f"begin, {named['capture_error_mode']}")
        yield
        self.log.append("end")

    def copy(self, to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> None:
        self.log.append("copy" if non_blocking else "copy and wait")
        to.numpy()[...] = source.numpy()


def test_cuda_copies_without_waiting_and_warms_up_before_it_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    stream = CudaStream(torch.device("cpu"))
    buffer = stream.allocate("x_t", TensorType("float32", (2, 3)))
    stream.upload("x_t", draw(0, 2, 3))
    assert card.log == ["wait for copy", "copy", "at"] and np.array_equal(buffer.numpy(), draw(0, 2, 3))
    card.log.clear()

    def work() -> list[torch.Tensor]:
        card.log.append("work")
        return [buffer * 2]

    replay = stream.capture(work)
    assert card.log == ["work"] * WARM_UP + ["begin, thread_local", "work", "end"]
    card.log.clear()
    (output,) = replay()
    got = stream.download(output)
    assert card.log == ["replay", "copy", "wait"] and np.array_equal(got, 2 * draw(0, 2, 3))
    with stream.active() as active:
        assert active is stream._stream
