"""A comparison that takes seconds: tiny models, frames that show nothing, one short episode of each split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from support.demo_data import TINY, write_demo_data

SIZES: dict[str, Any] = {
    "vision": {"image_size": 24, "patch_size": 12, "width": 16, "depth": 1, "heads": 2, "mlp": 16, "stem": "conv"},
    "backbone": {"width": 16, "depth": 2, "mlp": 16, "heads": 2, "kv_heads": 1, "head_dim": 8},
    "expert": {"width": 8, "depth": 2, "mlp": 16, "heads": 2, "kv_heads": 1, "head_dim": 8},
}
DATA = replace(TINY, robot_episodes=12, sizes=replace(TINY.sizes, image_size=24, grid=2, horizon=8))


def write_tiny(folder: Path, **changes: Any) -> Path:
    """The data, and the YAML files; returns that of the comparison, `changes` being keys of it."""
    data = folder / "data"
    if not data.exists():
        write_demo_data(data, DATA)
    sources = {
        "robot": [{"lerobot": str(data / "robot"), "chunk": "action_chunk"}],
        "scenes": [{"paligemma": str(data / "scenes.jsonl")}],
    }
    shared = {
        "robot": "demo_arm",
        "horizon": 8,
        "sources": sources,
        "held_out_share": 0.2,
        "model": SIZES,
        "prompt": {"length": 40},
        "cache_gb": 0.1,
    }
    start = shared | {
        "name": "start",
        "out": str(folder / "out/start"),
        "vocabulary": {"kind": "words"},
        "model": SIZES | {"state": "special"},  # its tokens come before FAST's, so no arm could add them
        "stages": [
            {
                "name": "language",
                "steps": 2,
                "sources": {"scenes": 4},
                "learning_rate": 1e-3,
                "losses": {"text": 1.0},
                "train": ["vision", "backbone"],
            }
        ],
    }
    (folder / "start.yaml").write_text(yaml.safe_dump(start))
    comparison = {
        "name": "tiny",
        "out": str(folder / "out"),
        "results": str(folder / "results/tiny"),
        "start": str(folder / "start.yaml"),
        "run": shared | {"ema": 0.5, "stage": {"sources": {"robot": 4, "scenes": 2}}},
        "steps": 4,
        "points": [2, 4],
        "grid": {"rates": [1e-3, 1e-2], "steps": 2, "seed": 100},
        "closed_loop": {"splits": {"known": "arm/known"}, "episodes": 2, "earlier": 1, "execute": 4},
        "knowledge": {
            "questions": str(data / "scenes.jsonl"),
            "kinds": {"pointing": "Question: where is ", "vqa": "Question: "},
            "samples": 8,
        },
        "timed_rounds": 1,
        "arms": {"ki": {"seeds": 2}, "pi0": {"paper": {"expected": "worse", "says": "0.49"}}},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(comparison | changes))
    return path
