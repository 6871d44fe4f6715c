"""How fast bags become a dataset: seconds of bag per second of one core's processor time (docs/results/data.md).

    python -m training.speed.conversion make out/speed/bag --seconds 60
    python -m training.speed.conversion measure out/speed/bag [--before OTHER_CHECKOUT] [--rounds 3]
    python -m training.speed.conversion profile out/speed/bag [--video jpeg]

`make` writes a bag of two cameras (640 x 480, 30 Hz, JPEG of 50 kB), joint states at 200 Hz and commands at 10 Hz.
`measure` converts it in processes of their own, in turn with those of another checkout if one is named, so that a ratio
comes from one run; what a process takes to begin is measured apart and taken off. `profile` says in which functions a
conversion spends its time. Exit codes: 0 fine, 2 could not run.
"""

from __future__ import annotations

import argparse
import os
import pstats
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bags import open_bag
from ki_vla_ros.bags.writer import BagFile
from ki_vla_ros.console import ExitCode, Progress, run_command
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.messages import COMPRESSED_IMAGE, JOINT_STATE, TRAJECTORY, typestore
from ki_vla_ros.records import NS_PER_S
from training.data.lerobot import Video

START_NS: Final = 1_790_000_000 * NS_PER_S
CAMERAS: Final = ("front", "side")
JOINTS: Final = tuple(f"joint_{j + 1}" for j in range(7))
JOINT_TOPIC, COMMAND_TOPIC = "/joint_states", "/controller/joint_trajectory"
HEIGHT, WIDTH, IMAGE_HZ, JOINT_HZ, COMMAND_HZ = 480, 640, 30, 200, 10
LATE_NS: Final = 2_000_000  # from stamp to log
# Of a sensor in a room: this spread, in grey levels, and this quality make JPEGs of about 50 kB.
NOISE, QUALITY = 3.0, 80
Pixels = NDArray[np.uint8]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.speed.conversion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("make", "a bag"), ("measure", "how fast it becomes a dataset"), ("profile", "and why")):
        command = commands.add_parser(name, help=what)
        command.add_argument("bag", type=Path)
        if name == "make":
            command.add_argument("--seconds", type=int, default=60, help="of recording (default 60)")
        elif name == "measure":
            command.add_argument("--before", type=Path, metavar="CHECKOUT", help="of this repository, to compare with")
            command.add_argument("--rounds", type=int, default=3, help="default 3; the fastest counts")
        else:
            command.add_argument("--video", choices=get_args(Video), default="h264")
    return run_command("conversion", partial(_work, parser.parse_args(argv)))


def _work(arguments: argparse.Namespace) -> int:
    if arguments.command == "make":
        make_bag(arguments.bag, arguments.seconds)
    elif arguments.command == "measure":
        measure(arguments.bag, arguments.before, arguments.rounds)
    else:
        profile(arguments.bag, arguments.video)
    return ExitCode.FINE


def measure(bag: Path, before: Path | None, rounds: int) -> None:
    """Print the figures of both kinds of video here, and of H.264 in the other checkout."""
    here = Path(__file__).parents[2]
    ways: dict[str, tuple[Path, list[str]]] = {
        f"--video {video}": (here, ["--video", video]) for video in get_args(Video)
    }
    if before is not None:
        ways["before"] = (before, [])
    with open_bag(bag) as opened:
        if opened.start_ns is None or opened.end_ns is None:
            raise ConfigurationError(f"bag {bag}: expected messages, got none; make one with `make`")
        bag_s = (opened.end_ns - opened.start_ns) / NS_PER_S
    taken_s: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(dir=bag.absolute().parent) as folder:
        for number in range(rounds):
            for way, (checkout, more) in ways.items():
                begin_s = _processor_s(checkout, ["from-bag", "--help"])
                given = [*_options(bag, Path(folder, f"{number}{way.replace(' ', '')}")), *more]
                taken_s[way].append(_processor_s(checkout, given) - begin_s)
    print("| conversion | processor time | s of bag per s of one core | times as fast as --video h264 |")
    print("|---|---|---|---|")
    base_s = min(taken_s["--video h264"])
    for way, times in taken_s.items():
        print(f"| {way} | {min(times):.2f} s | {bag_s / min(times):.1f} | {base_s / min(times):.2f} |")


def profile(bag: Path, video: str) -> None:
    with tempfile.TemporaryDirectory(dir=bag.absolute().parent) as folder:
        figures, given = str(Path(folder, "figures")), [*_options(bag, Path(folder, "out")), "--video", video]
        _processor_s(Path(__file__).parents[2], given, ("-m", "cProfile", "-o", figures))
        pstats.Stats(figures).strip_dirs().sort_stats("tottime").print_stats(20)


def _options(bag: Path, out: Path) -> list[str]:
    cameras = [part for name in CAMERAS for part in ("--camera", f"{name}={_topic(name)}")]
    topics = ["--joint-states", JOINT_TOPIC, "--command", COMMAND_TOPIC, "--joints", *JOINTS, "--task", "work"]
    return ["from-bag", str(bag.absolute()), "--out", str(out), "--actions", "commands", *cameras, *topics]


