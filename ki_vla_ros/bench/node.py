"""`bench node`: the policy node in its own process on real topics, and its robot in this one.

The robot has cameras (640 x 480 at 30 Hz), joint states (200 Hz), and an arm that does exactly what it is told. What is
measured is what the node adds to the model. With `--seconds 600`, perhaps `--hogs 2`, it is the soak test.
"""

from __future__ import annotations

import array
import json
import multiprocessing
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from ki_vla_ros.bundle import PolicySpec, load_bundle
from ki_vla_ros.errors import KiVlaError, cause_of
from ki_vla_ros.records import NS_PER_S, to_ns
from ki_vla_ros.ros import make_executor, ns_to_stamp
from ki_vla_ros.ros.children import Child, Children, prepare_environment
from ki_vla_ros.ros.qos import EVENT, EVERYTHING, SENSOR
from ki_vla_ros.runtime.paths import CommandedPath
from ki_vla_ros.share import find_bundle
from ki_vla_ros.statistics import spread

IMAGE_WIDTH, IMAGE_HEIGHT = 640, 480
MODEL_STAGES = ("prefill", "denoise")
CAMERA_HZ, JOINT_HZ, TICK_HZ = 30.0, 200.0, 10.0
# In CDR, the stamp of a message that begins with a header: seconds and nanoseconds after four bytes.
STAMP, STAMP_OFFSET = struct.Struct("<iI"), 4
# Not counted: discovery, first touches of memory, and the ticks' alignment to the cameras.
WARM_UP_S = 5.0
START_LIMIT_S = 30.0
# After the last image the node gets this long to report how many arrived.
SETTLE_S = 2.5


class BenchRobot:
    """The node's robot; `run` publishes in a thread of its own and handles messages in the caller's."""

    def __init__(self, policy: PolicySpec) -> None:
        self.ticks: list[dict[str, Any]] = []
        self.status: Mapping[str, str] = {}
        self.images_sent = self.published_until_ns = 0
        self._names = list(policy.axis_names)
        middle_J = (np.array(policy.state.low) + np.array(policy.state.high)) / 2.0
        self._arm = CommandedPath(self._names, middle_J)
        self._arm_in_use = threading.Lock()
        self._node = rclpy.create_node("bench_robot")
        self._joints = self._node.create_publisher(JointState, "joint_states", EVENT)
        noise = np.random.default_rng(0)
        self._cameras = []
        for camera in policy.cameras:
            publisher = self._node.create_publisher(Image, f"camera/{camera.name}/image_raw", SENSOR)
            pixels = noise.integers(0, 256, (IMAGE_HEIGHT, IMAGE_WIDTH, 3), dtype=np.uint8)
            image = Image(height=IMAGE_HEIGHT, width=IMAGE_WIDTH, step=3 * IMAGE_WIDTH, encoding="rgb8")
            image.data = array.array("B", pixels.tobytes())
            self._cameras.append((publisher, bytearray(serialize_message(image))))
        self._node.create_subscription(String, "policy/tick", self._on_tick, EVERYTHING)
        self._node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, EVENT)
        self._node.create_subscription(JointTrajectory, "arm_controller/joint_trajectory", self._on_command, EVENT)
        self._executor = make_executor()
        self._executor.add_node(self._node)

    def wait_until(self, done: Callable[[], bool], policy: Child, what: str) -> None:
        deadline_s = time.monotonic() + START_LIMIT_S
        while not done():
            policy.check()
            if time.monotonic() > deadline_s:
                raise KiVlaError(f"bench: the node did not {what} within {START_LIMIT_S:g} s:\n{policy.log_tail()}")
            self._executor.spin_once(timeout_sec=0.1)

    def run(self, seconds: float, policy: Child, every_second: Callable[[float], None]) -> None:
        stop = threading.Event()
        publishing = threading.Thread(target=self._publish, args=(stop,), name="publishing")
        publishing.start()
        began_s = said_s = time.monotonic()
        try:
            while time.monotonic() - began_s < seconds:
                self._executor.spin_once(timeout_sec=0.1)
                if time.monotonic() - said_s >= 1.0:
                    said_s += 1.0
                    policy.check()
                    every_second(said_s - began_s)
        finally:
            stop.set()
            publishing.join()
        self.published_until_ns = time.time_ns()
        settled_s = time.monotonic() + SETTLE_S
        while time.monotonic() < settled_s:
            self._executor.spin_once(timeout_sec=0.1)

    def close(self) -> None:
        self._executor.shutdown()
        self._node.destroy_node()

    def _publish(self, stop: threading.Event) -> None:
        began_s, images, joints = time.monotonic(), 0, 0
        while not stop.is_set():
            since_s = time.monotonic() - began_s
            if since_s >= joints / JOINT_HZ:
                joints += 1
                self._publish_joints()
            if since_s >= images / CAMERA_HZ:
                images += 1
                for publisher, image in self._cameras:
                    # Serialized once: a driver in C++ would not cost the machine what rclpy does per image.
                    STAMP.pack_into(image, STAMP_OFFSET, *divmod(time.time_ns(), NS_PER_S))
                    publisher.publish(bytes(image))
                    self.images_sent += 1
            next_s = min(joints / JOINT_HZ, images / CAMERA_HZ)
            stop.wait(max(0.0, began_s + next_s - time.monotonic()))

    def _publish_joints(self) -> None:
        now_ns = time.time_ns()
        with self._arm_in_use:
            position_J = self._arm.sample(now_ns)[0]
        message = JointState(name=self._names, position=position_J.tolist())
        message.header.stamp = ns_to_stamp(now_ns)
        self._joints.publish(message)

    def _on_command(self, message: JointTrajectory) -> None:
        with self._arm_in_use:
            self._arm.take(message, time.time_ns())

    def _on_tick(self, message: String) -> None:
        self.ticks.append(json.loads(message.data))

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        self.status = {entry.key: entry.value for entry in message.status[0].values}


