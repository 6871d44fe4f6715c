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
import simplejpeg
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError
from ki_vla_ros.records import stamp_to_ns

Pixels = NDArray[np.uint8]
JPEG_BEGIN, PNG_BEGIN = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
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
    read = _read_jpeg if content[:2] == JPEG_BEGIN else _read_png
    rgb_HWC = read(where, content)
    rgb_HWC.flags.writeable = False
    return rgb_HWC


def _read_jpeg(where: str, content: memoryview) -> Pixels:
    """Every warning of the decoder is an error: where data is lost, it makes up the pixels.

    OpenCV uses the same decoder, and the pixels are the same, but its warnings only go to stderr. A jpeg has no
    checksum: some damage makes another valid image (docs/runtime.md).
    """
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(content)
        _check_size(where, width, height)
        rgb_HWC: Pixels = simplejpeg.decode_jpeg(content, "RGB")
    except ValueError as error:
        raise InputError(
            f"{where}: expected a whole jpeg image, got {len(content)} bytes of a damaged one: {error}"
        ) from error
    return rgb_HWC


def _read_png(where: str, content: memoryview) -> Pixels:
    """OpenCV refuses whatever does not fit the checksums of a png."""
    if content[:8] != PNG_BEGIN:
        raise InputError(f"{where}: expected a jpeg or png image, got {len(content)} bytes that are neither")
    fault = f"{where}: expected a whole png image, got {len(content)} bytes of a damaged one"
    if len(content) < 25:
        raise InputError(fault)
    width, height, bits = struct.unpack_from(">IIB", content, 16)
    if bits == 16:
        raise InputError(f"{where}: expected a colour image, got a png of 16 bits, as depth has: {_COLOUR}")
    _check_size(where, width, height)
    try:
        bgr_HWC = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise InputError(fault) from error
    if bgr_HWC is None:
        raise InputError(fault)
    return np.asarray(cv2.cvtColor(bgr_HWC, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _check_size(where: str, width: int, height: int) -> None:
    if not 0 < width * height <= MOST_PIXELS:
        raise InputError(f"{where}: expected 1 to {MOST_PIXELS} pixels, got a file that announces {width} x {height}")
