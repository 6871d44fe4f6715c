"""Image bytes to RGB, each encoding against its definition (against cv_bridge: ros/test_topics.py)."""

from __future__ import annotations

import array

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError
from ki_vla_ros.messages.pixels import decode_compressed, decode_raw

HEIGHT, WIDTH = 6, 8


def decode(encoding: str, rows: NDArray[np.uint8], width: int = WIDTH, big: bool = False) -> NDArray[np.uint8]:
    return decode_raw("camera", encoding, rows.shape[0], width, rows.shape[1], big, array.array("B", rows.tobytes()))


def padded(rows: NDArray[np.uint8], padding: int) -> NDArray[np.uint8]:
    return np.concatenate([rows, np.full((rows.shape[0], padding), 255, dtype=np.uint8)], axis=1)


@pytest.mark.parametrize("encoding", ["mono16", "16UC1"])
@pytest.mark.parametrize("big", [False, True])
def test_sixteen_bits_scale_to_eight(encoding: str, big: bool) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535, 386, 385]] * HEIGHT, dtype=np.uint16)
    rows = values.astype(">u2" if big else "<u2").view(np.uint8).reshape(HEIGHT, -1)
    grey = np.rint(values / 257.0).astype(np.uint8)
    rgb = decode(encoding, padded(rows, 4), big=big)
    for channel in range(3):
        np.testing.assert_array_equal(rgb[..., channel], grey)


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
        (jpeg.tobytes()[:20], "a whole jpeg image, got the first 20 bytes"),
        (jpeg.tobytes()[:-2], f"a whole jpeg image, got the first {jpeg.size - 2} bytes"),
    ):
        with pytest.raises(InputError, match=f"camera: expected {expected}"):
            decode_compressed("camera", nothing)
