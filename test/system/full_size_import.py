"""Measures the import of a random full-size pi0.5, with openpi's names in shards of 2 GB: time and peak memory.

    PYTHONPATH=test python -m system.full_size_import FOLDER        # takes 14 GB there

Not a test: it runs for minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from support import ROOT
from support.sentencepieces import PLACES, SEGMENTS, train

from training.model.sizes import paligemma_3b
from training.weights.checkpoints import shapes
from training.weights.foreign import their_name

SHARD = 2e9
MEASURE = """
import re, sys
from pathlib import Path
from training.import_weights import main
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
code = main(sys.argv[1:])
print("peak above baseline:", peak() - before)
sys.exit(code)
"""


def write_weights(folder: Path) -> int:
    """Writes the checkpoint; returns its size in bytes."""
    folder.mkdir(parents=True)
    config = paligemma_3b("pi05")
    noise = (0.02 * torch.randn(2**24, generator=torch.Generator().manual_seed(0))).bfloat16()
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}

    def write() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name)
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes(config).items():
        numbers = torch.Size(shape).numel()
        shard[their_name(name, config)] = noise.repeat(-(-numbers // len(noise)))[:numbers].reshape(shape)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            write()
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return sum(file.stat().st_size for file in folder.iterdir())


def write_tokenizer(path: Path) -> None:
    """The tests' small tokenizer, padded to PaliGemma's 257,152 pieces."""
    model = train()
    del model.pieces[-PLACES - SEGMENTS :]
    kinds = type(model).SentencePiece
    for i in range(256_000 - len(model.pieces)):
        model.pieces.add(piece=f"\u2581w{i}", score=-1e5 - i, type=kinds.NORMAL)
    for name in [f"<loc{i:04d}>" for i in range(1024)] + [f"<seg{i:03d}>" for i in range(128)]:
        model.pieces.add(piece=name, score=0.0, type=kinds.USER_DEFINED)
    path.write_bytes(model.SerializeToString())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="is made; 14 GB are written to it")
    folder = parser.parse_args().folder
    size = write_weights(folder / "pi05")
    write_tokenizer(folder / "paligemma_tokenizer.model")
    both = {"q01": [-1.0] * 32, "q99": [1.0] * 32}
    (folder / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": both, "actions": both}}))
    options = {
        "--from": folder / "pi05",
        "--as": "pi05",
        "--tokenizer": folder / "paligemma_tokenizer.model",
        "--stats": folder / "norm_stats.json",
        "--robot": ROOT / "config" / "robots" / "imported_arm.yaml",
        "--out": folder / "checkpoint",
    }
    began_s = time.monotonic()
    arguments = [str(part) for pair in options.items() for part in pair]
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    found = re.search(r"baseline: (\d+)", output)
    assert found
    peak = int(found[1])
    print(output)
    print(f"{size / 1e9:.2f} GB in {time.monotonic() - began_s:.0f} s, peak {peak / 1e9:.2f} GB ({peak / size:.2f} x)")


if __name__ == "__main__":
    main()
