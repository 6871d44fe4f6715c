"""What node and replay make of their inputs alike: cameras as the settings say, the check of an instruction."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ki_vla_ros.bundle.folder import Bundle
from ki_vla_ros.bundle.manifest import PolicySpec
from ki_vla_ros.policy.preprocess import make_model_input
from ki_vla_ros.records import NS_PER_S, CameraFrame, Observation
from ki_vla_ros.runtime.observation import CameraSource
from ki_vla_ros.settings.settings import Settings


def camera_sources(
    manifest: PolicySpec,
    settings: Settings,
    resolve: Callable[[str], str],
    topics: Mapping[str, str] | None = None,
) -> list[CameraSource]:
    """The bundle's cameras with their full topic names: those in `topics`, others as `resolve` makes them of the
    settings' names.
    """
    sources = []
    for camera in manifest.cameras:
        chosen = settings.camera(camera.name)
        topic = (topics or {}).get(camera.name) or resolve(chosen.topic)
        sources.append(CameraSource(camera.name, topic, camera.optional, own_limit_ns(chosen.max_age_s)))
    return sources


def own_limit_ns(max_age_s: float) -> int | None:
    """An input's own `max_age_s`; None: it has none."""
    return round(max_age_s * NS_PER_S) or None


def check_instruction(bundle: Bundle, instruction: str) -> None:
    """InstructionError unless a tick can use it: it goes a tick's way, with black images and a middle state."""
    manifest = bundle.manifest
    black_HWC = np.zeros((1, 1, 3), dtype=np.uint8)
    frames = {camera.name: CameraFrame(camera.name, 0, black_HWC) for camera in manifest.cameras}
    middle_J = (np.array(manifest.state.low) + np.array(manifest.state.high)) / 2.0
    make_model_input(manifest, bundle.tokenizer, Observation(0, frames, middle_J), instruction)
