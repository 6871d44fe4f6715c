"""Image bytes, as sensor_msgs describes them, to RGB pixels; without ROS, so that bags are read with the same code.

Pixel for pixel, each encoding becomes what cv_bridge makes of it when asked for rgb8 (tested where cv_bridge is
installed). Depth images are refused: no one scale of theirs is colour. Legend: H height, W width, C channel.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError
from ki_vla_ros.records import stamp_to_ns

Pixels = NDArray[np.uint8]
JPEG_BEGIN, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
# 8K is 33 million. A file of some kilobytes may announce a thousand times as many, and the decoder makes room for them.
MOST_PIXELS = 50_000_000
_COLOUR = "name the camera's colour topic"
_DEPTH = re.compile(r"mono16|(8S|16[USF]|32[SF]|64F)C\d+", re.ASCII)


@dataclass(frozen=True)
class _Encoding:
    """`bytes_per_pixel`, and how rows [H, W * bytes_per_pixel] become rgb [H, W, 3]."""

    bytes_per_pixel: int
    to_rgb: Callable[[NDArray[Any]], NDArray[Any]]
    even: bool = False  # width and height must be even (width only, for yuv422)


def _reorder(channels: int, order: tuple[int, int, int]) -> _Encoding:
    def to_rgb(rows: NDArray[Any]) -> NDArray[Any]:
        pixels = rows.reshape(rows.shape[0], -1, channels)
        return pixels if channels == 3 and order == (0, 1, 2) else pixels[..., order]

    return _Encoding(channels, to_rgb)


def _by_opencv(code: int, bytes_per_pixel: int) -> _Encoding:
    def to_rgb(rows: NDArray[Any]) -> NDArray[Any]:
        whole = np.ascontiguousarray(rows)
        shaped = whole if bytes_per_pixel == 1 else whole.reshape(whole.shape[0], -1, bytes_per_pixel)
        rgb: NDArray[Any] = cv2.cvtColor(shaped, code)
        return rgb

    return _Encoding(bytes_per_pixel, to_rgb, even=True)


# OpenCV names a Bayer pattern by the second and third pixel of its second row, ROS by the first two of both rows.
ENCODINGS: Mapping[str, _Encoding] = {
    "rgb8": _reorder(3, (0, 1, 2)),
    "bgr8": _reorder(3, (2, 1, 0)),
    "rgba8": _reorder(4, (0, 1, 2)),
    "bgra8": _reorder(4, (2, 1, 0)),
    "mono8": _reorder(1, (0, 0, 0)),
    "8UC1": _reorder(1, (0, 0, 0)),
    "8UC3": _reorder(3, (2, 1, 0)),
    "bayer_rggb8": _by_opencv(cv2.COLOR_BayerBG2RGB, 1),
    "bayer_bggr8": _by_opencv(cv2.COLOR_BayerRG2RGB, 1),
    "bayer_gbrg8": _by_opencv(cv2.COLOR_BayerGR2RGB, 1),
    "bayer_grbg8": _by_opencv(cv2.COLOR_BayerGB2RGB, 1),
    "yuv422": _by_opencv(cv2.COLOR_YUV2RGB_UYVY, 2),
    "uyvy": _by_opencv(cv2.COLOR_YUV2RGB_UYVY, 2),
    "yuv422_yuy2": _by_opencv(cv2.COLOR_YUV2RGB_YUYV, 2),
    "yuyv": _by_opencv(cv2.COLOR_YUV2RGB_YUYV, 2),
}


@dataclass(frozen=True, slots=True, eq=False)
class WireImage:
    """The used fields of a serialized sensor_msgs/Image; `data` shares its memory."""

    stamp_ns: int
    height: int
    width: int
    encoding: str
    step: int
    data: memoryview


def read_image(where: str, message: bytes) -> WireImage:
    """A sensor_msgs/Image from its CDR bytes, without copying the pixels; InputError, beginning with `where`.

    rclpy's own deserialization copies them three times, which at 90 images per second costs half a core.
    """
    if message[:2] not in (b"\0\0", b"\0\1"):
        raise InputError(f"{where}: expected an image serialized as CDR, got bytes that begin with {message[:4].hex()}")
    order = "<" if message[1] else ">"
    body = memoryview(message)[4:]
    try:
        sec, nanosec, frame_id_size = struct.unpack_from(order + "iII", body)
        at = _aligned(12 + frame_id_size)
        height, width, encoding_size = struct.unpack_from(order + "III", body, at)
        at += 12
        encoding = bytes(body[at : at + encoding_size]).rstrip(b"\0").decode()
        at += encoding_size
        at = _aligned(at + 1)  # after is_bigendian, as every encoding that we know has single bytes
        step, size = struct.unpack_from(order + "II", body, at)
        data = body[at + 8 : at + 8 + size]
        if len(data) != size:
            raise IndexError(f"{size} bytes of pixels announced, {len(data)} present")
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: expected a whole sensor_msgs/Image, got {len(message)} bytes: {error}") from error
    return WireImage(stamp_to_ns(sec, nanosec), height, width, encoding, step, data)


def _aligned(offset: int) -> int:
    """CDR aligns a number of four bytes to a multiple of four."""
    return (offset + 3) // 4 * 4


def decode_raw(where: str, encoding: str, height: int, width: int, step: int, data: Any) -> Pixels:
    """The pixels [H, W, 3]; rgb8 without row padding shares the memory of `data`.

    InputError, beginning with `where`, for an unknown encoding, or if height, width, step and size do not agree.
    """
    known = ENCODINGS.get(encoding)
    if known is None:
        hint = f"; it holds depth: {_COLOUR}" if is_depth(encoding) else ""
        raise InputError(
            f"{where}: image encoding {encoding!r:.60} is not supported, expected one of {', '.join(ENCODINGS)}{hint}"
        )
    size, row = len(data), width * known.bytes_per_pixel
    if height < 1 or width < 1 or step < row or size != height * step:
        raise InputError(
            f"{where}: an image of {width} x {height} {encoding} needs step >= {row} and height * step bytes, "
            f"got step {step} and {size} bytes"
        )
    if known.even and (width % 2 or (known.bytes_per_pixel == 1 and height % 2)):
        raise InputError(f"{where}: an image in {encoding} needs an even size, got {width} x {height}")
    rows = np.frombuffer(data, dtype=np.uint8).reshape(height, step)[:, :row]
    rgb_HWC: Pixels = np.ascontiguousarray(known.to_rgb(rows))
    rgb_HWC.flags.writeable = False
    return rgb_HWC


def is_depth(encoding: str) -> bool:
    """Whether the values are distances, or anything else of more than eight bits that is no colour.

    Their top byte, or what is left of them below 255, would pass for a grey image.
    """
    return _DEPTH.fullmatch(encoding) is not None


def decode_compressed(where: str, data: Any, format: str = "") -> Pixels:
    """The pixels [H, W, 3] of a jpeg or png file; `format` as in the CompressedImage that holds it.

    InputError, beginning with `where`, if it is neither, or not whole, or no colour image.
    """
    content = memoryview(data).cast("B")
    # image_transport begins with the encoding of the image that it has compressed, as in "rgb8; jpeg compressed bgr8".
    source = format.partition(";")[0].strip()
    if is_depth(source) or "compressedDepth" in format:
        raise InputError(f"{where}: expected a colour image, got {format!r:.60}, which holds depth: {_COLOUR}")
    if source.startswith("bayer_"):
        raise InputError(
            f"{where}: expected a colour image, got {format!r:.60}, which is the sensor's mosaic compressed as if it "
            "were grey: compress the image after debayering"
        )
    width, height = _announced_size(where, content)
    if not 0 < width * height <= MOST_PIXELS:
        raise InputError(f"{where}: expected 1 to {MOST_PIXELS} pixels, got a file that announces {width} x {height}")
    # OpenCV 4 silently fills the missing part of a truncated jpeg with black; every whole one has an end marker.
    if content[:2] == JPEG_BEGIN and JPEG_END not in bytes(content):
        raise InputError(f"{where}: expected a whole jpeg image, got the first {len(content)} bytes of one")
    # The pixels as the camera took them: a rotation noted in the file is for viewers.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        bgr_HWC = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), flags)
    except cv2.error:
        bgr_HWC = None
    if bgr_HWC is None:
        raise InputError(f"{where}: expected a jpeg or png image, got {len(content)} bytes of a damaged one")
    rgb_HWC: Pixels = np.asarray(cv2.cvtColor(bgr_HWC, cv2.COLOR_BGR2RGB), dtype=np.uint8)
    rgb_HWC.flags.writeable = False
    return rgb_HWC


def _announced_size(where: str, content: memoryview) -> tuple[int, int]:
    """Width and height that a jpeg or png announces; InputError for other files, and for 16 bits per channel."""
    if content[:8] == PNG_BEGIN and len(content) > 24:
        width, height, bits = struct.unpack_from(">IIB", content, 16)
        if bits == 16:
            raise InputError(f"{where}: expected a colour image, got a png of 16 bits, as depth has: {_COLOUR}")
        return width, height
    at, marker = 2, 0xFFFF if content[:2] == JPEG_BEGIN else 0
    try:
        while marker >= 0xFF00:
            marker, length = struct.unpack_from(">HH", content, at)
            if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):  # a frame header
                height, width = struct.unpack_from(">HH", content, at + 5)
                return width, height
            at += 2 + max(length, 2) if marker != 0xFFFF else 1  # before a marker there may be more 0xFF
    except struct.error:
        raise InputError(f"{where}: expected a whole jpeg image, got the first {len(content)} bytes of one") from None
    raise InputError(f"{where}: expected a jpeg or png image, got {len(content)} bytes that are neither")
