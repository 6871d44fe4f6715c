"""Images of a bag that are decoded when they are used: at 10 frames per second of a camera at 30 Hz, most never are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError
from ki_vla_ros.messages import COMPRESSED_IMAGE, IMAGE, BagMessage, camera_frame, decode
from ki_vla_ros.records import CameraFrame


class RecordedImage(CameraFrame):
    """A camera's frame whose pixels are the message's, decoded at first use: InputError where they are damaged."""

    __slots__ = ("_pixels", "message")
    message: BagMessage
    _pixels: NDArray[np.uint8] | None

    def __init__(self, message: BagMessage, camera: str, stamp_ns: int) -> None:
        """InputError if the message is no image."""
        if message.type not in (IMAGE, COMPRESSED_IMAGE):
            raise InputError(
                f"camera {camera!r}: expected {IMAGE} or {COMPRESSED_IMAGE} on {message.topic}, got {message.type}"
            )
        for name, value in {"camera": camera, "stamp_ns": stamp_ns, "message": message, "_pixels": None}.items():
            object.__setattr__(self, name, value)

    @property
    def rgb_HWC(self) -> NDArray[np.uint8]:
        pixels = self._pixels
        if pixels is None:
            pixels = camera_frame(self.message, self.camera).rgb_HWC
            object.__setattr__(self, "_pixels", pixels)
        return pixels

    @property
    def file(self) -> bytes | None:
        """The file as it was recorded (jpeg or png); None for a raw image."""
        return bytes(decode(self.message).data) if self.message.type == COMPRESSED_IMAGE else None
