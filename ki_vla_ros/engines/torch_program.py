"""A program (bundle/pt2.py) with its weights on a device: run operation by operation, or compiled by torch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ki_vla_ros.bundle import AnyDevice, Constant, Operation, Program, TensorName
from ki_vla_ros.errors import BundleError, EngineError

ProgramCall = Callable[[Mapping[str, Tensor]], list[Tensor]]
"""Takes at least the program's inputs, by name; returns its outputs in order."""


class Interpreter:
    """Runs the operations one by one, as the file lists them: the only way with a backward pass."""

    def __init__(self, program: Program, device: torch.device) -> None:
        self.program, self.device = program, device
        self.weights = {name: _weight(program, name).to(device) for name in program.weights}
        self._steps = [(_resolve(operation), operation) for operation in program.operations]
        # A tensor is dropped after its last use: otherwise the prefill of a large model would keep those of all layers.
        last = {name: k for k, operation in enumerate(program.operations) for name in operation.names()}
        kept = {*program.outputs, *program.inputs, *program.weights}
        self._done = [
            [name for name in operation.names() if last[name] == k and name not in kept]
            for k, operation in enumerate(program.operations)
        ]

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        tensors = {**self.weights, **{name: inputs[name] for name in self.program.inputs}}
        for (function, operation), done in zip(self._steps, self._done, strict=True):
            arguments, options = self.fill(operation, tensors)
            result = function(*arguments, **options)
            if isinstance(operation.outputs, TensorName):
                tensors[operation.outputs] = result
            else:
                tensors.update(zip(operation.outputs, result, strict=True))
            for name in done:
                tensors.pop(name, None)
        return [tensors[name] for name in self.program.outputs]

    def fill(self, operation: Operation, tensors: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments and options of the operation, with names replaced by what `tensors` has for them."""
        arguments = [self._value(tensors, value) for value in operation.arguments]
        return arguments, {name: self._value(tensors, value) for name, value in operation.options.items()}

    def _value(self, tensors: Mapping[str, Any], value: Any) -> Any:
        match value:
            case TensorName():
                return tensors[value]
            case Constant():
                return getattr(torch, value)
            case AnyDevice():
                return self.device
            case list():
                return [self._value(tensors, part) for part in value]
        return value


def graph_module(interpreter: Interpreter) -> fx.GraphModule:
    """The same operations for torch.fx, which turns them into Python source.

    So no text of the file may become a name there: inputs, weights and results are numbered, and an option must be one
    that the operator has. Numbers and text become literals in the source.
    """
    program, graph = interpreter.program, fx.Graph()
    root, values = torch.nn.Module(), dict[str, fx.Node]()
    for k, name in enumerate(program.inputs):
        values[name] = graph.placeholder(f"input{k}")
    for k, (name, weight) in enumerate(interpreter.weights.items()):
        root.register_buffer(f"weight{k}", weight)
        values[name] = graph.get_attr(f"weight{k}")
    for operation in program.operations:
        function = _resolve(operation)
        known = {argument.name for argument in function._schema.arguments}
        if unknown := sorted({*operation.options} - known):
            raise BundleError(
                f"{program.path}: {operation.operator}: expected options of {sorted(known)}, got {unknown[0]!r}; "
                "export again with --torch"
            )
        arguments, options = interpreter.fill(operation, values)
        result = graph.call_function(function, tuple(arguments), options)
        if isinstance(operation.outputs, TensorName):
            values[operation.outputs] = result
        else:
            for k, name in enumerate(operation.outputs):
                values[name] = graph.call_function(operator.getitem, (result, k))
    graph.output(tuple(values[name] for name in program.outputs))
    return fx.GraphModule(root, graph)


def compile_program(interpreter: Interpreter, backend: str = "inductor") -> ProgramCall:
    """Through torch.compile, as one graph for the bundle's fixed shapes.

    The first run compiles (seconds to minutes). EngineError, now or then, if torch cannot compile on this machine.
    """
    from torch._dynamo import config  # seconds of imports, only for this mode
    from torch._dynamo.exc import TorchDynamoException

    if config.disable:  # torch.compile would silently return the module as it is
        raise EngineError(
            "torch_mode: expected torch.compile, got a process in which it is switched off; unset "
            "TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE, or set torch_mode to eager"
        )
    names, path = [*interpreter.program.inputs], interpreter.program.path
    module = graph_module(interpreter)
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend=backend)
    tool, other = "a C++ compiler (g++, or what CXX says)", "eager"
    if interpreter.device.type == "cuda":
        tool, other = "triton and a C compiler (gcc)", "graph"

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        try:
            return list(compiled(*(inputs[name] for name in names)))
        except TorchDynamoException as error:
            reason = " ".join(str(error).partition("\n\n")[0].split())  # hints for torch's developers follow
            raise EngineError(
                f"{path}: torch {torch.__version__} could not compile it ({reason}); torch_mode compile needs {tool}: "
                f"install what is missing, or set torch_mode to {other}"
            ) from error

    return run


def _weight(program: Program, name: str) -> Tensor:
    weight = torch.from_numpy(program.read_weight(name))
    return weight.view(torch.bfloat16) if program.weights[name].dtype == "bfloat16" else weight


def _resolve(operation: Operation) -> Any:
    name, overload = operation.operator.split(".")  # one of pt2.OPERATORS
    return getattr(getattr(torch.ops.aten, name), overload)
