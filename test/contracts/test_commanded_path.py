"""A replay's reference and a dataset's actions agree on what a bag's arm was commanded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.bundles import write_test_bundle
from support.lerobot_runs import run
from support.sample_bags import (
    COMMAND_TOPIC,
    JOINTS,
    START_NS,
    Messages,
    header,
    recording,
    serialize,
    where,
    write_bag,
)

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.bundle.folder import Bundle
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.messages.decoding import BagMessage, typestore
from ki_vla_ros.messages.type_names import POSITIONS, TRAJECTORY
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.replay.latency import parse_latency
from ki_vla_ros.replay.loop import Replay
from ki_vla_ros.replay.setup import ReplayOptions, set_up
from training.data.lerobot.dataset import Dataset

MS = 1_000_000
SECONDS = 3.0
LOOSE = {"limits.on_jump": "clamp", "limits.on_speed": "clamp", "limits.on_position": "clamp", "ramp_in_s": 0.0}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("bundle"))


def trajectory(rng: np.random.Generator, since_s: float, stamp_ns: int, velocities: bool) -> bytes:
    """Four points 40 to 250 ms apart, near the recorded motion; with `velocities` at rest at the end."""
    types, points, at_s = typestore().types, [], 0.0
    for k in range(4):
        at_s += float(rng.uniform(0.04, 0.25))
        points.append(
            types["trajectory_msgs/msg/JointTrajectoryPoint"](
                positions=where(since_s + at_s) + rng.normal(0.0, 0.02, len(JOINTS)),
                velocities=(rng.normal(0.0, 0.3, len(JOINTS)) * (k < 3)) if velocities else np.zeros(0),
                accelerations=np.zeros(0),
                effort=np.zeros(0),
                time_from_start=types["builtin_interfaces/msg/Duration"](0, round(at_s * NS_PER_S)),
            )
        )
    message = types[TRAJECTORY](header=header(stamp_ns), joint_names=list(JOINTS), points=points)
    return serialize(message, TRAJECTORY)


def commands(kind: str) -> Messages:
    """A message every 60 to 160 ms. "past": every other one has ended before it arrives; "begun": it has begun."""
    rng, found, at_ns = np.random.default_rng(5), [], START_NS + 5 * MS
    late_ns = {"future": -70 * MS, "begun": 90 * MS, "past": 2 * NS_PER_S}.get(kind)
    while at_ns < START_NS + SECONDS * NS_PER_S:
        since_s = (at_ns - START_NS) / NS_PER_S
        if kind == "stream":
            types = typestore().types
            layout = types["std_msgs/msg/MultiArrayLayout"](dim=[], data_offset=0)
            position_J = where(since_s) + rng.normal(0.0, 0.02, len(JOINTS))
            data = serialize(types[POSITIONS](layout=layout, data=position_J), POSITIONS)
        else:
            stamped = late_ns is not None and (kind != "past" or len(found) % 2)
            data = trajectory(rng, since_s, at_ns - (late_ns or 0) if stamped else 0, kind != "positions")
        found.append(BagMessage(COMMAND_TOPIC, POSITIONS if kind == "stream" else TRAJECTORY, at_ns, data))
        at_ns += int(rng.integers(60, 160)) * MS
    return found


def replayed(bag_path: Path, bundle: Bundle) -> dict[int, NDArray[np.float64]]:
    """The positions that the replay says were commanded, by time, where it knows them."""
    with open_bag(bag_path) as bag:
        plan = set_up(bag, str(bundle.path), reference="command", changes=LOOSE)
        options = ReplayOptions(probe_every_s=0.0, latency=parse_latency("0.02"))
        replay = Replay(bag, bundle, OnnxEngine(bundle), plan.settings, plan.topics, options)
        found = {}
        for tick in replay.ticks():
            if tick.prediction is not None:
                chunk = tick.prediction
                due_H = chunk.start_ns + (np.arange(len(chunk.position_HJ)) + 1) * chunk.period_ns
                known_H = np.isfinite(chunk.reference_HJ).all(axis=1)
                found.update(zip(due_H[known_H].tolist(), chunk.reference_HJ[known_H], strict=True))
    return found


@pytest.mark.parametrize("kind", ["velocities", "positions", "future", "begun", "past", "stream"])
def test_a_replay_and_a_dataset_agree_about_a_bag(tmp_path: Path, bundle: Bundle, kind: str) -> None:
    others = [message for message in recording(SECONDS) if message.topic != COMMAND_TOPIC]
    told = commands(kind)
    bag = write_bag(tmp_path / "bag", sorted([*others, *told], key=lambda message: message.log_ns))
    reference = replayed(bag, bundle)
    arguments = ("--bundle", bundle.path, "--fps", 20, "--actions", "commands", "--out", tmp_path / "dataset")
    assert run("from-bag", bag, *arguments) == 0
    dataset = Dataset(tmp_path / "dataset")
    columns = [dataset.columns(episode) for episode in dataset.episodes]
    stamps = np.concatenate([column["stamp_ns"] for column in columns])
    actions = np.concatenate([column["action"] for column in columns])
    both = {stamp + 50 * MS: action for stamp, action in zip(stamps.tolist(), actions, strict=True)}
    common = sorted(both.keys() & reference.keys())
    assert len(common) >= 40 and np.ptp([both[time_ns][0] for time_ns in common]) > 0.1
    for time_ns in common:
        np.testing.assert_allclose(reference[time_ns], both[time_ns], atol=2e-7)
    # Known from the same instant on: a replay's first chunk is made when the dataset's first frame could be.
    assert min(both) == min(reference)
