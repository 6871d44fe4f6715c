"""Tensors of several processes in one folder of safetensors, through torch.distributed.checkpoint (DCP).

DCP plans which process writes and reads which piece of a tensor, so no process ever holds more than its share, and a
folder can be read by another number of processes. Its usual storage keeps the plan as a pickle (`.metadata`, read with
`pickle.load`), which can run any code. Here each process writes one safetensors file, laid out as by torch's
HuggingFaceStorageWriter: the header says where each piece belongs, so torch's HuggingFaceStorageReader reads it too.
That reader takes a folder with a file missing for one of smaller tensors; this one refuses it.
"""

from __future__ import annotations

import json
import math
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.files import is_name, parse_json
from training.storage import sync, whole_folder, writing
from training.weights.files import TYPES, open_safetensors

FILE = "part-{:05d}-of-{:05d}.safetensors"
IDENTITY = "identity"  # the same random text in all files that were saved together
OFFSETS = "DCP_SHARDING_INFO"  # torch's key: {tensor: {"saved_offsets": [...]}}

COUNTS = {"F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


class Place(NamedTuple):
    """Where a process writes its pieces: into `folder`, which will be `place`."""

    folder: Path
    place: Path
    name: str
    identity: str


def save_pieces(place: Path, tensors: Mapping[str, Tensor], complete: Callable[[Path, str, list[str]], None]) -> None:
    """Write a folder of tensors, `STATE.NAME`, whole or as DTensors in pieces; all processes must call this.

    The folder appears whole or not at all. Before it does, the first process calls `complete(folder, identity, files)`,
    which writes what else belongs there. ConfigurationError, in all processes, if one of them cannot write.
    """
    states: dict[str, dict[str, Tensor]] = {}  # DCP joins the two names again, and logs two lines for each outer one
    for name, tensor in tensors.items():
        state, _, rest = name.partition(".")
        states.setdefault(state, {})[rest] = tensor
    with ExitStack() as stack, without_warnings(), one_error():
        save(dict(states), storage_writer=PieceWriter(place, complete, stack))


class PieceWriter(StorageWriter):
    """DCP's steps: all processes plan, the first opens the folder, all write, and the first gives it its name."""

    def __init__(self, place: Path, complete: Callable[[Path, str, list[str]], None], stack: ExitStack) -> None:
        self.place, self.complete, self.stack = place, complete, stack

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """In the first process."""
        self.opened = self.stack.enter_context(whole_folder(self.place))
        self.identity = secrets.token_hex(16)
        self.files = [FILE.format(number, len(plans)) for number in range(1, len(plans) + 1)]
        return [
            replace(plan, storage_data=Place(self.opened, self.place, name, self.identity))
            for plan, name in zip(plans, self.files, strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        folder, place, name, identity = plan.storage_data
        offsets = {item.index.fqn: {"saved_offsets": list(item.index.offset or ())} for item in plan.items}
        with writing(place / name):
            pieces = {item.index.fqn: alone_in_memory(planner.resolve_data(item)) for item in plan.items}
            save_file(pieces, folder / name, {"format": "pt", IDENTITY: identity, OFFSETS: json.dumps(offsets)})
            sync(folder / name)
        done = Future[list[WriteResult]]()
        done.set_result([WriteResult(item.index, pieces[item.index.fqn].nbytes, name) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """In the first process."""
        self.complete(self.opened, self.identity, self.files)
        self.stack.close()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class PieceReader(StorageReader):
    """The tensors that `save_pieces` wrote to `files` of a folder: `shapes` by name, and `load`.

    ConfigurationError unless the files were saved together, and each tensor's pieces are all of it.
    """

    def __init__(self, folder: Path, identity: str, files: Sequence[str]) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self.handles: dict[tuple[str, torch.Size], Any] = {}
        for name in files:
            if not is_name(name):
                raise ConfigurationError(f"checkpoint {folder}: expected names of files in it, got {name!r}")
            try:
                self.open(folder / name, identity)
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigurationError(
                    f"{folder / name}: expected pieces of tensors, as training saves them, got others ({error!r}); "
                    "delete this checkpoint, and the run goes on from the one before"
                ) from error
        for name, found in self.tensors.items():
            check_cover(folder, name, found)
        self.shapes = {name: tuple(found.size) for name, found in self.tensors.items()}

    def open(self, file: Path, identity: str) -> None:
        handle = open_safetensors(file)
        described = handle.metadata() or {}
        if described.get(IDENTITY) != identity:
            raise ConfigurationError(
                f"{file}: expected a file of identity {identity}, saved together with the others of its folder, got "
                f"{described.get(IDENTITY, 'none')}; take all files from one checkpoint"
            )
        offsets = parse_json(described[OFFSETS])
        for name in handle.keys():  # noqa: SIM118 (not a mapping)
            entry = handle.get_slice(name)
            sizes, at = torch.Size(entry.get_shape()), torch.Size(offsets[name]["saved_offsets"])
            if len(at) != len(sizes) or any(start < 0 for start in at):
                raise ValueError(f"{name}: a piece of shape {list(sizes)} at {list(at)}")
            dtype, ends = (TYPES | COUNTS)[entry.get_dtype()], [a + b for a, b in zip(at, sizes, strict=True)]
            found = self.tensors.setdefault(
                name, TensorStorageMetadata(TensorProperties(dtype), torch.Size(ends), chunks=[])
            )
            if len(found.size) != len(sizes) or found.properties.dtype != dtype:
                raise ValueError(f"{name}: pieces of several kinds")
            found.size = torch.Size(map(max, found.size, ends))
            found.chunks.append(ChunkStorageMetadata(at, sizes))
            self.handles[name, at] = handle

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].properties.dtype

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Read into these tensors, whole or DTensors of any placement; all processes must call this."""
        for name, tensor in tensors.items():
            found = self.tensors.get(name)
            expected, got = (
                None if x is None else (list(x.size), x.properties.dtype) for x in (of_tensor(tensor), found)
            )
            if expected != got:
                raise ConfigurationError(
                    f"resume {self.folder}: {name}: expected {expected}, as this configuration says, got "
                    f"{got or 'none'}; keep the model, the robot and the hints that the run began with, or name "
                    "another folder under out"
                )
        with without_warnings(), one_error():
            load(dict(tensors), storage_reader=self)

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(dict(self.tensors))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            index = item.storage_index
            handle = self.handles[index.fqn, index.offset or torch.Size()]
            starts = zip(item.storage_offsets, item.lengths, strict=True)
            rows = tuple(slice(start, start + length) for start, length in starts)
            target = planner.resolve_tensor(item).detach()
            target.copy_(handle.get_slice(index.fqn)[rows] if rows else handle.get_tensor(index.fqn))
            planner.commit_tensor(item, target)
        done = Future[None]()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def alone_in_memory(tensor: Any) -> Tensor:
    """On the CPU, and no view of a larger one: safetensors refuses tensors that share memory."""
    held: Tensor = tensor.detach().cpu().contiguous()
    return held if held.untyped_storage().nbytes() == held.nbytes else held.clone()


def of_tensor(tensor: Tensor) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.size(), chunks=[])


def check_cover(folder: Path, name: str, found: TensorStorageMetadata) -> None:
    """ConfigurationError unless the pieces are the whole tensor, each part of it once."""
    pieces = [[range(a, a + n) for a, n in zip(c.offsets, c.sizes, strict=True)] for c in found.chunks]
    twice = any(
        all(max(a.start, b.start) < min(a.stop, b.stop) for a, b in zip(one, two, strict=True))
        for one, two in combinations(pieces, 2)
    )
    if twice or sum(math.prod(map(len, piece)) for piece in pieces) != math.prod(found.size):
        raise ConfigurationError(
            f"checkpoint {folder}: {name}: expected pieces that make a tensor of shape {list(found.size)}, got "
            f"{[[[a.start, a.stop] for a in piece] for piece in pieces]}; delete this checkpoint, and the run goes on "
            "from the one before"
        )


@contextmanager
def without_warnings() -> Iterator[None]:
    """A single process without a group is meant, which DCP warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


@contextmanager
def one_error() -> Iterator[None]:
    """The first process's error that DCP reports in all processes, in place of DCP's with every traceback."""
    try:
        yield
    except CheckpointException as failed:
        rank = min(failed.failures)
        error = failed.failures[rank][0]
        raise error from None
