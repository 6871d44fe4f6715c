"""A bundle with random weights that costs next to nothing to run: for tests, and to time everything but the model.

    python -m training.export.tiny models/bench --tokenizer models/bench/tokenizer.json
    python -m training.export.tiny out/random --robot aloha      # for the robot of a robot file

It is made with onnx alone. Its prefill mixes pixels and tokens into keys and values; its expert attends to them, and
its flow leads straight to a smooth, small motion whose size depends on images and prompt. So chunks look like a
policy's, are the same for the same input and different for another. `models/bench` has three cameras of 224 pixels and
a horizon of 50, as pi0 has. With a robot file, no action asks for more than half of the robot's highest speeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer

from ki_vla_ros.bundle import TIME, Bundle, GraphSpec, PolicySpec, load_tokenizer, write_bundle
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot import ActionDimension, Robot, find_robot, read_robot
from training.policy import describe_policy, describe_random_policy
from training.tokens import VocabularyConfig, make_vocabulary, prompt_template, prompt_tokenizer

_GRID = 2  # image tokens per side
_QUERIES = 4
_PERIOD = 1e6
_LAYERS, _KV_HEADS, _HEAD_DIM = 2, 1, 8
_CARD = "Random weights: for tests and benchmarks only, **never for an arm**.\n"


def bench_policy() -> PolicySpec:
    """Three cameras; absolute actions, so that an arm that follows them does not wander."""
    return describe_random_policy(
        joints=7,
        name="bench",
        created="2026-11-21T00:00:00Z",
        cameras=[{"name": "front"}, {"name": "left"}, {"name": "right"}],
        image={"size": 224},
        prompt={"template": prompt_template(_QUERIES), "length": 48},
        state={"encoding": "both", "low": [-3.0] * 7, "high": [3.0] * 7},
        action={"low": [-0.4] * 7, "high": [0.4] * 7},
        horizon=50,
    )


def robot_policy(robot: Robot, seed: int = 0) -> PolicySpec:
    """A policy for a robot: small motions from where it is, or around the middle of where it may be."""
    state = [_span(d.limits or d.ends, 0.0, 3.0) for d in robot.state]
    action = [_reach(robot, d) for d in robot.actions]
    low, high = zip(*action, strict=True)
    return describe_policy(
        robot,
        name=f"random {robot.name}",
        image={"size": 224},
        prompt={"template": prompt_template(_QUERIES), "length": 64 + len(robot.state)},
        state={"encoding": "both", "low": [low for low, _ in state], "high": [high for _, high in state]},
        action={"low": low, "high": high},
        provenance={"recipe": "random weights", "seed": seed, "commit": "none", "data_fingerprint": "none"},
    )


def _reach(robot: Robot, action: ActionDimension) -> tuple[float, float]:
    """What -1 and 1 mean. The motion goes at most 0.75 of the way and back, as half a sine over the whole chunk."""
    output = next(output for output in robot.outputs if output.name == action.output)
    duration_s = robot.action_period_s * robot.horizon
    if action.kind in ("pose", "pose_delta"):
        speed = output.max_linear_velocity if action.own_unit() == "m" else output.max_angular_velocity
        assert speed is not None and output.workspace is not None
        if action.kind == "pose_delta":
            return _around(0.0, 0.2 * speed * robot.action_period_s)
        if action.own_unit() == "m":
            return _around(float(np.mean(getattr(output.workspace, str(action.component)))), 0.1 * speed * duration_s)
        # Nearly no rotation; a quaternion has half the angle.
        return _around(1.0 if action.component in ("qw", "r1", "r5") else 0.0, 0.05 * speed * duration_s)
    assert action.max_velocity is not None
    if action.kind in ("joint_velocity", "twist"):
        return _around(0.0, 0.2 * action.max_velocity)
    way, (low, high) = 0.2 * action.max_velocity * duration_s, action.span
    if action.relative or not np.isfinite(high - low):
        return _around(0.0, way)
    return _around((low + high) / 2.0, min(way, (high - low) / 2.0))


def _around(middle: float, way: float) -> tuple[float, float]:
    return middle - way, middle + way


def _span(limits: tuple[float, float] | None, middle: float, way: float) -> tuple[float, float]:
    return _around(middle, way) if limits is None else (min(limits), max(limits))


def write_tiny_bundle(
    folder: Path, policy: PolicySpec, seed: int = 0, text: str = "", tokenizer: Tokenizer | None = None
) -> Bundle:
    """Make `folder` a valid bundle, with random weights drawn from `seed`, that knows the words of `text`.

    Or those that a `tokenizer` knows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:  # the robot writes instructions small
        vocabulary = make_vocabulary(VocabularyConfig(queries=_QUERIES), [text, text.lower()], 8)
        tokenizer = prompt_tokenizer(vocabulary)
    prefix = len(policy.cameras) * _GRID**2 + policy.prompt.length
    graph = GraphSpec(
        layers=_LAYERS,
        kv_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        image_tokens=_GRID**2,
        prefix_length=prefix,
        action_dim=policy.action_width,
        state_dim=policy.state_width if policy.state.as_token else None,
        modulation=1,
        prefill_flops=prefix * _LAYERS * _KV_HEADS * 4 * _HEAD_DIM**2,
        step_flops=prefix * _LAYERS * _KV_HEADS * 4 * _HEAD_DIM,
        vocab_size=tokenizer.get_vocab_size(),
    )
    rng = np.random.default_rng(seed)
    onnx.save(prefill_graph(policy, graph, rng), str(folder / "prefill.onnx"))
    onnx.save(expert_graph(policy, graph, rng), str(folder / "expert.onnx"))
    # The modulation is the time itself: a wave so long that its sine is a straight line.
    np.savez(folder / TIME, periods=[_PERIOD], weight0=[[_PERIOD / (2.0 * np.pi), 0.0]], bias0=[0.0])
    return write_bundle(folder, policy, graph, tokenizer, f"# {policy.name}\n\n{_CARD}")


