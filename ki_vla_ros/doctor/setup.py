"""What can be wrong before any message comes: installation, parameter file, bundle, engine, and how they fit."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np

from ki_vla_ros.bundle import Bundle, Manifest, load_bundle
from ki_vla_ros.doctor.checks import PROFILE_FIX
from ki_vla_ros.doctor.findings import Findings
from ki_vla_ros.engines import CudaDevice
from ki_vla_ros.errors import ConfigurationError, EngineError, InputError, ParameterError
from ki_vla_ros.policy import check_instruction
from ki_vla_ros.robot import find_robot, read_robot
from ki_vla_ros.runtime import axis_bounds
from ki_vla_ros.settings import NODE, NoSectionError, Settings, load_settings
from ki_vla_ros.share import PROFILE_VARIABLES, find_bundle

# The Python that each ROS 2 release is built for (its Ubuntu's), and the major version of numpy that comes with it.
RELEASES: Mapping[str, tuple[tuple[int, int], int]] = {
    "humble": ((3, 10), 1),
    "jazzy": ((3, 12), 1),
    "kilted": ((3, 12), 1),
}
DEFAULT_RMW = "rmw_fastrtps_cpp"
MIB = 2**20
# Fast DDS's own bookkeeping in each process (measured: 1.5 MiB with config/fastdds.xml, and 0.5 for another context).
SEGMENT_OVERHEAD = 2 * MIB
# The least that a robot runs: the policy, a camera driver, the controller, and one to look at them.
PROCESSES = 4
# An image of 640 x 480 rgb8, twice: what is being written and what is being read.
LEAST_SEGMENT = 2 * 640 * 480 * 3
START_FIX = "the node does not start with this; config/demo.yaml explains every parameter"
SHARED_SECTION_FIX = "correct its name if it is meant for this node; nothing to do if it is another node's"


@dataclass(frozen=True)
class Request:
    """What the doctor is to look at; `node` is the policy node's full name, `robot` a robot file or its name."""

    bag: Path | None = None
    params: Path | None = None
    bundle: str = ""
    node: str = NODE
    seconds: float = 5.0
    robot: str = ""


@dataclass(frozen=True)
class Machine:
    """What `check_machine` looks at."""

    python: tuple[int, int]
    numpy: str
    environment: Mapping[str, str]
    # rclpy was compiled for this Python, as in a build from source or a distribution's own packages.
    rclpy_fits: bool = False
    shared_memory: SharedMemory | None = None
    opencv: str = ""
    cv_bridge: bool = False

    @classmethod
    def here(cls) -> Machine:
        python = (sys.version_info[0], sys.version_info[1])
        cv_bridge = importlib.util.find_spec("cv_bridge") is not None
        own = _rclpy_fits(), SharedMemory.here(), str(cv2.__version__), cv_bridge
        return cls(python, np.__version__, dict(os.environ), *own)


@dataclass(frozen=True)
class SharedMemory:
    """/dev/shm, in bytes."""

    total: int
    free: int

    @classmethod
    def here(cls) -> SharedMemory | None:
        try:
            usage = shutil.disk_usage("/dev/shm")
        except OSError:
            return None
        return cls(usage.total, usage.free)


def _rclpy_fits() -> bool:
    spec = importlib.util.find_spec("rclpy")
    if spec is None or spec.origin is None:
        return False
    extension = Path(spec.origin).parent / "_rclpy_pybind11"
    return any(extension.with_name(extension.name + suffix).is_file() for suffix in EXTENSION_SUFFIXES)


def check_machine(machine: Machine, findings: Findings) -> None:
    distribution = machine.environment.get("ROS_DISTRO", "")
    have = ".".join(map(str, machine.python))
    if machine.python < (3, 10):
        findings.error("python", sys.executable, f"is Python {have}, expected 3.10 or newer", "use a newer python3")
    if distribution and distribution not in RELEASES:
        findings.warning(
            "ros",
            f"ROS_DISTRO {distribution}",
            f"is none of {', '.join(RELEASES)}, which this package is made for",
            "use one of them; with another, try the arm's limits and ~/stop first",
        )
    if distribution in RELEASES:
        python, numpy_major = RELEASES[distribution]
        if distribution == "humble":
            findings.warning(
                "ros",
                "ROS_DISTRO humble",
                "this package supports it in code, but has not been run on a real installation of it",
                "try the arm's limits and ~/stop first; where you can, use jazzy or kilted",
            )
        own_build = machine.rclpy_fits and machine.python != python
        if machine.python != python and not own_build:
            findings.error(
                "python",
                sys.executable,
                f"is Python {have}, but ROS 2 {distribution} is built for {'.'.join(map(str, python))}",
                "leave the virtual environment or conda, or make one with --system-site-packages from /usr/bin/python3",
            )
        if int(machine.numpy.split(".")[0]) > numpy_major and not own_build:
            findings.warning(
                "numpy",
                f"numpy {machine.numpy}",
                f"ROS 2 {distribution} comes with numpy {numpy_major}, its compiled modules (cv_bridge) crash with 2",
                f"pip install 'numpy<{numpy_major + 1}'",
            )
    if machine.cv_bridge and machine.opencv.startswith("5."):
        findings.warning(
            "opencv",
            f"OpenCV {machine.opencv}",
            "cv_bridge is installed, too, and is built for OpenCV 4, whose numbers for types of images are others",
            "pip uninstall opencv-python-headless (apt's python3-opencv stays), or pip install "
            "'opencv-python-headless<5'",
        )
    middleware = machine.environment.get("RMW_IMPLEMENTATION", DEFAULT_RMW)
    if "fastrtps" in middleware:
        for variable in PROFILE_VARIABLES:
            if file := machine.environment.get(variable):
                _check_profile(variable, Path(file), findings)


