"""How a graph becomes a file: as ONNX, and as a torch.export program."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

from ki_vla_ros.bundle import EXPERT, PREFILL, PROGRAMS
from training.export.graphs import GraphInputs

OPSET = 20
EMBEDDED_BYTES = 64 << 20  # if the weights are larger, they go to a file beside the graph; ONNX ends at 2 GiB
EXACT = ("model.action_in.", "model.action_out.", "model.state_in.")  # small, and all that the flow says passes them
OUTPUTS = ("keys", "values", "prefix_mask"), ("velocity", "x_next")

Graphs = Sequence[tuple[nn.Module, GraphInputs]]


def write_graphs(graphs: Graphs, folder: Path) -> None:
    """Write both graphs as ONNX."""
    for (graph, inputs), name, outputs in zip(graphs, (PREFILL, EXPERT), OUTPUTS, strict=True):
        save_onnx(graph, inputs, outputs, folder / name)


def write_programs(graphs: Graphs, folder: Path) -> None:
    """Write both graphs as torch.export programs."""
    for (graph, inputs), name in zip(graphs, (PREFILL, EXPERT), strict=True):
        save_program(graph, inputs, folder / PROGRAMS[name])


def save_onnx(graph: nn.Module, inputs: GraphInputs, outputs: Sequence[str], path: Path) -> None:
    """Write one graph, without the trainer's file names and stack traces; large weights go to a file beside it."""
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # no torchvision is needed
    with torch_deprecations_ignored():
        program = torch.onnx.export(
            graph,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=outputs,
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    write_onnx(program.model, path)


def write_onnx(model: onnx_ir.Model, path: Path) -> None:
    strip_remarks(model)
    size = sum(weight.const_value.nbytes for weight in model.graph.initializers.values() if weight.const_value)
    beside = f"{path.stem}.weights" if size > EMBEDDED_BYTES else None
    onnx_ir.save(model, path, external_data=beside)
    onnx.checker.check_model(str(path), full_check=True)


def quantize_graphs(folder: Path) -> None:
    """Let both graphs of `folder` multiply matrices of weights in integers, with scales of each run's activations.

    Weights have 7 of 8 bits: with all 8, sums overflow in processors that have AVX2 and no VNNI. Operators are ONNX's
    own. Attention, norms, keys and values, and the way into and out of the flow stay float32.
    """
    for name in (PREFILL, EXPERT):
        path = folder / name
        with tempfile.TemporaryDirectory(dir=folder) as place:
            quantized = Path(place) / name
            quantize_dynamic(
                path,
                quantized,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
                nodes_to_exclude=exact_products(onnx_ir.load(path)),
                extra_options={"MatMulConstBOnly": True},
            )
            path.with_suffix(".weights").unlink(missing_ok=True)
            write_onnx(onnx_ir.external_data.load_to_model(onnx_ir.load(quantized)), path)


def exact_products(model: onnx_ir.Model) -> list[str]:
    """Names of the products to which a bias of EXACT is added; those of weights are lost when they are transposed."""

    def biased(node: onnx_ir.Node) -> bool:
        return any(value is not None and (value.name or "").startswith(EXACT) for value in node.inputs)

    return [
        node.name or ""
        for node in model.graph
        if node.op_type in ("MatMul", "Gemm") and any(map(biased, (node, *node.outputs[0].consumers())))
    ]


@contextmanager
def torch_deprecations_ignored() -> Iterator[None]:
    """Ignore one warning: torch's exporter uses a class that torch has deprecated, and here warnings are errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`isinstance\\(treespec", category=FutureWarning)
        yield


def save_program(graph: nn.Module, inputs: GraphInputs, path: Path) -> None:
    """Write one graph with the weights it reads, and nothing else of the model or of the trainer's machine."""
    with torch_deprecations_ignored():
        program = torch.export.export(graph.eval(), tuple(inputs.values()))
        names = program.graph_signature.inputs_to_parameters
        unread = []
        for node in list(program.graph.nodes):
            # These assert the device that each tensor was traced on, and would fail on any other.
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                program.graph.erase_node(node)
        for node in list(program.graph.nodes):
            node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}  # no stack trace, no names of files
            if node.name in names and not node.users:
                unread.append(node.name)
                program.graph.erase_node(node)
                del program.state_dict[names[node.name]]
        specs = program.graph_signature.input_specs
        specs[:] = [spec for spec in specs if spec.arg.name not in unread]
        del program.module_call_graph[1:]  # the names of all submodules
        program.example_inputs = None  # torch would pickle them
        torch.export.save(program, path)


def strip_remarks(model: onnx_ir.Model) -> None:
    """Remove the stack trace that torch leaves at every node: useless on a robot, and it names the trainer's files."""
    graph = model.graph
    values = [value for node in graph.all_nodes() for value in node.outputs]
    parts: list[Any] = [model, graph, *graph.all_nodes(), *values, *graph.inputs, *graph.initializers.values()]
    for part in parts:
        part.metadata_props.clear()
        part.doc_string = None
