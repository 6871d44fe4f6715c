"""From a checkpoint to a bundle: two ONNX graphs, the manifest, tokenizer and model card, checked against torch.

    python -m training.export --checkpoint out/training/demo/policy --out models/demo

With `--torch` the bundle holds both graphs once more, for the torch engine; `--dtype bfloat16` is for GPUs.

A checkpoint folder holds the weights and sizes (`training.weights.checkpoints`), `policy.json` (a `PolicySpec`) and
`tokenizer.json`. Exported are the prefix up to its last keys and values, and one expert step; of the token table only
the rows that a prompt can hold. So no answer, place or action token can be decoded on the robot.

The two graphs as modules are in graphs.py.
"""

from __future__ import annotations

import argparse
import math
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn

from ki_vla_ros.bundle.folder import EXPERT, MANIFEST, PREFILL, PROGRAMS, TIME, TOKENIZER, Bundle, write_bundle
from ki_vla_ros.bundle.manifest import PolicySpec, describe_validation
from ki_vla_ros.bundle.onnx_header import read_header
from ki_vla_ros.bundle.pt2 import read_program
from ki_vla_ros.engines.torch_engine import TorchEngine
from ki_vla_ros.errors import ConfigurationError, KiVlaError
from training.export.graphs import (
    Inputs,
    arrange,
    cast_weights,
    describe_graphs,
    modulation_size,
    sample_inputs,
    time_file,
    time_layers,
)
from training.export.parity import lowest_cosine, parity_error
from training.model.vla import VLA
from training.tokens.words import prompt_tokenizer, prompt_vocab_size
from training.weights.checkpoints import load_checkpoint

POLICY = "policy.json"
OPSET = 20
TOLERANCE = 1e-4
COSINE = 0.999  # of a bfloat16 bundle's chunks and the float32 model's
CONSTANTS = 4096  # shapes, frequencies and the like in a graph, as numbers
EMBEDDED_BYTES = 64 << 20  # larger weights lie in a file beside the graph; ONNX files themselves end at 2 GiB
OUTPUTS = ("keys", "values", "prefix_mask"), ("velocity", "x_next")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Graphs = Sequence[tuple[nn.Module, Inputs]]

STATE_WAYS = {
    "text": "text in the prompt",
    "token": "a token of the expert",
    "both": "text in the prompt and as a token of the expert",
}


class ExportError(RuntimeError):
    """The exported graphs are not the model: they differ from torch, or hold what must stay behind."""


def export_bundle(
    checkpoint: Path, out: Path, notes: str = "", with_torch: bool = False, dtype: str = "float32"
) -> Bundle:
    """Write the bundle `out` and return it loaded; an earlier bundle there is replaced once the new one is whole.

    `with_torch`: with the programs for the torch engine. A float32 bundle is run and compared with the model. bfloat16
    graphs have no kernels in onnxruntime's CPU provider, so ONNX's own checker alone sees those; the programs are run
    and compared with the model in float32, which then has to fit into memory.
    """
    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise ConfigurationError(f"{out}: expected an empty place or an earlier bundle, got a folder of something else")
    began_s = time.monotonic()
    policy = read_policy(checkpoint / POLICY)
    full_tokenizer = Tokenizer.from_file(str(checkpoint / TOKENIZER))
    model = cast_weights(load_checkpoint(checkpoint, dtype=None).eval().requires_grad_(False), DTYPES[dtype])
    check_policy(policy, model, full_tokenizer)
    prompt_rows = prompt_vocab_size(full_tokenizer)
    tokenizer = prompt_tokenizer(full_tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch).resolve() / out.name
        folder.mkdir()
        graphs = list(zip(arrange(model, prompt_rows), sample_inputs(model, policy), strict=True))
        write_graphs(graphs, folder)
        if with_torch:
            write_programs(graphs, folder)
        del graphs
        (folder / TIME).write_bytes(time_file(model.expert))
        check_left_behind(model, prompt_rows, folder)
        graph = describe_graphs(model, policy, prompt_rows)
        bundle = write_bundle(folder, policy, graph, tokenizer, model_card(policy, tokenizer, notes))
        compared = "not compared with torch (bfloat16 does not run on a CPU's onnxruntime; --torch compares)"
        if dtype == "float32":
            errors = [parity_error(model, bundle)]
            if with_torch:
                errors.append(parity_error(model, bundle, engine=TorchEngine(bundle)))
            for error in errors:
                if not error <= TOLERANCE:
                    raise ExportError(f"parity: expected the graphs within {TOLERANCE:g} of torch, got {error:.3g}")
            compared = f"within {max(errors):.1e} of torch"
        elif with_torch:
            del model  # the one in float32 needs its place
            cosine = lowest_cosine(checkpoint, bundle)
            if not cosine >= COSINE:
                raise ExportError(f"parity: expected a cosine of {COSINE:g} to float32 or more, got {cosine:.6f}")
            compared = f"cosine {cosine:.6f} to torch in float32"
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    megabytes = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{out}: {megabytes:.1f} MB, {compared}; {time.monotonic() - began_s:.0f} s, peak memory {peak_gb:.1f} GiB")
    return Bundle(out.resolve(), bundle.manifest, bundle.tokenizer)


