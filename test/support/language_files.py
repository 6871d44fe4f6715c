"""Vision-language files as people have them: pictures on disk, lines of JSON, parquet with pictures inside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.data.samples import Image

SPOT = (250, 40, 40)


def picture(width: int, height: int, spot: tuple[float, float] | None = None) -> Image:
    """A grey picture [height, width, 3], with a red spot at (u, v)."""
    rgb_HWC = np.full((height, width, 3), 120, np.uint8)
    if spot is not None:
        x, y, reach = int(spot[0] * width), int(spot[1] * height), max(2, min(width, height) // 16)
        rgb_HWC[max(0, y - reach) : y + reach, max(0, x - reach) : x + reach] = SPOT
    return rgb_HWC


def find_spot(rgb_HWC: Image) -> tuple[float, float]:
    """The middle of the red spot, as u and v of this image."""
    rows, columns = np.nonzero(rgb_HWC[..., 0].astype(int) - rgb_HWC[..., 1] > 90)
    height, width = rgb_HWC.shape[:2]
    return float(columns.mean() + 0.5) / width, float(rows.mean() + 0.5) / height


def png(rgb_HWC: Image) -> bytes:
    return bytes(cv2.imencode(".png", cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2BGR))[1].tobytes())


def write_pictures(folder: Path, pictures: Mapping[str, Image]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rgb_HWC in pictures.items():
        (folder / name).write_bytes(png(rgb_HWC))


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """A row that is a text stands in the file as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_parquet(
    path: Path, columns: Mapping[str, Sequence[Any]], features: Any = None, rows_in_group: int = 3
) -> Path:
    """`features`: what the library `datasets` writes about columns beside the table."""
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    if features is not None:
        table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_in_group)
    return path
