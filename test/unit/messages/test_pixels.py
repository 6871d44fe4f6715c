"""Image bytes to RGB, each encoding against its definition (against cv_bridge: ros/test_topics.py)."""

from __future__ import annotations

import array
import random
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError
from ki_vla_ros.messages.pixels import decode_compressed, decode_raw

HEIGHT, WIDTH = 6, 8


def decode(encoding: str, rows: NDArray[np.uint8], width: int = WIDTH) -> NDArray[np.uint8]:
    return decode_raw("camera", encoding, rows.shape[0], width, rows.shape[1], array.array("B", rows.tobytes()))


def padded(rows: NDArray[np.uint8], padding: int) -> NDArray[np.uint8]:
    return np.concatenate([rows, np.full((rows.shape[0], padding), 255, dtype=np.uint8)], axis=1)


DEPTH = ("mono16", "16UC1", "16SC1", "32FC1", "32SC1", "64FC1", "8SC1", "16UC3")


@pytest.mark.parametrize("encoding", DEPTH)
def test_depth_is_no_colour(encoding: str) -> None:
    rows = np.zeros((HEIGHT, 4 * WIDTH), dtype=np.uint8)
    fault = f"camera: image encoding '{encoding}' is not supported, expected one of rgb8, .*; it holds depth: name the"
    with pytest.raises(InputError, match=fault):
        decode(encoding, rows)


FLAT = np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8)


def encoded(kind: str, pixels: NDArray[Any]) -> bytes:
    return bytes(cv2.imencode(f".{kind}", pixels)[1].tobytes())


@pytest.mark.parametrize(
    "data, format, fault",
    [
        *((encoded("jpg", FLAT), f"{encoding}; jpeg compressed ", "which holds depth") for encoding in DEPTH),
        (encoded("png", FLAT[..., 0]), "16UC1; png compressed ", "which holds depth: name the camera's colour topic"),
        (bytes(12) + encoded("png", FLAT), "32FC1; compressedDepth png", "'32FC1; compressedDepth png', which holds"),
        (encoded("png", FLAT), "compressedDepth", "which holds depth"),
        (encoded("png", FLAT[..., 0].astype(np.uint16)), "png", "got a png of 16 bits, as depth has"),
        (encoded("png", FLAT.astype(np.uint16)), "rgb16; png compressed bgr16", "got a png of 16 bits"),
        (encoded("jpg", FLAT), "bayer_rggb8; jpeg compressed bgr8", "which is the sensor's mosaic compressed as if it"),
        (encoded("jpg", FLAT[..., 0]), "bayer_gbrg8; jpeg compressed ", "compress the image after debayering"),
        (encoded("webp", FLAT), "webp", "expected a jpeg or png image, got"),
        (encoded("bmp", FLAT), "bmp", "expected a jpeg or png image, got"),
    ],
)  # fmt: skip
def test_compressed_images_that_are_no_colour_are_refused(data: bytes, format: str, fault: str) -> None:
    with pytest.raises(InputError, match=f"^camera: .*{re.escape(fault)}"):
        decode_compressed("camera", data, format)


@pytest.mark.parametrize(
    "format", ["jpeg", "", "rgb8; jpeg compressed bgr8", "mono8; jpeg compressed ", "yuv422; jpeg"]
)
def test_formats_of_colour_images_pass(format: str) -> None:
    for kind in ("jpg", "png"):
        assert np.abs(decode_compressed("camera", encoded(kind, FLAT), format).astype(int) - 90).max() <= 2


@pytest.mark.parametrize("width, height", [(60_000, 60_000), (65_000, 1_000), (0, 100), (100, 0)])
def test_size_is_bounded_before_decoding(width: int, height: int) -> None:
    jpeg, png = encoded("jpg", FLAT), encoded("png", FLAT)
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg = jpeg[:frame] + struct.pack(">HH", height, width) + jpeg[frame + 4 :]
    header = png[12:16] + struct.pack(">II", width, height) + png[24:29]
    png = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    for data in (jpeg, png):
        # Of a jpeg without a size the decoder says that its header is damaged.
        fault = f"expected (1 to 50000000 pixels, got a file that announces {width} x {height}|a whole jpeg image)"
        with pytest.raises(InputError, match=fault):
            decode_compressed("camera", data)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 8, 20, 24, 25, 40])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_the_beginning_of_a_file_is_refused(kind: str, size: int) -> None:
    with pytest.raises(InputError, match=r"^camera: expected a "):
        decode_compressed("camera", encoded(kind, FLAT)[:size])


@pytest.mark.parametrize("step, size", [(24, 143), (24, 145), (24, 0), (23, 138), (0, 0), (2**32 - 1, 144)])
def test_rows_and_size_must_agree(step: int, size: int) -> None:
    with pytest.raises(InputError, match="an image of 8 x 6 rgb8 needs step >= 24 and height"):
        decode_raw("camera", "rgb8", HEIGHT, WIDTH, step, bytes(size))
    with pytest.raises(InputError, match="needs step >="):
        decode_raw("camera", "rgb8", 0, WIDTH, step, b"")


def photograph(seed: int) -> NDArray[np.uint8]:
    """Blobs with some noise, 480 x 640."""
    rng = np.random.default_rng(seed)
    smooth = cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), (640, 480), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0.0, 3.0, smooth.shape), 0, 255).astype(np.uint8)


def lose(data: bytearray, begin: int, end: int) -> None:
    del data[begin:end]


def zero(data: bytearray, begin: int, end: int) -> None:
    data[begin:end] = bytes(end - begin)


def turn(data: bytearray, begin: int, end: int) -> None:
    data[begin] ^= 1 << end % 8


def cut(data: bytearray, begin: int, _end: int) -> None:
    del data[begin:-2]


