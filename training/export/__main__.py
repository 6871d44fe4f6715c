"""From a checkpoint to a bundle: two ONNX graphs, the manifest, tokenizer and model card, checked against torch.

    python -m training.export --checkpoint out/training/demo/policy --out models/demo

With `--torch` the bundle also holds both graphs as programs for the torch engine; `--dtype bfloat16` is for GPUs, and
`int8` for onnxruntime on a CPU: more than twice as fast, with an error (docs/results/peers.md).
Exit codes: 0 fine, 1 the exported graphs do not match the model, 2 could not run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ki_vla_ros.bundle import TOKENIZER
from ki_vla_ros.console import ExitCode, run_command
from training.export.bundle import DTYPES, ExportError, export_bundle
from training.weights import POLICY


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.export", description="Make a bundle from a checkpoint.")
    parser.add_argument("--checkpoint", type=Path, required=True, help=f"folder with weights, {POLICY} and {TOKENIZER}")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the bundle; an earlier bundle there is replaced"
    )
    parser.add_argument("--notes", type=Path, help="Markdown file for the model card: what the model can and cannot do")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the large weights; bfloat16: of keys and values as well"
    )
    parser.add_argument("--torch", action="store_true", help="also write both graphs for the torch engine")
    return run_command("export", partial(_export, parser.parse_args(arguments)))


def _export(chosen: argparse.Namespace) -> int:
    notes = "" if chosen.notes is None else chosen.notes.read_text(encoding="utf-8")
    try:
        export_bundle(chosen.checkpoint, chosen.out, notes, chosen.torch, chosen.dtype)
    except ExportError as error:
        print(f"export: {error}", file=sys.stderr)
        return ExitCode.FOUND
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