def _check_profile(variable: str, file: Path, findings: Findings) -> None:
    try:
        root = ElementTree.parse(file).getroot()
    except OSError as error:
        findings.error("fast dds", f"{variable}={file}", f"cannot be read: {error.strerror}", PROFILE_FIX)
        return
    except ElementTree.ParseError as error:
        findings.error("fast dds", f"{variable}={file}", f"is not XML: {error}", PROFILE_FIX)
        return
    try:
        size = _segment_size(root)
    except ValueError as error:
        findings.error("fast dds", f"{variable}={file}", f"expected a number as segment_size: {error}", PROFILE_FIX)
        return
    if size < LEAST_SEGMENT:
        findings.warning(
            "fast dds",
            f"{variable}={file}",
            f"gives shared memory {size} bytes, two images need {LEAST_SEGMENT}",
            PROFILE_FIX,
        )


def _segment_size(root: ElementTree.Element) -> int:
    """The largest segment of shared memory, in bytes, that the profile gives a process; 0: the default (512 KB)."""
    return max((int(e.text or 0) for e in root.iter() if e.tag.endswith("segment_size")), default=0)


def check_shared_memory(machine: Machine, findings: Findings) -> None:
    """Only for running topics. A process that gets no segment says nothing, and its images go over UDP or are lost."""
    files = [machine.environment[name] for name in PROFILE_VARIABLES if machine.environment.get(name)]
    memory = machine.shared_memory
    if memory is None or not files or "fastrtps" not in machine.environment.get("RMW_IMPLEMENTATION", DEFAULT_RMW):
        return
    try:
        segment = _segment_size(ElementTree.parse(files[0]).getroot())
    except (OSError, ElementTree.ParseError, ValueError):
        return  # `_check_profile` says so
    each = segment + SEGMENT_OVERHEAD
    room = f"has {memory.total / MIB:.0f} MiB, {memory.free / MIB:.0f} of them free; each process with this profile "
    room += f"takes {each / MIB:.0f}"
    if memory.total < PROCESSES * each:
        findings.warning(
            "shared memory",
            "/dev/shm",
            f"{room}: enough for {memory.total // each} of them, and images of the others may be lost silently",
            f"in Docker, start the container with --shm-size={PROCESSES * each // MIB + 64}m or --ipc=host; elsewhere "
            f"remount /dev/shm with a size of {PROCESSES * each // MIB + 64}M or more",
        )
    elif memory.free < each:
        findings.warning(
            "shared memory",
            "/dev/shm",
            f"{room}: the next process gets none, and its images may be lost silently",
            "remove what dead processes left there (`fastdds shm clean`, or fastdds_* files of no process), or make it "
            "larger",
        )


def check_profile_is_set(machine: Machine, findings: Findings) -> None:
    """Only for running topics: nobody knows which profile a bag was recorded with."""
    if "fastrtps" not in machine.environment.get("RMW_IMPLEMENTATION", DEFAULT_RMW):
        return
    if not any(machine.environment.get(variable) for variable in PROFILE_VARIABLES):
        findings.warning("fast dds", PROFILE_VARIABLES[0], "is not set: images may be lost silently", PROFILE_FIX)


def examine_setup(settings: Settings, request: Request, findings: Findings, looked_at: list[str]) -> Bundle | None:
    """Bundle, engine and how they fit the settings; None where the bundle cannot be read.

    Inputs can be judged without it as far as the parameters name them.
    """
    name = request.bundle or settings.bundle
    bundle = read_bundle(name, findings)
    check_engine(settings, bundle, findings)
    if bundle is not None:
        looked_at.append(f"bundle {bundle.manifest.name}")
        check_settings(settings, bundle, findings)
        with suppress(ConfigurationError):  # a finding already
            bundle = bundle.on_robot(settings.robot_description)
    else:
        looked_at.append("no bundle: of the inputs only those that the parameters name")
    return bundle


