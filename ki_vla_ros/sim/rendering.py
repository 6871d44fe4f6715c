"""Off-screen images of the simulated robot, on EGL or OSMesa.

MuJoCo binds a GL library on import, according to MUJOCO_GL, and its failures there name no remedy. So it is imported
here without GL, which physics does not need, and a context is made for the first world with images. Other users of
MuJoCo in this process find it as they would have imported it: it binds its library when they first ask for a context.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ki_vla_ros.errors import SimulationError

_first = "mujoco" not in sys.modules
_requested = os.environ.get("MUJOCO_GL")
os.environ["MUJOCO_GL"] = "disable"
try:
    import mujoco as mujoco  # world.py takes it from here, so that it is never imported with GL
except ImportError as error:
    raise SimulationError(
        f"the simulated robot needs the package 'mujoco' ({error}); run 'pip install mujoco'"
    ) from error
finally:
    if _requested is None:
        del os.environ["MUJOCO_GL"]
    else:
        os.environ["MUJOCO_GL"] = _requested


def _bind_late(name: str) -> Any:
    """`GLContext` of MuJoCo's modules that have none yet: that of the library that MUJOCO_GL names now."""
    if name != "GLContext":
        raise AttributeError(f"module 'mujoco' has no attribute {name!r}")
    modules = _modules_with_context()
    for module in modules:
        vars(module).pop("__getattr__", None)
    chosen = importlib.reload(modules[-1]).GLContext
    for module in modules:
        vars(module)["GLContext"] = chosen
    return chosen


def _modules_with_context() -> list[Any]:
    """The one that chooses comes last; from MuJoCo 4 on it is one of a package."""
    names = ("mujoco", "mujoco.gl_context", "mujoco.rendering.classic.gl_context")
    return [sys.modules[name] for name in names if name in sys.modules]


if _first:
    for _module in _modules_with_context():
        vars(_module)["__getattr__"] = _bind_late

_APT = {
    "egl": "apt-get install -y libegl1 libgl1-mesa-dri libopengl0",
    "osmesa": "apt-get install -y libosmesa6",
}
_HIDDEN_GROUPS = (3, 4, 5)
_MAX_GEOMS = 254


def project(model: Any, data: Any, camera: str, xyz: ArrayLike, width: int, height: int) -> tuple[float, float]:
    """Where a point appears, in pixels (u right, v down) from the image's upper left corner; maybe outside it.

    SimulationError for a point behind the camera.
    """
    index = model.camera(camera).id
    right, up, back = data.cam_xmat[index].reshape(3, 3).T
    ray = np.asarray(xyz, dtype=np.float64) - data.cam_xpos[index]
    depth = -float(ray @ back)
    if depth <= 0.0:
        raise SimulationError(f"point {np.round(np.asarray(xyz), 3).tolist()} lies behind camera {camera!r}")
    focal = height / 2.0 / np.tan(np.radians(model.cam_fovy[index]) / 2.0)
    return width / 2.0 + focal * float(ray @ right) / depth, height / 2.0 - focal * float(ray @ up) / depth


