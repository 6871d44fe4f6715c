"""A camera frame that stays in its bag message and is decoded only when a tick uses it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.messages import COMPRESSED_IMAGE, IMAGE, BagMessage, camera_frame, decode, read_image
from ki_vla_ros.policy import resize_with_pad
from ki_vla_ros.records import CameraFrame, header_ns


class BagFrame(CameraFrame):
    """A frame whose pixels are decoded, and shrunk to the model's size, on first use.

    `rgb_HWC` raises InputError if they cannot be decoded.
    """

    message: BagMessage
    _size: int
    _pixels: NDArray[np.uint8] | None

    def __init__(self, camera: str, stamp_ns: int, message: BagMessage, size: int) -> None:
        values = {"camera": camera, "stamp_ns": stamp_ns, "message": message, "_size": size, "_pixels": None}
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the base is frozen

    @property
    def rgb_HWC(self) -> NDArray[np.uint8]:
        if self._pixels is None:
            whole = camera_frame(self.message, self.camera)
            object.__setattr__(self, "_pixels", resize_with_pad(whole.rgb_HWC, self._size))
        assert self._pixels is not None
        return self._pixels


def bag_frame(message: BagMessage, camera: str, size: int, use_receive_time: bool) -> BagFrame:
    """The frame in a message; InputError if its stamp cannot be read. Faults in the pixels show on first use."""
    if use_receive_time:
        stamp_ns = message.log_ns
    elif message.type == IMAGE:
        stamp_ns = read_image(f"camera {camera!r}", message.data).stamp_ns
    else:
        stamp_ns = header_ns(decode(message, IMAGE, COMPRESSED_IMAGE))
    return BagFrame(camera, stamp_ns, message, size)
