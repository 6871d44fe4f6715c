"""The calls that this package makes, against the installed modules, which have no type stubs; no GPU is needed."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorrt_rtx

from ki_vla_ros.engines import tensorrt_library
from ki_vla_ros.engines.tensorrt_library import Library, load_library
from ki_vla_ros.errors import EngineError

CLASSES = {
    tensorrt_library.Tensor: tensorrt_rtx.ITensor,
    tensorrt_library.ExecutionContext: tensorrt_rtx.IExecutionContext,
    tensorrt_library.CudaEngine: tensorrt_rtx.ICudaEngine,
    tensorrt_library.Runtime: tensorrt_rtx.Runtime,
    tensorrt_library.HostMemory: tensorrt_rtx.IHostMemory,
    tensorrt_library.TimingCache: tensorrt_rtx.ITimingCache,
    tensorrt_library.BuilderConfig: tensorrt_rtx.IBuilderConfig,
    tensorrt_library.Network: tensorrt_rtx.INetworkDefinition,
    tensorrt_library.Builder: tensorrt_rtx.Builder,
    tensorrt_library.ParserError: tensorrt_rtx.ParserError,
    tensorrt_library.Parser: tensorrt_rtx.OnnxParser,
}
SOURCES = Path(tensorrt_library.__file__).parent


def members(protocol: type) -> dict[str, Any]:
    own = {name: value for name, value in vars(protocol).items() if not name.startswith("_")}
    return own | dict.fromkeys(vars(protocol).get("__annotations__", {}))


def test_every_protocol_is_checked_against_a_class() -> None:
    protocols = {
        value
        for value in vars(tensorrt_library).values()
        if getattr(value, "_is_protocol", False) and value.__module__ == tensorrt_library.__name__
    }
    assert protocols == {*CLASSES, tensorrt_library.Named, tensorrt_library.Log}


@pytest.mark.parametrize("protocol", CLASSES, ids=lambda protocol: protocol.__name__)
def test_the_module_has_every_call_with_these_arguments(protocol: type) -> None:
    real = CLASSES[protocol]
    assert members(protocol)
    for name, ours in members(protocol).items():
        theirs = inspect.getattr_static(real, name)
        if not inspect.isfunction(ours):
            assert isinstance(theirs, property), f"{real.__name__}.{name} is no attribute"
            continue
        assert callable(getattr(real, name))
        # pybind writes each overload's signature into the docstring: name(self: X, argument: type = default) -> type
        signatures = re.findall(rf"^(?:\d+\. )?{name}\((.*)\) -> ", getattr(real, name).__doc__, re.MULTILINE)
        offered = [
            re.findall(r"(?:^|, )(\w+): ", signature) for signature in signatures if signature != "*args, **kwargs"
        ]
        wanted = list(inspect.signature(ours).parameters)
        assert any(wanted == arguments[: len(wanted)] for arguments in offered), (name, wanted, offered)


def test_every_name_taken_from_the_module_exists() -> None:
    """`library.module.X.Y` and `self.module.X.Y` in the sources, and the enumeration members that are compared."""
    found = set()
    for path in SOURCES.glob("tensorrt_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            chain, inner = [], node
            while isinstance(inner, ast.Attribute):
                chain.append(inner.attr)
                inner = inner.value
            if "module" in chain[1:]:
                found.add(".".join(reversed(chain[: chain.index("module")])))
    assert {"Builder", "OnnxParser", "Runtime", "ILogger.Severity", "MemoryPoolType.WORKSPACE"} <= found
    for name in found:
        value = tensorrt_rtx
        for part in name.split("."):
            value = getattr(value, part)
    for name in ("ERROR", "INTERNAL_ERROR"):
        assert hasattr(tensorrt_rtx.ILogger.Severity, name)
    assert {"INPUT", "OUTPUT"} <= set(tensorrt_rtx.TensorIOMode.__members__)
    assert "DEVICE" in tensorrt_rtx.TensorLocation.__members__
    assert {"FLOAT", "HALF", "BF16", "BOOL", "INT32", "INT64"} <= set(tensorrt_rtx.DataType.__members__)
    for name in ("phase_start", "step_complete", "phase_finish"):
        assert callable(getattr(tensorrt_rtx.IProgressMonitor, name))


def test_the_log_keeps_errors_until_they_are_taken() -> None:
    log: Any = Library("tensorrt_rtx", tensorrt_rtx).new_log()
    severity = tensorrt_rtx.ILogger.Severity
    for level, text in (
        (severity.ERROR, "first"),
        (severity.WARNING, "chatter"),
        (severity.INTERNAL_ERROR, "second\n"),
    ):
        log.log(level, text)
    assert log.take() == "first; second"
    assert log.take() == "it gave no reason"


def test_networks_are_strongly_typed_whether_or_not_there_is_a_flag() -> None:
    asked: list[int] = []
    builder: Any = SimpleNamespace(create_network=asked.append)
    for flags in (SimpleNamespace(STRONGLY_TYPED=1), SimpleNamespace()):
        module = SimpleNamespace(NetworkDefinitionCreationFlag=flags)
        Library("tensorrt", module).new_network(builder)
    assert asked == [0b10, 0]


def test_compute_capabilities_are_those_of_the_module() -> None:
    names = Library("tensorrt_rtx", tensorrt_rtx).compute_capabilities()
    assert {"sm86", "sm89", "sm120"} <= names.keys() and "current" not in names
    assert names["sm89"] == tensorrt_rtx.ComputeCapability.SM89
    assert Library("tensorrt", SimpleNamespace()).compute_capabilities() == {}


# --- which module


def test_the_installed_module_is_new_enough() -> None:
    assert str(load_library("tensorrt_rtx")) == f"tensorrt_rtx {tensorrt_rtx.__version__}"


@pytest.mark.parametrize(
    ("name", "remedy"), [("tensorrt", "JetPack's package python3-libnvinfer"), ("tensorrt_rtx", "tensorrt-rtx-cu13")]
)
def test_a_missing_module_names_its_package(name: Any, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match=f"{name}: expected the Python module {name}, got none; .*{remedy}"):
        load_library(name)


@pytest.mark.parametrize("version", ["8.6.2", "10.2.0.19", "unknown"])
def test_an_old_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(__version__=version, __file__="/usr/lib/tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", old)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=rf"expected version 10\.3 or newer, got {version} .*JetPack 6 or newer"):
        load_library("tensorrt")


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1.11", "11.0.0.1"])
def test_versions_from_jetpack_6_to_11_are_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))  # type: ignore[arg-type]
    assert load_library("tensorrt").version == version


def test_a_module_without_its_libraries_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match=r"expected a module that loads, got libnvinfer\.so\.10: cannot open"):
        load_library("tensorrt")
    sys.modules.pop("tensorrt", None)