def read_policy(path: Path) -> PolicySpec:
    """What training wrote beside the weights."""
    try:
        return PolicySpec.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path}: expected the policy's description beside the weights, got none") from error
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {describe_validation(error)}") from error


def check_policy(policy: PolicySpec, model: VLA, tokenizer: Tokenizer) -> None:
    """The policy's description, the tokenizer and the model's sizes must be of one thing."""
    config = model.config
    state_dim = policy.width if policy.state.as_token else None
    for what, expected, got in (
        ("image.size", config.vision.image_size, policy.image.size),
        ("horizon", config.horizon, policy.horizon),
        ("joints (or pad_to)", config.action_dim, policy.width),
        ("width of the state token", config.state_dim, state_dim),
        ("tokens in tokenizer.json", config.vocab_size, tokenizer.get_vocab_size()),
    ):
        if expected != got:
            raise ConfigurationError(f"{POLICY}: {what}: expected {expected}, as the checkpoint has it, got {got}")


def write_graphs(graphs: Graphs, folder: Path) -> None:
    """Both graphs as ONNX."""
    for (graph, inputs), name, outputs in zip(graphs, (PREFILL, EXPERT), OUTPUTS, strict=True):
        trace(graph, inputs, outputs, folder / name)


def write_programs(graphs: Graphs, folder: Path) -> None:
    """Both graphs as torch.export programs."""
    for (graph, inputs), name in zip(graphs, (PREFILL, EXPERT), strict=True):
        save_program(graph, inputs, folder / PROGRAMS[name])


def trace(graph: nn.Module, inputs: Inputs, outputs: Sequence[str], path: Path) -> None:
    """One graph to one file, without the trainer's file names and stack traces; large weights lie beside it."""
    with own_deprecations_unheard():
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
    strip_remarks(program.model)
    size = sum(weight.const_value.nbytes for weight in program.model.graph.initializers.values() if weight.const_value)
    beside = f"{path.stem}.weights" if size > EMBEDDED_BYTES else None
    onnx_ir.save(program.model, path, external_data=beside)
    onnx.checker.check_model(str(path), full_check=True)


@contextmanager
def own_deprecations_unheard() -> Iterator[None]:
    """torch's exporter uses a class that torch itself calls deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`isinstance\\(treespec", category=FutureWarning)
        yield


def save_program(graph: nn.Module, inputs: Inputs, path: Path) -> None:
    """One graph to one file: what it reads, and nothing of the rest of the model or of the trainer's machine."""
    with own_deprecations_unheard():
        program = torch.export.export(graph.eval(), tuple(inputs.values()))
        names = program.graph_signature.inputs_to_parameters
        unread = []
        for node in list(program.graph.nodes):
            # The device of each tensor as traced: on another one these assertions would fail.
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
    """torch notes a stack trace at every node: useless on a robot, and it names the trainer's files."""
    graph = model.graph
    values = [value for node in graph.all_nodes() for value in node.outputs]
    for part in (model, graph, *graph.all_nodes(), *values, *graph.inputs, *graph.initializers.values()):
        part.metadata_props.clear()
        part.doc_string = None


