"""The mp4 files of a dataset: frames of many episodes one after another, frame n at n / fps seconds.

H.264 at a quality (crf 18) that keeps simulated images of 288 pixels at 40 dB on average. Every second frame is a key
frame, as in LeRobot's own files, so that a frame can be read without decoding many others. No frame refers to a later
one, so that the first frame's time is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError
from training.data.lerobot.layout import MIB, Feature, Info, next_file

CODEC: Final = "libx264"
OPTIONS: Final = {"crf": "18", "g": "2", "bf": "0"}
PIXELS: Final = "yuv420p"
TOLERANCE_S: Final = 1e-4  # LeRobot's: how near a frame must be to its timestamp


class VideoWriter:
    """Writes the files of one camera."""

    def __init__(self, folder: Path, key: str, info: Info) -> None:
        """`info` gives the largest size of a file, the rate and the paths."""
        self._folder, self._key, self._info = folder, key, info
        self._place = (0, 0)
        self._container: Any = None
        self._stream: Any = None
        self._size: tuple[int, int] | None = None  # height, width
        self._frames = self._bytes = 0  # in this file
        self._from_frame = self._from_bytes = 0  # of this episode
        self._episode_bytes = 0  # of the one before

    def begin_episode(self) -> None:
        """Begin a new file, too, if another episode as large as the last would make this file too large."""
        if self._container and self._bytes + self._episode_bytes >= self._info.video_files_size_in_mb * MIB:
            self.close()
            self._place = next_file(*self._place, self._info.chunks_size)
        self._from_frame, self._from_bytes = self._frames, self._bytes

    def add(self, rgb_HWC: NDArray[np.uint8]) -> None:
        """Add a frame; InputError if its size is not that of the frames before, or cannot be encoded."""
        size = rgb_HWC.shape[0], rgb_HWC.shape[1]
        if self._size is None and (size[0] % 2 or size[1] % 2):
            raise InputError(
                f"{self._key}: expected an even width and height, for {PIXELS} video, got {size[1]} x {size[0]} pixels"
            )
        if self._size is not None and self._size != size:
            height, width = self._size
            raise InputError(
                f"{self._key}: expected {width} x {height} pixels as before, got {size[1]} x {size[0]}; convert bags "
                "with different image sizes into separate datasets"
            )
        if self._container is None:
            self._open(size)
        frame = av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24")
        frame.pts, frame.time_base = self._frames, Fraction(1, self._info.fps)
        self._mux(self._stream.encode(frame))
        self._frames += 1

    def end_episode(self) -> dict[str, int | float]:
        """What the episode's row says about this video."""
        self._episode_bytes = self._bytes - self._from_bytes
        prefix, fps = f"videos/{self._key}", self._info.fps
        return {
            f"{prefix}/chunk_index": self._place[0],
            f"{prefix}/file_index": self._place[1],
            f"{prefix}/from_timestamp": self._from_frame / fps,
            f"{prefix}/to_timestamp": self._frames / fps,
        }

    def close(self) -> None:
        if self._container is not None:
            self._mux(self._stream.encode())
            self._container.close()
            self._container = None
        self._frames = self._bytes = 0

    @property
    def feature(self) -> Feature:
        """The camera as meta/info.json describes it; known once a frame was added."""
        assert self._size is not None
        height, width = self._size
        info = {
            "video.height": height,
            "video.width": width,
            "video.codec": "h264",
            "video.pix_fmt": PIXELS,
            "video.fps": self._info.fps,
            "video.channels": 3,
            "has_audio": False,
            "video.g": int(OPTIONS["g"]),
            "video.crf": int(OPTIONS["crf"]),
            "is_depth_map": False,
        }
        return Feature(dtype="video", shape=(height, width, 3), names=["height", "width", "channels"], info=info)

    def _open(self, size: tuple[int, int]) -> None:
        self._size = size
        assert self._info.video_path is not None
        chunk_index, file_index = self._place
        name = self._info.video_path.format(video_key=self._key, chunk_index=chunk_index, file_index=file_index)
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(path), "w")
        self._stream = self._container.add_stream(CODEC, rate=self._info.fps, options=OPTIONS)
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = PIXELS

    def _mux(self, packets: Any) -> None:
        for packet in packets:
            self._bytes += packet.size
            self._container.mux(packet)


def read_frames(path: Path, from_s: float, count: int, fps: int) -> Iterator[NDArray[np.uint8]]:
    """`count` images [H, W, 3], at the times `from_s + i / fps`; InputError if one is missing."""
    if not path.is_file():
        raise InputError(f"video {path}: the episodes name it, but there is no such file")
    done = 0
    try:
        with av.open(str(path)) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None:
                raise InputError(f"video {path}: expected a stream of images, got a file without")
            if (tick_s := stream.time_base) is None:
                raise InputError(f"video {path}: expected a stream with a time base, got one without")
            if from_s > 0:
                container.seek(round(from_s / tick_s), stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts is None:
                    raise InputError(f"video {path}: expected frames with times, got one without")
                time_s, due_s = float(frame.pts * tick_s), from_s + done / fps
                if time_s < due_s - TOLERANCE_S:
                    continue  # the key frame that decoding starts at may lie before the episode
                if time_s > due_s + TOLERANCE_S:
                    break
                yield np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
                done += 1
                if done == count:
                    return
    except (av.FFmpegError, OverflowError, UnicodeDecodeError, ZeroDivisionError) as error:  # its names and times, too
        raise InputError(f"video {path}: {error}") from error
    raise InputError(
        f"video {path}: expected {count} frames at {fps} per second from {from_s:g} s on, but there is none at "
        f"{from_s + done / fps:g} s; is the file whole?"
    )
