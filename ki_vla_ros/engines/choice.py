"""Opens the engine that the settings choose."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ki_vla_ros.bundle import Bundle
from ki_vla_ros.engines.base import Engine
from ki_vla_ros.engines.plans import PlanCache, default_folder
from ki_vla_ros.errors import EngineError
from ki_vla_ros.settings import Settings
from ki_vla_ros.share import expand


def _print(message: str) -> None:
    print(message, file=sys.stderr)


def check_engine(settings: Settings, gpu: str = "") -> None:
    """EngineError or ConfigurationError if this machine cannot have the chosen engine, found without a bundle.

    `gpu`: which one is here, such as sm89; empty: not asked.
    """
    if settings.engine in ("tensorrt", "tensorrt_rtx"):
        from ki_vla_ros.engines.tensorrt_builder import check_gpu
        from ki_vla_ros.engines.tensorrt_library import load_library

        library = load_library(settings.engine)
        if gpu:
            check_gpu(library, gpu)
    elif settings.engine == "onnx":
        from ki_vla_ros.engines.onnx_engine import PROVIDERS, check_provider

        check_provider(PROVIDERS[settings.provider])


def open_engine(bundle: Bundle, settings: Settings, say: Callable[[str], object] = _print) -> Engine:
    """The chosen engine; only its libraries need to be installed. `say` announces slow work."""
    if settings.policy_server:
        raise EngineError(
            f"policy_server: expected none here, got {settings.policy_server}: only the node asks a server; leave it "
            "empty to run the bundle's own graphs"
        )
    try:
        folder = expand(settings.engine_cache) if settings.engine_cache else default_folder()
        if settings.engine in ("tensorrt", "tensorrt_rtx"):
            from ki_vla_ros.engines.tensorrt_engine import open_tensorrt

            return open_tensorrt(bundle, settings.engine, PlanCache(folder), say)
        if settings.engine == "torch":
            from ki_vla_ros.engines.torch_engine import TorchEngine

            return TorchEngine(bundle, settings.provider, settings.threads, settings.torch_mode)
        if settings.engine == "onnx":
            from ki_vla_ros.engines.onnx_engine import PROVIDERS, OnnxEngine

            return OnnxEngine(bundle, PROVIDERS[settings.provider], settings.threads, folder)
    except ModuleNotFoundError as error:
        raise EngineError(
            f"engine {settings.engine}: expected the Python module {error.name}, got none; install the wheel "
            f"{error.name} or choose another engine"
        ) from error
    raise EngineError(f"engine {settings.engine!r}: the setting allows it, but engines/choice.py does not open it")