def check_left_behind(model: VLA, prompt_rows: int, folder: Path) -> None:
    """Refuse graphs with more weights than prefix and expert step have: they would hold a head or rows of answers."""

    def size(*parts: nn.Module | None) -> int:
        return sum(parameter.numel() for part in parts if part is not None for parameter in part.parameters())

    last = model.backbone.layers[-1]
    prefix = size(model.vision, model.projector, *model.backbone.layers)
    prefix -= size(last.attention.q, last.attention.out, last.norm2, last.mlp)
    prefix += prompt_rows * model.config.backbone.width
    step = size(model.expert, model.action_in, model.action_out, model.state_in) + modulation_size(model)
    step -= sum(weight.numel() + bias.numel() for weight, bias in time_layers(model.expert))
    for name, expected in ((PREFILL, prefix), (EXPERT, step)):
        found = {name: [*read_header(folder / name).weights.values()]}
        program = folder / PROGRAMS[name]
        if program.exists():
            found[program.name] = [weight.shape for weight in read_program(program).weights.values()]
        for file, shapes in found.items():
            got = sum(math.prod(shape) for shape in shapes)
            if got > expected + CONSTANTS:
                raise ExportError(f"{file}: expected at most {expected} weights (and {CONSTANTS} constants), got {got}")


def model_card(policy: PolicySpec, tokenizer: Tokenizer, notes: str) -> str:
    """What the manifest says, for people; `notes` (Markdown) say what it cannot know: abilities, limits, training."""
    origin = policy.provenance
    lines = [
        f"# {policy.name}",
        "",
        notes.strip() or "No notes were given at export.",
        "",
        "## Inputs and outputs",
        "",
        f"- Cameras: {', '.join(c.name + (' (optional)' if c.optional else '') for c in policy.cameras)}; "
        f"padded to {policy.image.size} x {policy.image.size}.",
        f"- Joint state: as {STATE_WAYS[policy.state.encoding]}.",
        f"- Action chunk: {policy.horizon} positions, one every {policy.action_period_s:g} s.",
        f"- Flow steps it was judged with: {policy.flow.steps}.",
        f"- Chunk prefix seen in training: up to {policy.max_prefix_delay} actions.",
    ]
    if isinstance(tokenizer.model, WordLevel):
        words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and word.islower())
        lines.append(f"- Words it may be given (others are refused): {', '.join(words)}.")
    lines += ["", "| joint | unit | lower | upper | speed limit | action |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {joint.name} | {joint.unit} | {joint.lower:.4g} | {joint.upper:.4g} | {joint.max_velocity:g} "
        f"| {'relative' if joint.relative else 'absolute'} |"
        for joint in policy.joints
    ]
    lines += [
        "",
        "## Provenance",
        "",
        f"- Made: {policy.created}, recipe: {origin.recipe}, seed {origin.seed}, code {origin.commit}.",
    ]
    lines += [f"- Data fingerprint: {origin.data_fingerprint}."]
    if origin.figures:
        lines += [
            "",
            "| figure | value |",
            "|---|---|",
            *(f"| {name} | {value:.4g} |" for name, value in origin.figures.items()),
        ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.export", description="Make a bundle of a checkpoint.")
    parser.add_argument("--checkpoint", type=Path, required=True, help=f"folder with weights, {POLICY} and {TOKENIZER}")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the bundle; an earlier bundle there is replaced"
    )
    parser.add_argument("--notes", type=Path, help="Markdown file for the model card: what the model can and cannot do")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the large weights, keys and values")
    parser.add_argument("--torch", action="store_true", help="also write both graphs for the torch engine")
    chosen = parser.parse_args(arguments)
    try:
        notes = "" if chosen.notes is None else chosen.notes.read_text(encoding="utf-8")
        export_bundle(chosen.checkpoint, chosen.out, notes, chosen.torch, chosen.dtype)
    except (KiVlaError, ExportError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