def read_settings(path: Path, findings: Findings, node: str = NODE) -> Settings | None:
    try:
        return load_settings(
            path, node, lambda found: findings.warning("parameters", str(path), found, SHARED_SECTION_FIX)
        )
    except ParameterError as error:
        for problem in error.problems:
            findings.error("parameters", str(path), problem, START_FIX)
    except NoSectionError as error:
        fix = "ROS silently ignores the whole file: correct the name at its top"
        findings.error("node name", str(path), str(error).removeprefix(f"{path}: "), fix)
    except ConfigurationError as error:
        findings.error("parameters", str(path), str(error).removeprefix(f"{path}: "), START_FIX)
    return None


def read_bundle(name: str, findings: Findings) -> Bundle | None:
    try:
        return load_bundle(find_bundle(name))
    except ConfigurationError as error:
        findings.error("bundle", name or "''", str(error), "give the folder that export wrote, whole and unchanged")
        return None


def check_settings(settings: Settings, bundle: Bundle, findings: Findings) -> None:
    """Checks settings against the bundle, and against each other."""
    if settings.robot:
        try:
            bundle = bundle.described_by(read_robot(find_robot(settings.robot)))
        except ConfigurationError as error:
            findings.error("parameters", "robot", str(error), "the node does not configure with this")
    manifest = bundle.manifest
    try:
        settings.validate_against(manifest)
    except ParameterError as error:
        for problem in error.problems:
            findings.error("parameters", manifest.name, problem, "the node does not configure with this")
    try:
        axis_bounds(manifest.axes, settings.limits, settings.robot_description)
    except ConfigurationError as error:
        findings.error("parameters", manifest.name, str(error), "the node does not configure with this")
    for name in ("execution_horizon_s", "prefill_period_s"):
        ticks = getattr(settings, name) * settings.rate_hz
        if abs(ticks - round(ticks)) > 1e-6:
            whole = max(1, round(ticks))
            findings.warning(
                "horizon",
                name,
                f"{getattr(settings, name):g} s are {ticks:.2f} ticks at rate_hz {settings.rate_hz:g}; the node takes "
                f"{whole}",
                f"set it to {whole / settings.rate_hz:g}, which is what happens",
            )
    _check_periods(settings, manifest, findings)
    if settings.instruction:
        try:
            check_instruction(bundle, settings.instruction)
        except InputError as error:
            findings.error("instruction", "instruction", str(error), "use words that the model was trained with")


def _check_periods(settings: Settings, manifest: Manifest, findings: Findings) -> None:
    if settings.command_period_s > manifest.action_period_s + 1e-9:
        findings.warning(
            "period",
            "command_period_s",
            f"{settings.command_period_s:g} s between a command's points, but actions are {manifest.action_period_s:g} "
            "s apart: some are skipped",
            f"set it to {manifest.action_period_s:g} or less",
        )
    if settings.hold_after_s < settings.execution_horizon_s:
        findings.warning(
            "horizon",
            "hold_after_s",
            f"the watchdog holds the arm after {settings.hold_after_s:g} s without a fresh chunk, but one comes only "
            f"every {settings.execution_horizon_s:g} s (execution_horizon_s)",
            "raise hold_after_s above execution_horizon_s and a tick",
        )


def check_engine(settings: Settings, bundle: Bundle | None, findings: Findings) -> None:
    """Checks that the chosen engine is available here; nothing is loaded or built."""
    try:
        _find_engine(settings, bundle)
    except EngineError as error:
        findings.error(
            "engine",
            f"engine {settings.engine}, provider {settings.provider}",
            str(error),
            "install what is missing, or choose another engine and provider; the node never takes another by itself",
        )


def _find_engine(settings: Settings, bundle: Bundle | None) -> None:
    module = {"onnx": "onnxruntime"}.get(settings.engine, settings.engine)
    if importlib.util.find_spec(module) is None:
        raise EngineError(f"expected the Python module {module}, got none")
    if settings.engine == "onnx":
        import onnxruntime

        from ki_vla_ros.engines.onnx_engine import PROVIDERS

        wanted, available = PROVIDERS[settings.provider], onnxruntime.get_available_providers()
        if wanted not in available:
            raise EngineError(f"onnxruntime has no {wanted} here, only {', '.join(available)}")
    elif (
        settings.engine == "torch" and bundle is not None and not any(f.endswith(".pt2") for f in bundle.manifest.files)
    ):
        raise EngineError("the bundle has no programs for torch; export it with --torch")
    if settings.engine == "torch" and settings.provider == "cuda":
        from ki_vla_ros.engines.torch_card import check_card

        check_card()
    if settings.engine in ("tensorrt", "tensorrt_rtx"):
        CudaDevice().close()
