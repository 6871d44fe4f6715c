"""What a policy is on disk, and the checks that it must pass to be loaded."""

from ki_vla_ros.bundle.folder import (
    EXPERT,
    MANIFEST,
    PREFILL,
    PROGRAMS,
    TIME,
    TOKENIZER,
    Bundle,
    file_sha256,
    graph_interface,
    load_bundle,
    write_bundle,
)
from ki_vla_ros.bundle.manifest import (
    PAD_TOKEN,
    UNKNOWN_TOKEN,
    GraphSpec,
    ImageSpec,
    Manifest,
    PolicySpec,
    PromptSpec,
    PromptStyle,
    Provenance,
)
from ki_vla_ros.bundle.onnx_header import GraphHeader, TensorType, read_header
from ki_vla_ros.bundle.pt2 import AnyDevice, Constant, Operation, Program, TensorName, read_program
from ki_vla_ros.bundle.time_table import TimeTable
from ki_vla_ros.bundle.tokenizer import LARGEST_TOKENIZER, encode, load_tokenizer, make_tokenizer

__all__ = [
    "EXPERT",
    "LARGEST_TOKENIZER",
    "MANIFEST",
    "PAD_TOKEN",
    "PREFILL",
    "PROGRAMS",
    "TIME",
    "TOKENIZER",
    "UNKNOWN_TOKEN",
    "AnyDevice",
    "Bundle",
    "Constant",
    "GraphHeader",
    "GraphSpec",
    "ImageSpec",
    "Manifest",
    "Operation",
    "PolicySpec",
    "Program",
    "PromptSpec",
    "PromptStyle",
    "Provenance",
    "TensorName",
    "TensorType",
    "TimeTable",
    "encode",
    "file_sha256",
    "graph_interface",
    "load_bundle",
    "load_tokenizer",
    "make_tokenizer",
    "read_header",
    "read_program",
    "write_bundle",
]