class Cameras:
    """Images of one model, [H, W]; usable only in the thread that made it, to which GL binds."""

    def __init__(self, model: Any) -> None:
        """The images are as large as the model's off-screen buffer. SimulationError if no GL library works here."""
        self._model = model
        self._width, self._height = int(model.vis.global_.offwidth), int(model.vis.global_.offheight)
        context = _open_context(self._width, self._height)
        self._rect = mujoco.MjrRect(0, 0, self._width, self._height)
        self._scene = mujoco.MjvScene(model, maxgeom=_MAX_GEOMS)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = 0
        self._option = mujoco.MjvOption()
        for group in _HIDDEN_GROUPS:
            self._option.geomgroup[group] = 0
            self._option.sitegroup[group] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        context.make_current()
        self._mjr = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._mjr)
        self._context = context

    def render(self, data: Any, camera: str) -> NDArray[np.uint8]:
        """An RGB image [H, W, 3], top row first."""
        return self._draw(data, camera)

    def segment(self, data: Any, camera: str) -> NDArray[np.int64]:
        """Index of the geom seen in each pixel [H, W], -1 where there is none."""
        flags = (mujoco.mjtRndFlag.mjRND_SEGMENT, mujoco.mjtRndFlag.mjRND_IDCOLOR)
        for flag in flags:
            self._scene.flags[flag] = 1
        try:
            segment_id = self._draw(data, camera)[..., 0]  # MuJoCo spreads ids over RGB; ours fit into the first byte
        finally:
            for flag in flags:
                self._scene.flags[flag] = 0
        geom_by_id = np.full(self._scene.ngeom + 1, -1, dtype=np.int64)  # id 0 is the background
        for item in self._scene.geoms[: self._scene.ngeom]:
            if item.segid >= 0 and item.objtype == mujoco.mjtObj.mjOBJ_GEOM:
                geom_by_id[item.segid + 1] = item.objid
        geoms: NDArray[np.int64] = geom_by_id[segment_id]
        return geoms

    def close(self) -> None:
        """Frees the context; has no effect the second time."""
        if self._context is None:
            return
        self._context.make_current()
        self._mjr.free()
        self._context.free()
        self._context = None

    def __del__(self) -> None:
        # At interpreter exit the GL bindings may be half gone; the end of the process frees the context anyway.
        if not sys.is_finalizing() and getattr(self, "_context", None) is not None:
            self.close()

    def _draw(self, data: Any, camera: str) -> NDArray[np.uint8]:
        self._camera.fixedcamid = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        if self._camera.fixedcamid < 0:
            names = [self._model.camera(i).name for i in range(self._model.ncam)]
            raise SimulationError(f"camera {camera!r}: expected one of {', '.join(names)}")
        mujoco.mjv_updateScene(
            self._model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        upside_down = np.empty((self._height, self._width, 3), dtype=np.uint8)
        self._context.make_current()  # another world may have drawn in between
        mujoco.mjr_render(self._rect, self._scene, self._mjr)
        mujoco.mjr_readPixels(upside_down, None, self._rect, self._mjr)
        return np.ascontiguousarray(upside_down[::-1])


def _open_context(width: int, height: int) -> Any:
    """A GL context of the library that MUJOCO_GL names; if it is unset, EGL if that works here, or else OSMesa."""
    requested = os.environ.get("MUJOCO_GL", "").strip().lower()
    if requested not in ("", *_APT):
        raise SimulationError(f"MUJOCO_GL={requested!r}: expected 'egl', 'osmesa' or unset; run 'unset MUJOCO_GL'")
    backend = requested or ("egl" if _works("egl") else "osmesa")
    try:
        if backend == "egl":
            from mujoco.egl import GLContext
        else:
            from mujoco.osmesa import GLContext
        context = GLContext(width, height)
    except Exception as error:  # half-loaded GL bindings raise errors of any type
        tried = backend if requested else "egl, then osmesa"
        remedy = _APT[requested or "egl"]
        raise SimulationError(
            f"no off-screen OpenGL for the simulated cameras (tried {tried}; {type(error).__name__}: {error}); "
            f"run '{remedy}'" + ("" if requested else f" or '{_APT['osmesa']}'")
        ) from error
    os.environ["MUJOCO_GL"] = backend  # child processes need not probe again
    return context


def _works(backend: str) -> bool:
    """Whether a context can be made, tried in a child because a failure leaves PyOpenGL bound to the wrong library."""
    attempt = f"from mujoco.{backend} import GLContext; GLContext(8, 8).make_current()"
    child = subprocess.run(
        [sys.executable, "-c", attempt], env={**os.environ, "MUJOCO_GL": "disable"}, capture_output=True, check=False
    )
    return child.returncode == 0
