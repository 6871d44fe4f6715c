"""What runs the two graphs of a bundle: the contract is base.py, each other module one library's engine."""

from __future__ import annotations

from ki_vla_ros.bundle import Bundle
from ki_vla_ros.engines.base import Engine
from ki_vla_ros.errors import EngineError
from ki_vla_ros.settings import Settings


def open_engine(bundle: Bundle, settings: Settings) -> Engine:
    """The chosen engine; only its libraries need to be installed."""
    try:
        if settings.engine == "torch":
            from ki_vla_ros.engines.torch_engine import TorchEngine

            return TorchEngine(bundle, settings.provider, settings.threads, settings.torch_mode)
        from ki_vla_ros.engines.onnx_engine import OnnxEngine
    except ModuleNotFoundError as error:
        raise EngineError(
            f"engine {settings.engine}: expected the Python module {error.name}, got none; install the wheel "
            f"{error.name} or choose another engine"
        ) from error
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[settings.provider]
    return OnnxEngine(bundle, provider, settings.threads)
