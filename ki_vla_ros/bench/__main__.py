"""Measurements on this machine.

    python -m ki_vla_ros.bench node --seconds 60 --json FILE
    python -m ki_vla_ros.bench model --bundle demo --engine onnx --threads 2
    python -m ki_vla_ros.bench compare onnx:threads=2 torch:threads=2 --bundle my_bundle

`node`: what the ROS node adds to the model, on real topics. `model`: the two graphs on an engine, next to the least
time that the device's arithmetic and memory allow. `compare`: two engines, settings or bundles in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from ki_vla_ros.bench.compare import bench_compare, parse_set_up
from ki_vla_ros.bench.compare import table as compare_table
from ki_vla_ros.bench.model import CALLS, EngineSetUp, bench_model
from ki_vla_ros.bench.model import table as model_table
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.errors import ConfigurationError, writing
from ki_vla_ros.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("bench", partial(_bench, _parser().parse_args(arguments)))


def _bench(chosen: argparse.Namespace) -> int:
    if chosen.json is not None:
        with writing(chosen.json):
            chosen.json.open("a").close()  # a place that cannot be written is said before minutes of measuring
    figures, text = {"node": _node, "model": _model, "compare": _compare}[chosen.command](chosen)
    print(text)
    if chosen.json is not None:
        with writing(chosen.json):
            chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return ExitCode.FINE


def _node(chosen: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ki_vla_ros.bench import node as bench_node  # the only one that needs ROS

    figures = bench_node.bench_node(chosen.bundle, chosen.instruction, chosen.seconds, chosen.hogs, _say)
    return figures, bench_node.table(figures)


def _model(chosen: argparse.Namespace) -> tuple[dict[str, Any], str]:
    figures = bench_model(
        _set_up(chosen, chosen.engine), _calls(chosen), chosen.roofline, _say_aside, chosen.processor_time
    )
    return figures, model_table(figures)


def _compare(chosen: argparse.Namespace) -> tuple[dict[str, Any], str]:
    first, second = (parse_set_up(text, _set_up(chosen, "onnx")) for text in (chosen.a, chosen.b))
    figures = bench_compare(first, second, _calls(chosen), _say_aside)
    return figures, compare_table(figures)


def _set_up(chosen: argparse.Namespace, engine: str) -> EngineSetUp:
    return EngineSetUp(chosen.bundle, engine, chosen.provider, chosen.threads, chosen.flow_steps, chosen.torch_mode)


def _calls(chosen: argparse.Namespace) -> int:
    if chosen.calls < 1:
        raise ConfigurationError(f"--calls: expected at least 1, got {chosen.calls}")
    return int(chosen.calls)


def _say(line: str) -> None:
    print(line, flush=True)


def _say_aside(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ki_vla_ros.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    node = commands.add_parser("node", help="what the node adds to the model; also the soak test")
    node.add_argument("--seconds", type=float, default=60.0, help="duration after five seconds of warm-up; default 60")
    node.add_argument("--bundle", default="bench", help="default: three cameras, random weights, hardly any work")
    node.add_argument("--instruction", default="touch the red cube", help="an instruction that the bundle understands")
    node.add_argument("--hogs", type=int, default=0, help="processes that only keep a processor busy")
    model = commands.add_parser("model", help="a bundle's graphs on an engine, and the device's roofline")
    model.add_argument("--engine", choices=_choices("engine"), default="onnx")
    model.add_argument("--no-roofline", action="store_false", dest="roofline", help="do not measure the device")
    model.add_argument("--processor-time", action="store_true", help="for a busy machine; provider cpu, one thread")
    compare = commands.add_parser("compare", help="two set-ups in turns")
    for name in ("a", "b"):
        compare.add_argument(name, help="engine, then perhaps :bundle=...,provider=...,threads=...,torch_mode=...")
    for command in (model, compare):
        command.add_argument("--bundle", default="demo", help="folder, or the name of a shipped one; default: demo")
        command.add_argument("--provider", choices=_choices("provider"), default="cpu")
        command.add_argument("--threads", type=int, default=1, help="default 1, as for the node")
        command.add_argument("--flow-steps", type=int, default=0, help="default: as the bundle says")
        command.add_argument("--torch-mode", choices=_choices("torch_mode"), default="auto", help="for engine torch")
        command.add_argument("--calls", type=int, default=CALLS, help=f"calls of each part; default {CALLS}")
    for command in (node, model, compare):
        command.add_argument("--json", type=Path, help="write the figures there")
    return parser


def _choices(setting: str) -> tuple[str, ...]:
    return get_args(Settings.model_fields[setting].annotation)


if __name__ == "__main__":
    sys.exit(main())
