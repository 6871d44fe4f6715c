"""A recipe and sizes that train in seconds."""

from typing import Any

SIZES = {
    "vision": {"image_size": 96, "patch_size": 12, "width": 16, "depth": 1, "heads": 2, "mlp": 16, "stem": "conv"},
    "backbone": {"width": 16, "depth": 3, "mlp": 16, "heads": 2, "kv_heads": 1, "head_dim": 8},
    "expert": {"width": 8, "depth": 3, "mlp": 16, "heads": 2, "kv_heads": 1, "head_dim": 8},
    "state_token": True,
}

STAGES: list[dict[str, Any]] = [
    {"name": "stem", "losses": {"cells": 1.0}, "train": ["stem", "heads"], "scene_batch": 2},
    {"name": "language", "losses": {"text": 1.0, "pointing": 1.0}, "train": ["vision", "backbone"], "scene_batch": 2},
    {
        "name": "joint",
        "losses": {"text": 1.0, "pointing": 1.0, "fast": 1.0, "readout": 1.0, "flow": 1.0},
        "train": ["vision", "backbone", "heads", "expert"],
        "scene_batch": 2,
        "robot_batch": 2,
    },
    {"name": "expert", "losses": {"flow": 1.0}, "train": ["expert"], "robot_batch": 2, "noise_samples": 2},
]