@pytest.mark.parametrize("damage, least", [(lose, 0.6), (zero, 0.5), (turn, 0.25), (cut, 1.0)])
def test_damaged_jpegs_are_refused(damage: Callable[[bytearray, int, int], None], least: float) -> None:
    """All end with the marker of a whole image. No decoder finds all damage, as a jpeg has no checksum."""
    draw, refused, tried = random.Random(1), 0, 60
    wholes = [encoded("jpg", photograph(seed)) for seed in range(5)]
    for n in range(tried):
        data = bytearray(wholes[n % 5])
        begin = draw.randrange(2, len(data) - 2)
        damage(data, begin, min(begin + draw.choice([1, 16, 256, 1400, 4096]), len(data) - 2))
        assert data[-2:] == b"\xff\xd9"
        try:
            decode_compressed("camera", bytes(data))
        except InputError as refusal:
            refused += str(refusal).startswith("camera: expected ")
    assert refused >= least * tried, f"{refused} of {tried} are refused"


def test_bytes_after_a_jpeg_are_no_damage() -> None:
    """Some cameras fill their buffers up."""
    whole = encoded("jpg", photograph(0))
    np.testing.assert_array_equal(decode_compressed("camera", whole + bytes(5000)), decode_compressed("camera", whole))


def test_jpeg_pixels_are_those_of_opencv() -> None:
    whole = encoded("jpg", photograph(0))
    expected = cv2.imdecode(np.frombuffer(whole, dtype=np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(decode_compressed("camera", whole)[..., ::-1], expected)
    grey = encoded("jpg", photograph(0)[..., 0])
    found = decode_compressed("camera", grey)
    assert found.shape == (480, 640, 3) and not np.ptp(found.astype(int), axis=2).any()


def test_damaged_pngs_are_refused() -> None:
    """Their chunks have checksums."""
    draw = random.Random(0)
    whole = encoded("png", np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    for _ in range(50):
        damaged = bytearray(whole)
        damaged[draw.randrange(8, len(whole) - 12)] ^= 1 << draw.randrange(8)
        with pytest.raises(InputError, match=r"^camera: expected "):
            decode_compressed("camera", bytes(damaged))


@pytest.mark.parametrize(
    "pattern, red, blue",
    [("rggb", (0, 0), (1, 1)), ("bggr", (1, 1), (0, 0)), ("gbrg", (1, 0), (0, 1)), ("grbg", (0, 1), (1, 0))],
)
def test_bayer_patterns(pattern: str, red: tuple[int, int], blue: tuple[int, int]) -> None:
    """One colour everywhere: whatever the interpolation, each pixel is that colour."""
    mosaic = np.full((HEIGHT, WIDTH), 60, dtype=np.uint8)
    mosaic[red[0] :: 2, red[1] :: 2] = 200
    mosaic[blue[0] :: 2, blue[1] :: 2] = 10
    rgb = decode(f"bayer_{pattern}8", padded(mosaic, 3))
    np.testing.assert_array_equal(rgb[2:-2, 2:-2], np.broadcast_to([200, 60, 10], (HEIGHT - 4, WIDTH - 4, 3)))


@pytest.mark.parametrize(
    "encoding, order", [("yuv422", "uyvy"), ("yuv422_yuy2", "yuyv"), ("uyvy", "uyvy"), ("yuyv", "yuyv")]
)
def test_yuv422(encoding: str, order: str) -> None:
    """ITU-R BT.601, studio swing: Y 81, U 90, V 240 is red; grey has U = V = 128."""
    red = {"u": 90, "y": 81, "v": 240}
    pair = [red[letter] for letter in order]
    rows = np.tile(np.array(pair, dtype=np.uint8), (HEIGHT, WIDTH // 2))
    rgb = decode(encoding, padded(rows, 2)).astype(int)
    assert np.abs(rgb - [255, 0, 0]).max() <= 2


def test_opencv_order_of_plain_types() -> None:
    rows = np.tile(np.array([1, 2, 3], dtype=np.uint8), (HEIGHT, WIDTH))
    np.testing.assert_array_equal(decode("8UC3", rows)[0, 0], [3, 2, 1])
    np.testing.assert_array_equal(decode("8UC1", rows, width=3 * WIDTH)[0, :3], [[1] * 3, [2] * 3, [3] * 3])


def test_odd_sizes_of_paired_encodings_are_refused() -> None:
    with pytest.raises(InputError, match="camera: an image in yuv422 needs an even size, got 7 x 6"):
        decode("yuv422", np.zeros((HEIGHT, 14), dtype=np.uint8), width=7)
    with pytest.raises(InputError, match="camera: an image in bayer_rggb8 needs an even size, got 8 x 5"):
        decode("bayer_rggb8", np.zeros((5, WIDTH), dtype=np.uint8))


def test_jpeg_is_read_as_the_camera_took_it() -> None:
    smooth = cv2.resize(np.array([[[200, 30, 60], [30, 200, 60]]], dtype=np.uint8), (64, 48))
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(smooth, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])
    rgb = decode_compressed("camera", jpeg.tobytes())
    assert rgb.shape == (48, 64, 3) and not rgb.flags.writeable
    assert np.abs(rgb.astype(int) - smooth).mean() < 4
    for nothing, expected in (
        (b"", "a jpeg or png image, got 0 bytes"),
        (b"no image", "a jpeg or png image, got 8 bytes"),
        (jpeg.tobytes()[:20], "a whole jpeg image, got 20 bytes of a damaged one"),
        (jpeg.tobytes()[:-2], f"a whole jpeg image, got {jpeg.size - 2} bytes of a damaged one: Premature end of JPEG"),
    ):
        with pytest.raises(InputError, match=f"camera: expected {expected}"):
            decode_compressed("camera", nothing)
