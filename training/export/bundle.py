"""From a checkpoint to a bundle, checked against torch.

A checkpoint folder holds the weights and sizes (`training.weights.checkpoints`), `policy.json` (a `PolicySpec`) and
`tokenizer.json`. The prefix up to its last keys and values is exported, and one expert step; of the token table, only
the rows that a prompt can hold. So the robot cannot decode answer, location or action tokens.

graphs.py has the two graphs as modules, formats.py turns them into files.
"""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from ki_vla_ros.bundle import (
    EXPERT,
    MANIFEST,
    PREFILL,
    PROGRAMS,
    TIME,
    TOKENIZER,
    Bundle,
    PolicySpec,
    load_tokenizer,
    read_header,
    read_program,
    write_bundle,
)
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.engines.torch_engine import TorchEngine
from ki_vla_ros.errors import ConfigurationError
from training.export.card import model_card
from training.export.formats import quantize_graphs, write_graphs, write_programs
from training.export.graphs import (
    arrange,
    cast_weights,
    describe_graphs,
    modulation_size,
    put_first,
    sample_inputs,
    time_file,
    time_layers,
)
from training.export.parity import lowest_cosine, parity_error
from training.model import VLA
from training.storage import whole_folder
from training.tokens import prompt_ids, prompt_tokenizer
from training.weights import POLICY, load_checkpoint, read_config, read_policy

TOLERANCE = 1e-4
COSINE = 0.999  # least, between the chunks of a bfloat16 or int8 bundle and the float32 model's
CONSTANTS = 4096  # most numbers that a graph may have beside its weights: shapes, frequencies and the like
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}
"""Of the weights before any are quantized."""


class ExportError(RuntimeError):
    """The exported graphs do not match the model: they differ from torch, or hold what must stay behind."""


def export_bundle(
    checkpoint: Path,
    out: Path,
    notes: str = "",
    with_torch: bool = False,
    dtype: str = "float32",
    compare: bool = True,
) -> Bundle:
    """Write the bundle `out` and return it loaded; an earlier bundle there is replaced once the new one is whole.

    `with_torch` adds the programs for the torch engine. A float32 bundle is run and compared with the model. bfloat16
    graphs have no kernels in onnxruntime's CPU provider, so only ONNX's own checker sees them; their programs are run
    and compared with the model in float32, which then has to fit into memory. int8 graphs are for onnxruntime on a CPU,
    where they are run and compared. Without `compare`, for those who do it on their own engine, none is.
    """
    if with_torch and dtype == "int8":
        raise ConfigurationError("--dtype int8: expected a bundle without --torch, whose programs stay float32")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file())):
        raise ConfigurationError(
            f"{out}: expected an empty place or an earlier bundle, got "
            f"{'a folder of something else' if out.is_dir() else 'a file'}; name another folder"
        )
    began_s = time.monotonic()
    policy = read_policy(checkpoint / POLICY)
    check_exportable(checkpoint, policy)
    try:
        full_tokenizer = load_tokenizer(checkpoint / TOKENIZER)
    except (OSError, ValueError) as fault:
        raise ConfigurationError(f"{checkpoint / TOKENIZER}: expected a tokenizers file, got none ({fault})") from fault
    model = cast_weights(load_checkpoint(checkpoint, dtype=None).eval().requires_grad_(False), DTYPES[dtype])
    check_policy(policy, model, full_tokenizer)
    rows = prompt_ids(full_tokenizer)
    put_first(model, rows)
    prompt_rows = len(rows)
    tokenizer = prompt_tokenizer(full_tokenizer)
    with whole_folder(out) as folder:
        graphs = list(zip(arrange(model, prompt_rows), sample_inputs(model, policy), strict=True))
        write_graphs(graphs, folder)
        if with_torch:
            write_programs(graphs, folder)
        del graphs
        (folder / TIME).write_bytes(time_file(model.expert))
        check_left_behind(model, prompt_rows, folder)
        if dtype == "int8":
            quantize_graphs(folder)
        graph = describe_graphs(model, policy, prompt_rows)
        bundle = write_bundle(folder, policy, graph, tokenizer, model_card(policy, tokenizer, notes, dtype))
        compared = "not compared with torch (bfloat16 does not run on a CPU's onnxruntime; --torch compares)"
        if not compare:
            compared = "not compared with torch"
        elif dtype == "float32":
            errors = [parity_error(model, bundle)]
            if with_torch:
                errors.append(parity_error(model, bundle, engine=TorchEngine(bundle)))
            for error in errors:
                if not error <= TOLERANCE:
                    raise ExportError(f"parity: expected the graphs within {TOLERANCE:g} of torch, got {error:.3g}")
            compared = f"within {max(errors):.1e} of torch"
        elif with_torch or dtype == "int8":
            del model  # to make room in memory for the one in float32
            cosine = lowest_cosine(checkpoint, bundle, rows, TorchEngine if with_torch else OnnxEngine)
            if not cosine >= COSINE:
                raise ExportError(f"parity: expected a cosine of {COSINE:g} to float32 or more, got {cosine:.6f}")
            compared = f"cosine {cosine:.6f} to torch in float32"
    megabytes = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{out}: {megabytes:.1f} MB, {compared}; {time.monotonic() - began_s:.0f} s, peak memory {peak_gb:.1f} GiB")
    return Bundle(out.resolve(), bundle.manifest, bundle.tokenizer)


def check_exportable(checkpoint: Path, policy: PolicySpec) -> None:
    """ConfigurationError unless the policy acts by the flow of an expert: the two graphs are those."""
    acts = "tokens or a regression (flow: null)" if policy.flow is None else None
    acts = "the backbone's own layers (actions: backbone)" if read_config(checkpoint).actions != "expert" else acts
    if acts is not None:
        raise ConfigurationError(
            f"checkpoint {checkpoint}: expected a policy that acts by the flow of an action expert, got one that acts "
            f"by {acts}, which no robot runs; train a recipe with an expert, such as ki (docs/training.md)"
        )


def check_policy(policy: PolicySpec, model: VLA, tokenizer: Tokenizer) -> None:
    """ConfigurationError unless the policy's description, the tokenizer and the model's sizes belong together."""
    config = model.config
    state_dim = policy.state_width if policy.state.as_token else None
    for what, expected, got in (
        ("image.size", config.vision.image_size, policy.image.size),
        ("horizon", config.horizon, policy.horizon),
        ("actions (or pad_to)", config.action_dim, policy.action_width),
        ("width of the state token", config.state_dim, state_dim),
        ("tokens in tokenizer.json", config.vocab_size, tokenizer.get_vocab_size()),
    ):
        if expected != got:
            raise ConfigurationError(f"{POLICY}: {what}: expected {expected}, as the checkpoint has it, got {got}")


def check_left_behind(model: VLA, prompt_rows: int, folder: Path) -> None:
    """ExportError if a graph has more weights than prefix or expert step: it would hold a head, or rows of answers."""

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
