"""The conversions' command line, as the tests call it."""

import os
import signal
from pathlib import Path

from support.sample_bags import Messages, write_bag
from training.convert.__main__ import main
from training.data.lerobot.dataset import Dataset


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def convert(tmp_path: Path, messages: Messages, *arguments: object, fps: int = 10, actions: str = "states") -> Dataset:
    bag, out = write_bag(tmp_path / "bag", messages), tmp_path / "dataset"
    more = arguments if "--camera" in arguments or "--bundle" in arguments else ("--bundle", "demo", *arguments)
    assert run("from-bag", bag, "--fps", fps, "--actions", actions, "--out", out, *more) == 0
    return Dataset(out)


def kill_at(bag: Path, folder: Path) -> None:
    """In place of a conversion: a part, or, of the bag `full`, a process that is killed as by a full memory."""
    folder.mkdir()
    if bag.name == "full":
        os.kill(os.getpid(), signal.SIGKILL)
