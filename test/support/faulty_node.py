"""The policy node with an engine that fails when told to: the file FAULT_FILE names the fault, "" is none."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.errors import EngineError
from ki_vla_ros.ros import node


def fault() -> str:
    return Path(os.environ["FAULT_FILE"]).read_text()


class FaultyEngine(OnnxEngine):
    def prefill(self, *arguments: Any) -> Any:
        match fault():
            case "raises":
                raise EngineError("engine: it broke")
            case "crashes":
                raise ZeroDivisionError("a bug")
            case "hangs":
                time.sleep(2.0)
            case "slow":
                time.sleep(0.15)
        return super().prefill(*arguments)

    def velocity(self, *arguments: Any) -> Any:
        found = super().velocity(*arguments)
        return {"nan": np.full_like(found, np.nan), "shape": np.zeros((3, 2), np.float32)}.get(fault(), found)


if __name__ == "__main__":
    node.open_engine = lambda bundle, *_: FaultyEngine(bundle)
    sys.exit(node.main())
