"""A recipe and sizes that train in seconds."""

from pathlib import Path
from typing import Any

from support.demo_data import write_demo_data

SIZES = {
    "vision": {"image_size": 96, "patch_size": 12, "width": 16, "depth": 1, "heads": 2, "mlp": 16, "stem": "conv"},
    "backbone": {"width": 16, "depth": 3, "mlp": 16, "heads": 2, "kv_heads": 1, "head_dim": 8},
    "expert": {"width": 8, "depth": 3, "mlp": 16, "heads": 2, "kv_heads": 1, "head_dim": 8},
    "state": "both",
}

STAGES: list[dict[str, Any]] = [
    {"name": "stem", "losses": {"cells": 1.0}, "train": ["stem", "heads"], "sources": {"views": 2}},
    {
        "name": "language",
        "losses": {"text": 1.0, "pointing": 1.0},
        "train": ["vision", "backbone"],
        "sources": {"scenes": 2},
    },
    {
        "name": "joint",
        "losses": {"text": 1.0, "pointing": 1.0, "fast": 1.0, "readout": 1.0, "flow": 1.0},
        "train": ["vision", "backbone", "heads", "expert"],
        "sources": {"scenes": 2, "robot": 2},
    },
    {"name": "expert", "losses": {"flow": 1.0}, "train": ["expert"], "sources": {"robot": 2}, "noise_samples": 2},
]


def tiny_run(folder: Path, steps: int) -> dict[str, Any]:
    """A configuration as YAML would give it, of `steps` in each stage; data and results are in `folder`."""
    data = folder / "data"
    write_demo_data(data)
    return {
        "name": "tiny",
        "robot": "demo_arm",
        "out": str(folder / "run"),
        "sources": {
            "views": [{"paligemma": str(data / "views.jsonl")}],
            "scenes": [{"paligemma": str(data / "scenes.jsonl")}],
            "robot": [{"lerobot": str(data / "robot"), "chunk": "action_chunk"}],
        },
        "held_out": {"robot": [{"lerobot": str(data / "validation"), "chunk": "action_chunk"}]},
        "model": SIZES,
        "vocabulary": {"kind": "words", "queries": 4},
        "prompt": {"length": 32},
        "hints": {"readout_frequencies": 4, "probe_layer": 1, "cell_classes": 25},
        "max_prefix_delay": 3,
        "stages": [{"steps": steps, "learning_rate": 1e-2, "warmup_steps": 1, **stage} for stage in STAGES],
    }
