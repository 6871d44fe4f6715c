"""The mp4 files of a dataset: frames of many episodes one after another, frame n at n / fps seconds.

H.264 at a quality (crf 18) that keeps simulated images of 288 pixels at 40 dB on average. Where width or height is odd,
pixels are yuv444p, as yuv420p has one colour for two by two pixels. Every second frame is a key
frame, as in LeRobot's own files, so that a frame can be read without decoding many others. No frame refers to a later
one, so that the first frame's time is 0.

Or images that were recorded as JPEG are put into the file as they are (Motion JPEG): nothing is lost, and a reader gets
the pixels that the node got.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal

import av
import numpy as np
import simplejpeg
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError
from ki_vla_ros.messages import decode_compressed
from training.data.lerobot.layout import MIB, Feature, Info, next_file
from training.data.lerobot.tables import is_pointer

CODEC: Final = "libx264"
# The slower presets make smaller files, not better ones, and files that take longer to read (docs/results/data.md).
OPTIONS: Final = {"crf": "18", "g": "2", "bf": "0", "preset": "ultrafast"}
PIXELS, PIXELS_ODD = "yuv420p", "yuv444p"
JPEG: Final = "mjpeg"
JPEG_BEGIN: Final = b"\xff\xd8"
Video = Literal["h264", "jpeg"]
# How near a frame must be to its time, in frames. Some writers note when it was taken. And where LeRobot has put many
# episodes into one video, the times that it notes for them drift from those in the file (its issue 3177), by more than
# the 0.1 ms that it bears itself.
TOLERANCE: Final = 0.25


class VideoWriter:
    """Writes the files of one camera."""

    def __init__(self, folder: Path, key: str, info: Info, video: Video = "h264") -> None:
        """`info` gives the largest size of a file, the rate and the paths; `video`: encode, or keep recorded JPEGs."""
        self._folder, self._key, self._info, self._video = folder, key, info, video
        self._pixels = PIXELS
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

    def add(self, rgb_HWC: NDArray[np.uint8], file: bytes | None = None) -> None:
        """Add a frame, with the `file` that it was recorded as, if any.

        InputError if its size is not that of the frames before, or it is no colour image, or no JPEG to be kept.
        """
        if rgb_HWC.dtype != np.uint8 or rgb_HWC.ndim != 3 or rgb_HWC.shape[2] != 3:
            got = f"{' x '.join(map(str, rgb_HWC.shape))} {rgb_HWC.dtype}"
            raise InputError(f"{self._key}: expected a colour image, height x width x 3 uint8, got {got}")
        size = rgb_HWC.shape[0], rgb_HWC.shape[1]
        pixels = PIXELS_ODD if size[0] % 2 or size[1] % 2 else PIXELS
        if self._video == "jpeg":
            pixels = self._pixels_of(file)
        if self._size is not None and (self._size, self._pixels) != (size, pixels):
            (height, width), form = self._size, "" if self._pixels == pixels else f" in {pixels}, not {self._pixels}"
            raise InputError(
                f"{self._key}: expected {width} x {height} pixels as before, got {size[1]} x {size[0]}{form}; convert "
                "bags with different images into separate datasets"
            )
        if self._container is None:
            self._open(size, pixels)
        frame: Any = av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24") if self._video == "h264" else av.Packet(file)
        frame.pts, frame.time_base = self._frames, 1 / Fraction(self._info.fps)
        if self._video == "h264":
            self._mux(self._stream.encode(frame))
        else:
            frame.dts, frame.duration, frame.stream, frame.is_keyframe = frame.pts, 1, self._stream, True
            self._mux([frame])
        self._frames += 1

    def _pixels_of(self, file: bytes | None) -> str:
        """The pixel format of a JPEG; InputError if it is none."""
        if file is None or file[:2] != JPEG_BEGIN:
            raise InputError(
                f"{self._key}: expected images recorded as JPEG, to keep them as they are, got "
                f"{'raw images' if file is None else 'other files'}; take --video h264"
            )
        *_, colours, sampling = simplejpeg.decode_jpeg_header(file)
        return "gray" if colours == "Gray" else f"yuvj{sampling}p"

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
            "video.codec": "h264" if self._video == "h264" else JPEG,
            "video.pix_fmt": self._pixels,
            "video.fps": self._info.fps,
            "video.channels": 3,
            "has_audio": False,
            "video.g": int(OPTIONS["g"]) if self._video == "h264" else 1,
            "is_depth_map": False,
        }
        if self._video == "h264":
            info["video.crf"] = int(OPTIONS["crf"])
        return Feature(dtype="video", shape=(height, width, 3), names=["height", "width", "channels"], info=info)

    def _open(self, size: tuple[int, int], pixels: str) -> None:
        self._size, self._pixels = size, pixels
        assert self._info.video_path is not None
        chunk_index, file_index = self._place
        name = self._info.video_path.format(video_key=self._key, chunk_index=chunk_index, file_index=file_index)
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(path), "w")
        codec, options = (CODEC, OPTIONS) if self._video == "h264" else (JPEG, {})
        self._stream = self._container.add_stream(codec, rate=Fraction(self._info.fps), options=options)
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = pixels
        # As many bags are converted at once as there are cores; and the file is the same on any machine.
        self._stream.codec_context.thread_count = 1

    def _mux(self, packets: Any) -> None:
        for packet in packets:
            self._bytes += packet.size
            self._container.mux(packet)


def read_frames(path: Path, from_s: float, count: int, fps: float) -> Iterator[NDArray[np.uint8]]:
    """`count` images [H, W, 3], at the times `from_s + i / fps`; InputError if one is missing or holds no colour."""
    with VideoReader(path) as video:
        for i in range(count):
            try:
                yield video.read(from_s + i / fps, TOLERANCE / fps)
            except NoFrameError as error:
                raise InputError(
                    f"video {path}: expected {count} frames at {fps} per second from {from_s:g} s on, but there is "
                    f"none at {error.due_s:g} s; is the file whole?"
                ) from None


class NoFrameError(InputError):
    """A video has no frame at a time."""

    def __init__(self, path: Path, due_s: float) -> None:
        super().__init__(f"video {path}: expected a frame at {due_s:g} s, got none; is the file whole?")
        self.due_s = due_s


class VideoReader:
    """The frames of one video at any times, best asked for in the order of time; InputError if it is none.

    It decodes from the key frame before the one that is asked for, or goes on from the last one, whichever is shorter.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        """`threads` decode; 0: as many as there are cores. A process that is forked may not have any."""
        self.path = path
        if not path.is_file():
            raise InputError(f"video {path}: the episodes name it, but there is no such file; is the copy whole?")
        with self._named():
            self._container = av.open(str(path))
            stream = next(iter(self._container.streams.video), None)
            if stream is None:
                raise InputError(f"video {path}: expected a stream of images, got a file without")
            if stream.codec_context is None:  # typed as if it always had one
                raise InputError(f"video {path}: expected a codec that this FFmpeg decodes, got another")
            if stream.time_base is None:
                raise InputError(f"video {path}: expected a stream with a time base, got one without")
            self._stream, self._tick_s = stream, stream.time_base
            stream.codec_context.thread_count = threads
            self._reformatter = VideoReformatter()
            self._frames = _frames(self._container, stream)
            self._frame: Any = None  # the last one that was decoded
            self._time_s = -math.inf  # its time

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        # The frame has a scaler with threads of its own; none of them may be left when a process is forked.
        self._frame, self._time_s = None, -math.inf
        self._frames = iter(())
        self._container.close()

    def read(self, due_s: float, tolerance_s: float) -> NDArray[np.uint8]:
        """The image [H, W, 3] at this time; NoFrameError if there is none, InputError if it is broken, or no colour."""
        low_s, high_s = due_s - tolerance_s, due_s + tolerance_s
        with self._named():
            # In order, frames follow at once. Else the key frame found may be the one asked for: hence up to `high_s`.
            follows = 0.0 <= due_s - self._time_s < 6.0 * tolerance_s
            if self._time_s > high_s or (not follows and self._key_s(high_s) > max(self._time_s, 0.0)):
                self._seek(high_s)
            back_s = 0.1
            while True:
                while self._time_s < low_s and self._decode_next():
                    pass
                if low_s <= self._time_s <= high_s:
                    return _pixels(f"video {self.path}", self._frame, self._reformatter)
                if low_s - back_s < -1.0:
                    raise NoFrameError(self.path, due_s)
                # Where frames refer to later ones, a key frame is decoded before, and shown after the one asked for.
                self._seek(low_s - back_s)
                back_s *= 4.0

    def _decode_next(self) -> bool:
        self._frame = next(self._frames, None)
        if self._frame is None:
            self._time_s = math.inf
        elif self._frame.pts is None:
            raise InputError(f"video {self.path}: expected frames with times, got one without")
        else:
            self._time_s = float(self._frame.pts * self._tick_s)
        return self._frame is not None

    def _key_s(self, time_s: float) -> float:
        """When the last key frame before a time is decoded; -inf: there is none, the time itself: nobody knows."""
        entries = getattr(self._stream, "index_entries", None)  # of later versions of av than some have
        if not entries:
            return time_s
        place = entries.search_timestamp(round(time_s / self._tick_s))
        return float(entries[place].timestamp * self._tick_s) if place >= 0 else -math.inf

    def _seek(self, time_s: float) -> None:
        self._container.seek(max(0, round(time_s / self._tick_s)), stream=self._stream, backward=True)
        self._frames, self._frame, self._time_s = _frames(self._container, self._stream), None, -math.inf

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors that name the file."""
        try:
            yield
        except (av.FFmpegError, OverflowError, UnicodeDecodeError, ZeroDivisionError) as error:  # its names and times
            if is_pointer(self.path):
                raise InputError(
                    f"video {self.path}: expected a video, got git-lfs's pointer to it; run 'git lfs pull'"
                ) from None
            raise InputError(f"video {self.path}: {error}") from error


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames; for JPEGs that are whole files, packets: they are decoded as the node decodes them."""
    for packet in container.demux(stream):
        if stream.codec_context.name == JPEG and bytes(memoryview(packet)[:2]) == JPEG_BEGIN:
            yield packet
        else:
            yield from packet.decode()


def _pixels(where: str, frame: Any, reformatter: VideoReformatter) -> NDArray[np.uint8]:
    if isinstance(frame, av.Packet):
        return decode_compressed(where, bytes(frame))
    if frame.format.name.startswith("gray"):
        raise InputError(f"{where}: expected colour, got {frame.format.name}, as depth has")
    # With one for all frames the same pixels take a third of the time: it keeps its tables.
    return np.asarray(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray(), dtype=np.uint8)
