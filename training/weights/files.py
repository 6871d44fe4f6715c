"""Safetensors on disk: one file, or several that an index lists, with tensors read one at a time on request.

A tensor in the file's own type is a view of the mapped file: it costs memory only when it is used, and no copy. Nothing
here executes code from a file: pickles are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.files import LARGEST_TEXT, is_name, open_file, parse_json, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHOWN = 10  # keys in an error


class WeightFiles:
    """All tensors of some files: `shapes` by key; `get` and `rows` read them. ConfigurationError names the fault."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        self._open = {file: open_safetensors(file) for file in files}
        foreign = []
        for file, handle in self._open.items():
            for key in handle.keys():  # noqa: SIM118 (not a mapping)
                if key in self._file_of:
                    raise ConfigurationError(f"{file}: expected each key once, got {key} in {self._file_of[key]} too")
                entry = handle.get_slice(key)
                self._file_of[key], self.shapes[key] = file, tuple(entry.get_shape())
                if entry.get_dtype() not in TYPES:
                    foreign.append(f"{key}: {entry.get_dtype()}")
        if foreign:
            raise ConfigurationError(
                f"{files[0].parent}: expected weights of type {', '.join(TYPES)}, got {shorten(foreign)}; "
                "quantised weights cannot be imported; take the original ones"
            )

    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """The whole tensor, in `dtype` or as it is in the file."""
        tensor: Tensor = self._open[self._file_of[key]].get_tensor(key)
        if dtype in (None, tensor.dtype):
            return tensor
        del tensor
        # Mapped a second time: pages that were read count as this process's memory until their mapping is closed.
        with open_safetensors(self._file_of[key]) as handle:
            return handle.get_tensor(key).to(dtype)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of a tensor, in the file's type."""
        with open_safetensors(self._file_of[key]) as handle:
            return handle.get_slice(key)[start:stop].clone()


def shorten(keys: Sequence[str]) -> str:
    return "; ".join(keys[:SHOWN]) + ("; ..." if len(keys) > SHOWN else "")


def open_safetensors(file: Path) -> Any:
    try:
        _check_header(file)
        return safe_open(file, "pt")
    except FileNotFoundError as error:
        raise ConfigurationError(f"{file}: expected the weights as safetensors, got no such file") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigurationError(
            f"{file}: expected the weights as safetensors, got {file.stat().st_size} bytes of something else or cut "
            f"off ({error}); download the file again and compare its sha256 with the publisher's"
        ) from error


def _check_header(file: Path) -> None:
    """OSError or ValueError unless the header is JSON with each tensor once: of two, readers may take either."""
    with open_file(file) as content:
        size = int.from_bytes(content.read(8), "little")
        parse_json(content.read(min(size, LARGEST_TEXT + 1)))


def find_weights(path: Path) -> WeightFiles:
    """The weights at `path`: a .safetensors file, or a folder with one, or with shards and their index."""
    if path.is_dir():
        if (path / INDEX).is_file():
            return read_index(path / INDEX)
        if (path / SINGLE).is_file():
            return WeightFiles([path / SINGLE])
        found = sorted(entry.name for entry in path.iterdir())
        for name in found:
            refuse_pickle(path / name)
        remedy = ""
        if "params" in found:
            remedy = "; a JAX checkpoint: convert it with openpi's convert_jax_model_to_pytorch"
        elif "adapter_model.safetensors" in found:
            remedy = "; a LoRA adapter: give its folder with --lora, and the weights that it was trained on with --from"
        raise ConfigurationError(f"{path}: expected {SINGLE} or {INDEX}, got {shorten(found) or 'nothing'}{remedy}")
    refuse_pickle(path)
    if path.name.endswith(".index.json"):
        return read_index(path)
    if path.suffix != ".safetensors" and path.exists():
        raise ConfigurationError(f"{path}: expected a folder or a .safetensors file, got a file of another kind")
    return WeightFiles([path])


def refuse_pickle(path: Path) -> None:
    if path.suffix in PICKLES:
        raise ConfigurationError(
            f"{path}: expected safetensors, got a pickle, which can run any code when it is read; take the publisher's "
            "safetensors, or convert the file on a machine that you can afford to lose"
        )


def read_index(path: Path) -> WeightFiles:
    """The shards that an index lists; each must hold exactly the keys that the index says."""
    try:
        listed: dict[str, str] = read_json(path)["weight_map"]
        shards = sorted(set(listed.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path}: expected an index of safetensors with a weight_map ({error!r})") from error
    for name in shards:
        if not isinstance(name, str) or not is_name(name):
            raise ConfigurationError(f"{path}: expected names of files beside the index, got {name!r}")
        refuse_pickle(path.parent / name)
        if not (path.parent / name).is_file():
            raise ConfigurationError(f"{path}: expected {name}, which the index lists, beside it; download it too")
    weights = WeightFiles([path.parent / name for name in shards])
    astray = [key for key, name in listed.items() if weights._file_of.get(key) != path.parent / name]
    astray += sorted(weights.shapes.keys() - listed.keys())
    if astray:
        raise ConfigurationError(f"{path}: expected index and shards to agree, got other places for {shorten(astray)}")
    return weights


def check_fit(
    expected: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]], source: str, remedy: str
) -> None:
    """Refuse weights that are missing, unknown or misshapen, and list them."""
    faults = {
        "missing": [key for key in expected if key not in got],
        "unknown": sorted(got.keys() - expected.keys()),
        "misshapen": [
            f"{key}: expected {list(shape)}, got {list(got[key])}"
            for key, shape in expected.items()
            if key in got and tuple(got[key]) != tuple(shape)
        ],
    }
    lines = [f"  {len(keys)} {fault}: {shorten(keys)}" for fault, keys in faults.items() if keys]
    if lines:
        raise ConfigurationError(f"{source}: weights do not fit the model\n" + "\n".join(lines) + f"\n{remedy}")