def prefill_graph(policy: PolicySpec, graph: GraphSpec, rng: np.random.Generator) -> onnx.ModelProto:
    cameras, size, cell = len(policy.cameras), policy.image.size, policy.image.size // _GRID
    layers, heads, dim = graph.layers, graph.kv_heads, graph.head_dim
    weights = {
        "table": rng.standard_normal((graph.vocab_size, dim)),
        "w_image": rng.standard_normal((3, dim)),
        "w_keys": rng.standard_normal((layers, heads, dim, dim)),
        "w_values": rng.standard_normal((layers, heads, dim, dim)),
    }
    integers = {
        "cells_shape": [cameras, 3, _GRID, cell, _GRID, cell],
        "cell_axes": [3, 5],
        "image_tokens_shape": [cameras * graph.image_tokens, 3],
        "per_camera": [cameras, graph.image_tokens],
        "flat": [-1],
        "last": [1],
    }
    nodes = [
        helper.make_node("Reshape", ["images", "cells_shape"], ["cells"]),
        helper.make_node("ReduceMean", ["cells", "cell_axes"], ["means"], keepdims=0),
        helper.make_node("Transpose", ["means"], ["means_last"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["means_last", "image_tokens_shape"], ["pixels"]),
        helper.make_node("MatMul", ["pixels", "w_image"], ["image_embed"]),
        helper.make_node("Gather", ["table", "tokens"], ["text_embed"]),
        helper.make_node("Concat", ["image_embed", "text_embed"], ["embed"], axis=0),
        helper.make_node("MatMul", ["embed", "w_keys"], ["keys"]),
        helper.make_node("MatMul", ["embed", "w_values"], ["values"]),
        helper.make_node("Unsqueeze", ["image_mask", "last"], ["image_mask_column"]),
        helper.make_node("Expand", ["image_mask_column", "per_camera"], ["image_mask_wide"]),
        helper.make_node("Reshape", ["image_mask_wide", "flat"], ["image_token_mask"]),
        helper.make_node("Concat", ["image_token_mask", "token_mask"], ["prefix_mask"], axis=0),
    ]
    kv, prefix = [layers, heads, graph.prefix_length, dim], [graph.prefix_length]
    inputs = [
        ("images", TensorProto.FLOAT, [cameras, 3, size, size]),
        ("image_mask", TensorProto.BOOL, [cameras]),
        ("tokens", TensorProto.INT64, [policy.prompt.length]),
        ("token_mask", TensorProto.BOOL, [policy.prompt.length]),
    ]
    outputs = [
        ("keys", TensorProto.FLOAT, kv),
        ("values", TensorProto.FLOAT, kv),
        ("prefix_mask", TensorProto.BOOL, prefix),
    ]
    return _model("prefill", nodes, inputs, outputs, weights, integers)


def expert_graph(policy: PolicySpec, graph: GraphSpec, rng: np.random.Generator) -> onnx.ModelProto:
    """An expert with velocity = (x_t - target) / time, where the target depends on the prefix.

    Any number of Euler steps ends on the target. `modulation` is the time.
    """
    horizon, action_dim, dim, state_dim = policy.horizon, graph.action_dim, graph.head_dim, graph.state_dim
    phase = np.linspace(1.0 / horizon, 1.0, horizon)[:, np.newaxis]
    motion = 0.5 * np.sin(np.pi * phase) * rng.uniform(0.5, 1.0, (1, action_dim))
    motion[:, -1] = 0.0  # the gripper stays where it is
    drive = "zero" if state_dim is None else "state"
    weights = {
        "query": rng.standard_normal((graph.layers, graph.kv_heads, 1, dim)) / dim**0.5,
        "w_out": rng.standard_normal((dim, action_dim)),
        "motion": motion,
        "hidden": np.array(-1e9),
        "zero": np.array(0.0),
        "one": np.array(1.0),
        "half": np.array(0.5),
        "time_floor": np.array(1e-3),
    }
    mixing = []
    if state_dim not in (None, action_dim):
        drive, weights["w_state"] = "mixed_state", rng.standard_normal((state_dim, action_dim)) / state_dim**0.5
        mixing = [helper.make_node("MatMul", ["state", "w_state"], ["mixed_state"])]
    nodes = [
        *mixing,
        helper.make_node("Transpose", ["keys"], ["keys_t"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["query", "keys_t"], ["scores"]),
        helper.make_node("Where", ["prefix_mask", "zero", "hidden"], ["bias"]),
        helper.make_node("Add", ["scores", "bias"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["attention"], axis=-1),
        helper.make_node("MatMul", ["attention", "values"], ["read"]),
        helper.make_node("ReduceMean", ["read", "outer_axes"], ["context"], keepdims=0),
        helper.make_node("MatMul", ["context", "w_out"], ["drive"]),
        helper.make_node("Add", ["drive", drive], ["drive_state"]),
        helper.make_node("Tanh", ["drive_state"], ["bounded"]),
        helper.make_node("Mul", ["bounded", "half"], ["halved"]),
        helper.make_node("Add", ["halved", "one"], ["gain"]),
        helper.make_node("Mul", ["motion", "gain"], ["target"]),
        helper.make_node("Sub", ["x_t", "target"], ["distance"]),
        helper.make_node("Where", ["clean", "zero", "modulation"], ["time"]),
        helper.make_node("Max", ["time", "time_floor"], ["time_safe"]),
        helper.make_node("Unsqueeze", ["time_safe", "last"], ["time_column"]),
        helper.make_node("Div", ["distance", "time_column"], ["velocity"]),
        helper.make_node("Mul", ["velocity", "step"], ["way"]),
        helper.make_node("Sub", ["x_t", "way"], ["moved"]),
        helper.make_node("Unsqueeze", ["clean", "last"], ["clean_column"]),
        helper.make_node("Where", ["clean_column", "x_t", "moved"], ["x_next"]),
    ]
    kv = [graph.layers, graph.kv_heads, graph.prefix_length, dim]
    inputs = [
        ("keys", TensorProto.FLOAT, kv),
        ("values", TensorProto.FLOAT, kv),
        ("prefix_mask", TensorProto.BOOL, [graph.prefix_length]),
        *([("state", TensorProto.FLOAT, [state_dim])] if state_dim is not None else []),
        ("x_t", TensorProto.FLOAT, [horizon, action_dim]),
        ("modulation", TensorProto.FLOAT, [1]),
        ("clean", TensorProto.BOOL, [horizon]),
        ("step", TensorProto.FLOAT, [1]),
    ]
    outputs = [(name, TensorProto.FLOAT, [horizon, action_dim]) for name in ("velocity", "x_next")]
    return _model("expert", nodes, inputs, outputs, weights, {"outer_axes": [0, 1, 2], "last": [1]})


def _model(
    name: str,
    nodes: list[onnx.NodeProto],
    inputs: Sequence[tuple[str, int, list[int]]],
    outputs: Sequence[tuple[str, int, list[int]]],
    weights: dict[str, NDArray[Any]],
    integers: dict[str, list[int]],
) -> onnx.ModelProto:
    constants = [numpy_helper.from_array(np.asarray(w, dtype=np.float32), key) for key, w in weights.items()]
    constants += [numpy_helper.from_array(np.array(values, dtype=np.int64), key) for key, values in integers.items()]
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(*entry) for entry in inputs],
        [helper.make_tensor_value_info(*entry) for entry in outputs],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.export.tiny", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the bundle")
    parser.add_argument(
        "--robot", help="a robot file, or the name of one in config/robots/; default: that of models/bench"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--text", default="", help="instructions whose words the policy is to know")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json of another bundle, whose words it is to know")
    return run_command("tiny", partial(_write, parser.parse_args(arguments)))


def _write(chosen: argparse.Namespace) -> int:
    if chosen.seed < 0:
        raise ConfigurationError(f"--seed: expected at least 0, got {chosen.seed}")
    robot = None if chosen.robot is None else read_robot(find_robot(chosen.robot))
    policy = bench_policy() if robot is None else robot_policy(robot, chosen.seed)
    tokenizer = None
    if chosen.tokenizer is not None:
        try:
            tokenizer = load_tokenizer(chosen.tokenizer)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{chosen.tokenizer}: expected a bundle's tokenizer, got none ({error})") from None
    write_tiny_bundle(chosen.out, policy, chosen.seed, chosen.text, tokenizer)
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
