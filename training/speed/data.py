"""How fast samples are drawn at random from a LeRobot dataset, beside LeRobot's own loader on the same files.

    python -m training.speed.data make out/speed/video --robot aloha --kind video
    python -m training.speed.data measure out/speed/video --robot aloha [--samples 256]
    python -m training.speed.data memory out/speed/many --robot aloha

`measure` counts processor time of all threads, which another job on the machine changes little: samples per second of
one core. LeRobot's samples have images at the size of the files; ours are at the model's, as the trainer takes them.
`memory` draws samples and says the peak of the process's memory. Exit codes: 0 fine, 2 could not run.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np

from ki_vla_ros.console import ExitCode, Progress, run_command
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.robot import Robot, find_robot, read_robot
from training.convert import DatasetWriter, Frame, Tables
from training.data.lerobot import VERSION, Dataset, Feature, Info, LeRobotSamples, RobotColumns, make_features
from training.speed.conversion import Room

SIZES: Final = (96, 224)
BATCH: Final = 32
MIB: Final = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.speed.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("make", "a dataset"), ("measure", "samples per second"), ("memory", "peak memory")):
        command = commands.add_parser(name, help=what)
        command.add_argument("dataset", type=Path)
        command.add_argument("--robot", required=True, help="robot file, or its name in config/robots/")
        if name == "make":
            command.add_argument(
                "--kind", choices=("video", "image"), default="video", help="h264, or png in the tables"
            )
            command.add_argument("--episodes", type=int, default=20)
            command.add_argument("--frames", type=int, default=150, help="of an episode")
            command.add_argument("--height", type=int, default=480, help="of the images; width is 4/3 of it")
        else:
            command.add_argument("--samples", type=int, default=256)
    return run_command("data", partial(_work, parser.parse_args(argv)))


def _work(arguments: argparse.Namespace) -> int:
    robot = read_robot(find_robot(arguments.robot))
    if arguments.command == "make":
        make(arguments.dataset, robot, arguments.kind, arguments.episodes, arguments.frames, arguments.height)
    elif arguments.command == "measure":
        measure(arguments.dataset, robot, arguments.samples)
    else:
        memory(arguments.dataset, robot, arguments.samples)
    return ExitCode.FINE


def measure(folder: Path, robot: Robot, count: int) -> None:
    dataset = Dataset(folder)
    begin_s = time.process_time()
    samples = LeRobotSamples(dataset, robot, image_size=SIZES[0], cache_bytes=0)
    opened_s = time.process_time() - begin_s
    rows = np.random.default_rng(0).integers(0, len(samples), size=count).tolist()
    rates: dict[str, float] = {}
    for name, draw in _lerobot(folder, robot):
        draw(rows[:4])
        rates[name] = count / _processor_s(draw, rows)
    for size in SIZES:
        samples = LeRobotSamples(dataset, robot, image_size=size, cache_bytes=0)
        samples.take(rows[:4])
        rates[f"ours, {size} px"] = count / _processor_s(samples.take, rows)
    cached = LeRobotSamples(dataset, robot, image_size=SIZES[-1])
    cached.take(rows)
    rates[f"ours, {SIZES[-1]} px, decoded before"] = count / _processor_s(cached.take, rows)
    theirs = max((rate for name, rate in rates.items() if not name.startswith("ours")), default=None)
    print(f"{len(samples)} frames; opening ours took {opened_s:.2f} s")
    print("| loader | samples per second of one core | times LeRobot's best |")
    print("|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} | {f'{rate / theirs:.1f}' if theirs else 'LeRobot is not installed'} |")


def _processor_s(draw: Callable[[list[int]], object], rows: Sequence[int]) -> float:
    begin_s = time.process_time()
    for first in range(0, len(rows), BATCH):
        draw(list(rows[first : first + BATCH]))
    return time.process_time() - begin_s


def _lerobot(folder: Path, robot: Robot) -> Iterator[tuple[str, Callable[[list[int]], object]]]:
    """LeRobot's loader with each of its video decoders; nothing where it is not installed."""
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ImportError:
        return
    times = {"action": [h * robot.action_period_s for h in range(robot.horizon)]}
    videos = any(feature.dtype == "video" for feature in Dataset(folder).info.features.values())
    for backend in ("torchcodec", "pyav") if videos else ("images",):
        given = {"video_backend": backend} if videos else {}
        loaded: Any = LeRobotDataset("local/dataset", root=folder, delta_timestamps=times, **given)
        try:
            loaded[0]
        except (ImportError, RuntimeError) as error:  # torchcodec without FFmpeg's libraries
            print(f"LeRobot with {backend}: does not run here: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        yield f"LeRobot, {backend}", partial(_take, loaded)


def _take(loaded: Any, rows: list[int]) -> list[Any]:
    return [loaded[row] for row in rows]


def memory(folder: Path, robot: Robot, count: int) -> None:
    """Of this process, with a cache of 64 MiB, so that what grows is not what the cache may take."""
    before = _peak_mib()
    samples = LeRobotSamples(Dataset(folder), robot, image_size=SIZES[0], cache_bytes=64 * MIB)
    opened = _peak_mib()
    rng = np.random.default_rng(0)
    for _ in range(0, count, BATCH):
        samples.take(rng.integers(0, len(samples), size=BATCH).tolist())
    for _ in samples.numbers():
        pass
    print(f"{len(samples.dataset.episodes)} episodes, {len(samples)} frames: peak memory {before:.0f} MiB before,")
    print(f"{opened:.0f} MiB once it was open, {_peak_mib():.0f} MiB after {count} samples and all numbers")


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make(out: Path, robot: Robot, kind: str, episodes: int, frames: int, height: int) -> None:
    """A dataset of that robot: a room with things that move (training/speed/conversion.py), joints that swing."""
    columns = RobotColumns(robot)
    rooms = {camera.key: Room(seed) for seed, camera in enumerate(robot.cameras)}
    room_size = (round(height * 4 / 3), height)
    fps = round(1.0 / robot.action_period_s)

    def images(k: int) -> dict[str, Any]:
        return {key: cv2.resize(room.draw(k), room_size, interpolation=cv2.INTER_AREA) for key, room in rooms.items()}

    def numbers(k: int) -> dict[str, Any]:
        return {key: 0.3 * np.sin(0.05 * k + np.arange(len(names))) for key, names in columns.names.items()}

    with Progress() as progress:
        if kind == "video":
            cameras = {camera.key: camera.key for camera in robot.cameras}
            with DatasetWriter(out, fps=fps, columns=columns.names, cameras=cameras, source={}) as writer:
                for episode in range(episodes):
                    for k in range(episode * frames, (episode + 1) * frames):
                        writer.add(Frame(k * NS_PER_S // fps, "do the work", numbers(k), images(k)))
                    writer.end_episode()
                    progress.show(f"{episode + 1} episodes of {episodes}", (episode + 1) / episodes)
            return
        shape = (height, room_size[0], 3)
        pictures = {key: Feature(dtype="image", shape=shape, names=["height", "width", "channels"]) for key in rooms}
        features = {key: f for key, f in make_features(columns.names, pictures).items() if key != "stamp_ns"}
        info = Info(codebase_version=VERSION, robot_type=robot.name, fps=fps, video_path=None, features=features)
        tables = Tables(out, info, list(rooms))
        for episode in range(episodes):
            drawn = range(episode * frames, (episode + 1) * frames)
            shown = [images(k) for k in drawn]
            for key, counts in tables.pixels.items():
                counts.add(shown[0][key])
            rows: dict[str, Any] = {key: np.stack([numbers(k)[key] for k in drawn]) for key in columns.names}
            rows |= {key: [_png(one[key]) for one in shown] for key in rooms}
            figures = {key: counts.describe() for key, counts in tables.pixels.items()}
            tables.add_episode(rows, ["do the work"] * frames, {}, figures)
            progress.show(f"{episode + 1} episodes of {episodes}", (episode + 1) / episodes)
        tables.close(features, {})


def _png(rgb_HWC: Any) -> bytes:
    return bytes(cv2.imencode(".png", cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2BGR))[1])


if __name__ == "__main__":
    sys.exit(main())
