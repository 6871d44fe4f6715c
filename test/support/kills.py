"""Kills whoever writes: `python support/kills.py FOLDER WHAT...`, in a process without threads, which may fork.

For each WHAT, a function below or its name and a number, children save the next version of something and are killed:
at the n-th operation on files (n = 1, 2, ... until a child comes through), or with `WHAT=TIMES` at that many random
moments. After each kill, what is on the disk must be one whole version, and never an earlier one than before. Prints
how many kills there were, and how often there was no version at all.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from ki_vla_ros.bundle.manifest import PolicySpec
from support.checkpoints import small_policy
from support.demo_data import TINY, write_demo_data
from support.models import make_model
from support.vocabularies import demo_tokenizer
from training import storage
from training.data.simulated.folder import fingerprint
from training.weights.checkpoints import (
    POLICY,
    WEIGHTS,
    save_checkpoint,
)
from training.weights.runs import RunState, newest_checkpoint, open_run, save_run

Save = Callable[[int], object]
Read = Callable[[], "int | None"]
"""The version on the disk, None for none; AssertionError or ConfigurationError if it is not one version."""

WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate"}


def run_checkpoint(folder: Path) -> tuple[Save, Read]:
    model = make_model()
    bias = model.action_out.bias

    def save(version: int) -> None:
        with torch.no_grad():
            bias.fill_(version)
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        save_run(folder, RunState(step=version), tensors | {"optimizer.exp_avg.bias": bias.detach().clone()}, keep=2)

    def read() -> int | None:
        place = newest_checkpoint(folder)
        if place is None:
            return None
        state, saved = open_run(place)
        found = {name: torch.empty_like(bias) for name in ("model.action_out.bias", "optimizer.exp_avg.bias")}
        saved.load(found)
        assert all((tensor == state.step).all() for tensor in found.values())
        return state.step

    return save, read


def policy(folder: Path) -> tuple[Save, Read]:
    """Weights and their policy.json; a name says the version."""
    model, tokenizer, spec = make_model(), demo_tokenizer(fast_vocab=2), small_policy("text")

    def save(version: int) -> None:
        with torch.no_grad():
            model.action_out.bias.fill_(version)
        named = spec.model_copy(update={"name": f"version {version}"})
        save_checkpoint(folder, model, tokenizer=tokenizer, policy=named)

    def read() -> int | None:
        if not folder.exists():
            return None
        named = PolicySpec.model_validate_json((folder / POLICY).read_text())
        version = int(named.name.split()[1])
        assert (load_file(folder / WEIGHTS)["action_out.bias"] == version).all()
        Tokenizer.from_file(str(folder / "tokenizer.json"))
        return version

    return save, read


def policy_without_exchange(folder: Path) -> tuple[Save, Read]:
    """On a file system where two folders cannot change places, the earlier one may be beside its place."""

    def refuse(*_: Path) -> None:
        raise OSError(errno.EINVAL, "as on NFS")

    storage.exchange = refuse
    save, read = policy(folder)
    aside = folder.with_name(f".{folder.name}.old")

    def read_beside() -> int | None:
        return read() if folder.exists() or not aside.exists() else policy(aside)[1]()

    return save, read_beside


def data(folder: Path) -> tuple[Save, Read]:
    """Simulated data in place of other simulated data: the seed is the version."""

    def save(version: int) -> None:
        write_demo_data(folder, replace(TINY, robot_episodes=1, frames=1, scenes=1, validation=1, seed=version))

    def read() -> int | None:
        if not folder.exists():
            return None
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["fingerprint"] == fingerprint(folder)
        return int(meta["settings"]["seed"])

    return save, read


def on_operation(do: Callable[[int], object], among: str = "") -> None:
    """Calls `do` with n before the n-th operation of this process that changes a folder or opens a file to write.

    So does one that opens what is not whole yet, to bring it to the disk. `among`: what the path must have in it.
    """
    numbers = count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int)
        writes = opened and (arguments[2] & (os.O_WRONLY | os.O_RDWR) or ".part" in str(arguments[0]))
        if (writes or event in WRITES) and among in str(arguments[0]):
            do(next(numbers))

    sys.addaudithook(hook)


def die_at(operation: int, among: str = "") -> None:
    """SIGKILL before the n-th operation of `on_operation`."""
    on_operation(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == operation else None, among)


def die_within(seconds: float) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def fork(work: Callable[[], object]) -> bool:
    """Whether a child that does the work was killed; RuntimeError if it failed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and status != 0:
        raise RuntimeError(f"a child that was not killed failed: {status}")
    return os.WIFSIGNALED(status)


def kills(save: Save, read: Read, times: int) -> Iterator[int | None]:
    """The version on the disk after each kill."""
    newest = 1
    began_s = time.monotonic()
    fork(lambda: save(newest))
    longest_s = time.monotonic() - began_s  # the first takes longest: some children come through a save, many do not
    rng = random.Random(0)
    for number in range(1, times + 1) if times else count(1):
        moment = rng.uniform(0.001, longest_s)

        def work(number: int = number, moment: float = moment, version: int = newest + 1) -> None:
            if not times:
                die_at(number)
                save(version)
                return
            die_within(moment)
            for later in count(version):
                save(later)

        killed = fork(work)
        found = read()
        yield found
        newest = max(newest, found or 0)
        if not killed:
            return


def main() -> None:
    torch.set_num_threads(1)
    for argument in sys.argv[2:]:
        what, _, times = argument.partition("=")
        place = Path(sys.argv[1]) / argument / "place"
        place.parent.mkdir(parents=True)
        save, read = globals()[what](place)
        before, versions = 0, list[int | None]()
        for version in kills(save, read, int(times or 0)):
            assert version is None or version >= before, (what, version, before)
            before = max(before, version or 0)
            versions.append(version)
        left = sorted(path.name for path in place.parent.iterdir())
        figures = {"what": argument, "kills": len(versions), "none": versions.count(None), "newest": before}
        print(json.dumps(figures | {"left": left}), flush=True)


if __name__ == "__main__":
    main()