def bench_node(bundle: str, instruction: str, seconds: float, hogs: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs node and robot for `WARM_UP_S` + `seconds`: figures over the latter; ChildError if the node exits."""
    policy = load_bundle(find_bundle(bundle)).manifest
    with tempfile.TemporaryDirectory(prefix="ki_vla_bench_") as folder, Children(Path(folder)) as children:
        prepare_environment(Path(folder))
        rclpy.init(args=[])
        busy = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(hogs)]
        robot = BenchRobot(policy)
        try:
            parameters = {"bundle": bundle, "instruction": instruction, "autostart": True}
            arguments = ["--ros-args"]
            for name, value in parameters.items():
                arguments += ["-p", f"{name}:={json.dumps(value)}"]
            child = children.start("policy", "ki_vla_ros.ros.node", arguments)
            robot.wait_until(lambda: robot.status.get("state") == "active", child, "become active")
            for process in busy:
                process.start()
            memory_mib: dict[float, float] = {}

            def every_second(since_s: float) -> None:
                memory_mib[since_s] = resident_mib(child.process.pid)
                if since_s % 10 == 0:
                    say(
                        f"{since_s:.0f} s: {robot.status.get('deadline_misses')} deadlines missed, "
                        f"{memory_mib[since_s]:.1f} MiB"
                    )

            robot.run(WARM_UP_S + seconds, child, every_second)
        finally:
            for process in busy:
                process.kill()
            robot.close()
            rclpy.try_shutdown()
    figures = {"bundle": policy.name, "seconds": seconds, "hogs": hogs, "cameras": len(policy.cameras)}
    ticks = [tick for tick in robot.ticks if tick["stamp_ns"] < robot.published_until_ns]
    return figures | summarize(ticks, robot.status, robot.images_sent, policy, memory_mib)


def summarize(
    ticks: Sequence[Mapping[str, Any]],
    status: Mapping[str, str],
    images_sent: int,
    policy: PolicySpec,
    memory_mib: Mapping[float, float],
) -> dict[str, Any]:
    """Figures of one run; all durations in ms.

    `overhead_ms`: from the newest image's stamp to the published command, minus the model's time (stages prefill and
    denoise). `observation_to_command_ms`: from the oldest stamp, including the model. A missed deadline is unnoticed if
    a tick is missing that the node did not count.
    """
    if not ticks:
        raise KiVlaError("bench: expected ticks, got none")
    first_ns = ticks[0]["stamp_ns"] + to_ns(WARM_UP_S)
    counted = [tick for tick in ticks if tick["stamp_ns"] >= first_ns]
    sent = [tick for tick in counted if tick["chunk_index"] is not None]
    if len(sent) < 2:
        raise KiVlaError(f"bench: expected chunks, got holds: {counted[-1]['hold'] if counted else 'no ticks'}")
    model_ms = np.array([sum(tick["stage_ms"].get(name, 0.0) for name in MODEL_STAGES) for tick in sent])
    since_newest_ms = np.array([tick["command_ns"] - tick["newest_image_ns"] for tick in sent]) / 1e6
    since_oldest_ms = np.array([tick["command_ns"] - tick["observation_ns"] for tick in sent]) / 1e6
    newest_when_begun_ms = np.array([tick["stamp_ns"] - tick["newest_image_ns"] for tick in sent]) / 1e6
    received = sum(int(status[f"{camera.name} messages"]) for camera in policy.cameras)
    periods = (counted[-1]["stamp_ns"] - counted[0]["stamp_ns"]) * TICK_HZ / NS_PER_S
    missed = counted[-1]["deadline_misses"] - counted[0]["deadline_misses"]
    missing = round(periods) + 1 - len(counted)
    total_ms = float(np.median([tick["stage_ms"]["total"] for tick in sent]))
    stages = [name for name in sent[-1]["stage_ms"] if name != "total"]
    late_s = [at for at in memory_mib if at >= min(30.0, max(memory_mib) / 2)]
    return {
        "overhead_ms": spread(since_newest_ms - model_ms),
        "of_that_image_age_at_tick_ms": spread(newest_when_begun_ms),
        "model_ms": spread(model_ms),
        "observation_to_command_ms": spread(since_oldest_ms),
        "images_sent": images_sent,
        "images_lost": images_sent - received,
        "stages_ms": {
            name: spread([t["stage_ms"].get(name, 0.0) for t in sent])
            | {"share": float(np.median([t["stage_ms"].get(name, 0.0) for t in sent])) / total_ms}
            for name in stages
        },
        "ticks": len(counted),
        "chunks": len(sent),
        "holds": sorted({cause_of(str(t["hold"])) for t in counted if t["hold"] is not None}),
        "deadlines_missed": missed,
        "deadlines_missed_share": missed / max(1.0, periods),
        "deadlines_missed_unnoticed": max(0, missing - missed),
        "gc_pause_ms_max": float(status.get("gc_pause_ms_max", "nan")),
        "resident_mib": {
            "at_s": late_s[0],
            "then": memory_mib[late_s[0]],
            "end": memory_mib[late_s[-1]],
            "growth": memory_mib[late_s[-1]] - memory_mib[late_s[0]],
        },
    }


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def table(figures: Mapping[str, Any]) -> str:
    lines = [f"{'ms':<28}{'p50':>8}{'p90':>8}{'p99':>8}{'max':>8}{'share':>8}"]
    rows = {name: figures[name] for name in figures if isinstance(figures[name], dict) and "p50" in figures[name]}
    rows |= {f"  {name}": value for name, value in figures["stages_ms"].items()}
    for name, row in rows.items():
        share = f"{row['share']:>8.0%}" if "share" in row else ""
        lines.append(
            f"{name.removesuffix('_ms'):<28}{row['p50']:>8.2f}{row['p90']:>8.2f}{row['p99']:>8.2f}{row['max']:>8.2f}{share}"
        )
    memory = figures["resident_mib"]
    lines += [
        f"images: {figures['images_sent']} sent, {figures['images_lost']} lost",
        f"ticks: {figures['ticks']}, chunks: {figures['chunks']}; holds: {', '.join(figures['holds']) or 'none'}",
        f"deadlines: {figures['deadlines_missed']} missed ({figures['deadlines_missed_share']:.2%}), "
        f"{figures['deadlines_missed_unnoticed']} ticks missing that the node did not count",
        f"memory: {memory['then']:.1f} MiB after {memory['at_s']:.0f} s, {memory['end']:.1f} MiB at the end "
        f"({memory['growth']:+.1f}); longest pause for garbage: {figures['gc_pause_ms_max']:.2f} ms",
    ]
    lines += [
        "overhead: from the newest image's stamp to the command, minus the model (prefill, denoise);",
        f"share: of a tick; all figures but the count of images leave out the first {WARM_UP_S:g} s",
    ]
    return "\n".join(lines)


def _spin() -> None:
    while True:
        pass
