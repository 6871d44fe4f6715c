"""Batches of the coming steps, made ahead by other processes.

They are processes, not threads, because what Python does for a batch (tokens, augmentation, padding) would otherwise
stop the trainer's own Python. They are forked: what was opened before is there at once, its caches are shared, and
nothing needs to be pickled but the batches.
"""

from __future__ import annotations

import fcntl
import io
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any, Final, Generic, TypeVar

import cv2
import numpy as np
import torch

from ki_vla_ros.errors import ConfigurationError

T = TypeVar("T")
PIPE_BYTES: Final = 1 << 20  # as many as the system gives without asking
LENGTH: Final = 8  # bytes of a length


class Loader(Generic[T]):
    """`make(step)` gives a step's batches, and must depend on nothing but the step.

    Each of the `workers` makes every so many-th step, one ahead of what the trainer has taken; with none the trainer
    makes them itself.
    """

    def __init__(self, make: Callable[[int], T], workers: int) -> None:
        self.make, self.workers = make, workers

    def iterate(self, steps: range) -> Iterator[T]:
        """The batches of these steps, in order; what goes wrong in a worker is raised here.

        The workers end with the iterator: also when it is closed, and when this process is killed.
        """
        count = min(self.workers, len(steps))
        if not count:
            yield from map(self.make, steps)
            return
        with ExitStack() as stack:
            workers = self._start(stack, [steps[k::count] for k in range(count)])
            for number, step in enumerate(steps):
                process, pipe = workers[number % count]
                try:
                    fine, value = receive(pipe)
                except EOFError:
                    process.join()
                    raise ConfigurationError(
                        f"workers: expected the batch of step {step}, but the process that makes it has ended "
                        f"(exit code {process.exitcode}; -9: killed, perhaps as memory was full); take fewer workers"
                    ) from None
                if not fine:
                    raise value
                yield value

    def _start(self, stack: ExitStack, shares: Sequence[range]) -> list[tuple[Any, IO[bytes]]]:
        """A process for each share of the steps, and what to read its batches from."""
        alive, own = os.pipe()  # nobody writes to it; it ends with this process, however that ends
        stack.callback(os.close, alive)
        workers: list[tuple[Any, IO[bytes]]] = []
        stack.callback(_end, workers)
        closing: list[IO[bytes]] = [stack.enter_context(os.fdopen(own, "wb"))]
        for share in shares:
            reading, writing = (os.fdopen(end, mode, 0) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
            closing.append(stack.enter_context(reading))
            with suppress(OSError):
                fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            process = multiprocessing.get_context("fork").Process(
                target=self._work, args=(share, writing, alive, closing), daemon=True
            )
            with writing, _forking():
                process.start()
            workers.append((process, reading))
        return workers

    def _work(self, steps: range, writing: IO[bytes], alive: int, closing: Sequence[IO[bytes]]) -> None:
        for end in closing:  # the trainer's; as long as a worker has one of them, another would not see it close
            end.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then ends this
        threading.Thread(target=_end_with_trainer, args=(alive,), daemon=True).start()
        # The threads of both are not there any more after a fork.
        torch.set_num_threads(1)
        cv2.setNumThreads(0)
        try:
            for step in steps:
                send(writing, (True, self.make(step)))
        except BrokenPipeError:
            pass
        except BaseException as error:
            with suppress(BrokenPipeError):
                send(writing, (False, _portable(error)))


def _end(workers: Sequence[tuple[Any, IO[bytes]]]) -> None:
    for process, _ in workers:
        process.kill()
    for process, _ in workers:
        process.join()


def _end_with_trainer(alive: int) -> None:
    os.read(alive, 1)
    os._exit(1)


def _portable(error: BaseException) -> BaseException:
    """The error, if it is the same after its journey, else one that says where it came from."""
    with suppress(Exception):
        again: BaseException = pickle.loads(pickle.dumps(error))
        if str(again) == str(error):
            return again
    return RuntimeError("".join(traceback.format_exception(error)))


@contextmanager
def _forking() -> Iterator[None]:
    """What libraries say of a fork, though it does not concern these processes.

    Python (3.12 and later) warns of other threads; torch's and OpenCV's are not used in a worker. The tokenizers' are
    turned off in it.
    """
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
            yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class _Pickler(pickle.Pickler):
    """Tensors as numpy's arrays, whose memory goes into the pipe as it is. Torch's own way needs a file for each."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype != torch.bfloat16 and value.device.type == "cpu":
            return torch.from_numpy, (value.detach().contiguous().numpy(),)
        return NotImplemented


def send(pipe: IO[bytes], value: object) -> None:
    body, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(body, protocol=5, buffer_callback=buffers.append).dump(value)
    parts = [memoryview(body.getbuffer()), *(buffer.raw() for buffer in buffers)]
    lengths = [len(parts), *map(len, parts)]
    for part in (memoryview(b"".join(length.to_bytes(LENGTH, "little") for length in lengths)), *parts):
        begin = 0
        while begin < len(part):
            begin += pipe.write(part[begin:])


def receive(pipe: IO[bytes]) -> Any:
    """What was sent; EOFError if the other side has ended."""
    count = int.from_bytes(_read(pipe, LENGTH), "little")
    lengths = [int.from_bytes(_read(pipe, LENGTH), "little") for _ in range(count)]
    body, *buffers = [_read(pipe, length) for length in lengths]
    return pickle.loads(body, buffers=buffers)


def _read(pipe: IO[bytes], length: int) -> memoryview:
    buffer = np.empty(length, dtype=np.uint8).data
    begin = 0
    while begin < length:
        got = pipe.readinto(buffer[begin:])  # type: ignore[attr-defined]
        if not got:
            raise EOFError
        begin += got
    return buffer