def _processor_s(checkout: Path, arguments: Sequence[str], python: Sequence[str] = ()) -> float:
    """Processor time of a `training.convert` of that checkout, with all its threads; `python`: options for it."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(checkout.absolute()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *python, "-m", "training.convert", *arguments],
        cwd=checkout, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != ExitCode.FINE:
        raise ConfigurationError(f"{checkout}: expected training.convert to end well, got {done.stderr.strip()[-300:]}")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime


def make_bag(folder: Path, seconds: int) -> None:
    messages = sorted(
        (*_images(seconds), *_joint_states(seconds), *_commands(seconds)), key=lambda message: message[:2]
    )
    with BagFile(folder) as bag, Progress() as progress:
        for log_ns, topic, kind, make in messages:
            bag.write(topic, kind, log_ns, make())
            done_s = (log_ns - START_NS) / NS_PER_S
            progress.show(f"{done_s:.0f} s of {seconds}", done_s / seconds)


Planned = tuple[int, str, str, Any]
"""Log time, topic, type, and a function that makes the serialized message."""


def _images(seconds: int) -> Iterator[Planned]:
    rooms = {name: Room(seed) for seed, name in enumerate(CAMERAS)}
    for k in range(seconds * IMAGE_HZ):
        stamp_ns = START_NS + k * NS_PER_S // IMAGE_HZ
        for name in CAMERAS:
            yield stamp_ns + LATE_NS, _topic(name), COMPRESSED_IMAGE, partial(_image, rooms[name], k, stamp_ns)


def _topic(camera: str) -> str:
    return f"/camera/{camera}/image_raw/compressed"


def _joint_states(seconds: int) -> Iterator[Planned]:
    for k in range(seconds * JOINT_HZ):
        stamp_ns = START_NS + k * NS_PER_S // JOINT_HZ
        yield stamp_ns + LATE_NS, JOINT_TOPIC, JOINT_STATE, partial(_joint_state, k / JOINT_HZ, stamp_ns)


def _commands(seconds: int) -> Iterator[Planned]:
    for k in range(seconds * COMMAND_HZ):
        yield START_NS + k * NS_PER_S // COMMAND_HZ, COMMAND_TOPIC, TRAJECTORY, partial(_command, k / COMMAND_HZ)


class Room:
    """A still background of smooth noise, things that move in front of it, and a sensor's noise."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        coarse, fine = (self._rng.normal(size=(HEIGHT, WIDTH, 3)).astype(np.float32) for _ in range(2))
        layers = [cv2.GaussianBlur(coarse, (0, 0), 40), cv2.GaussianBlur(fine, (0, 0), 2)]
        self._still = 128 + sum(gain * layer / layer.std() for gain, layer in zip((40, 12), layers, strict=True))
        self._noise = self._rng.normal(0, NOISE, size=(2 * HEIGHT, 2 * WIDTH, 1)).astype(np.float32)

    def draw(self, k: int) -> Pixels:
        image, time_s = self._still.copy(), k / IMAGE_HZ
        for n, colour in enumerate(((200, 60, 60), (60, 180, 80), (70, 90, 200))):
            x = round(WIDTH * (0.5 + 0.4 * np.sin(0.7 * time_s + 2 * n)))
            y = round(HEIGHT * (0.5 + 0.35 * np.cos(0.9 * time_s + n)))
            cv2.circle(image, (x, y), 40 + 10 * n, colour, -1)
            cv2.line(image, (WIDTH // 2, 0), (x, y), (90, 90, 95), 18)
        y, x = self._rng.integers(0, HEIGHT), self._rng.integers(0, WIDTH)
        image += self._noise[y : y + HEIGHT, x : x + WIDTH]
        return np.clip(image, 0, 255).astype(np.uint8)


def _image(room: Room, k: int, stamp_ns: int) -> bytes:
    content = cv2.imencode(".jpg", room.draw(k), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].ravel()
    return _serialize(COMPRESSED_IMAGE, header=_header(stamp_ns), format="jpeg", data=content)


def _where(time_s: float) -> NDArray[np.float64]:
    return 0.5 * np.sin(0.8 * time_s + np.arange(len(JOINTS)))


def _joint_state(time_s: float, stamp_ns: int) -> bytes:
    none = np.zeros(0)
    return _serialize(
        JOINT_STATE, header=_header(stamp_ns), name=list(JOINTS), position=_where(time_s), velocity=none, effort=none
    )


def _command(time_s: float) -> bytes:
    """Where the arm is a tenth of a second later."""
    types, none = typestore().types, np.zeros(0)
    after = types["builtin_interfaces/msg/Duration"](sec=0, nanosec=100_000_000)
    point = types["trajectory_msgs/msg/JointTrajectoryPoint"](
        positions=_where(time_s + 0.1), velocities=none, accelerations=none, effort=none, time_from_start=after
    )
    return _serialize(TRAJECTORY, header=_header(0), joint_names=list(JOINTS), points=[point])


def _header(stamp_ns: int) -> Any:
    types = typestore().types
    stamp = types["builtin_interfaces/msg/Time"](sec=stamp_ns // NS_PER_S, nanosec=stamp_ns % NS_PER_S)
    return types["std_msgs/msg/Header"](stamp=stamp, frame_id="")


def _serialize(kind: str, **fields: Any) -> bytes:
    return bytes(typestore().serialize_cdr(typestore().types[kind](**fields), kind))


if __name__ == "__main__":
    sys.exit(main())
