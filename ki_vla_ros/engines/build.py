"""Build the TensorRT engines of a bundle: on the robot, or with TensorRT for RTX ahead of time for other GPUs.

    python -m ki_vla_ros.build_engines --bundle demo                                  # for this machine's GPU
    python -m ki_vla_ros.build_engines --bundle demo --library tensorrt_rtx --compute sm89,sm120 --out engines/

The node builds what it lacks by itself; this command does it beforehand. docs/tensorrt.md has the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ki_vla_ros.bundle import EXPERT, PREFILL, Bundle, load_bundle
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.engines.cuda import CudaDevice
from ki_vla_ros.engines.plans import PlanCache, default_folder
from ki_vla_ros.engines.tensorrt_builder import BuildOptions, Say, check_gpu, find_or_build, gpu_of, plan_key
from ki_vla_ros.engines.tensorrt_library import OLDEST, Library, load_library
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.share import find_bundle


def build_engines(
    bundle: Bundle, library: Library, gpus: Sequence[str], cache: PlanCache, options: BuildOptions, say: Say
) -> list[Path]:
    """Paths of both plans for each GPU, built where the cache lacks them."""
    for gpu in gpus:
        check_gpu(library, gpu)  # all of them before the first build, which takes long
    paths = []
    for gpu in gpus:
        for graph in (PREFILL, EXPERT):
            key = plan_key(bundle, graph, library, gpu)
            find_or_build(bundle, key, library, cache, say, options)
            paths.append(cache.path(key))
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ki_vla_ros.build_engines", description="Build the TensorRT engines of a bundle."
    )
    parser.add_argument("--bundle", required=True, help="folder of a bundle, or the name of one in models/")
    parser.add_argument("--library", choices=tuple(OLDEST), default="tensorrt", help="default: %(default)s")
    parser.add_argument(
        "--compute", help="tensorrt_rtx: GPUs to build for, such as sm89,sm120; default: this machine's"
    )
    parser.add_argument("--out", type=Path, help=f"folder of engines (default: {default_folder()})")
    parser.add_argument("--workspace", type=int, metavar="MB", help="largest scratch memory of a kernel")
    parser.add_argument(
        "--memory-check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="refuse a build that seems to need more memory than is free",
    )
    chosen = parser.parse_args(arguments)
    return run_command("build_engines", partial(_build, chosen), "interrupted; what was finished is kept")


def _build(chosen: argparse.Namespace) -> int:
    if chosen.compute is not None and chosen.library == "tensorrt":
        raise ConfigurationError(
            "--compute: expected none with tensorrt, which builds for the GPU that it runs on; add --library "
            "tensorrt_rtx, or run this on the robot"
        )
    if chosen.workspace is not None and chosen.workspace < 1:
        raise ConfigurationError(f"--workspace: expected at least 1 MB, got {chosen.workspace}")
    bundle = load_bundle(find_bundle(chosen.bundle))
    library = load_library(chosen.library)
    if chosen.compute is not None:
        gpus = [name.strip().lower() for name in chosen.compute.split(",")]
    else:
        device = CudaDevice()
        gpus = [gpu_of(device, library)]
        device.close()
    cache = PlanCache(chosen.out or default_folder())
    options = BuildOptions(chosen.workspace, chosen.memory_check)
    for path in build_engines(bundle, library, gpus, cache, options, _print):
        print(path)
    return ExitCode.FINE


def _print(message: str) -> None:
    print(message, file=sys.stderr)
