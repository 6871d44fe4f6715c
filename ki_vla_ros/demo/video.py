"""The demo's film, made from the recorded bag after the run: both cameras, instruction, verdict, predicted chunk.

Every pair of images becomes one frame. The newest chunk is drawn into the scene as the predicted path of the
fingertips. Legend: H horizon, X pixel coordinates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bags import open_bag
from ki_vla_ros.demo.driver import CHUNK, INSTRUCTION, SCENE_IMAGE, STATUS, WRIST_IMAGE
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.messages import BagMessage, camera_frame, decode
from ki_vla_ros.records import CameraFrame, header_ns, time_to_ns
from ki_vla_ros.sim import World, joints_to_tip, sample_scene

FRAMES_PER_S: Final = 20
LONGEST_GAP_MS: Final = 500
SIDE: Final = 480
HEADER: Final = 60
FONT: Final = cv2.FONT_HERSHEY_DUPLEX
# Colours are in the order blue, green, red.
INK, PALE, GROUND = (245, 245, 245), (160, 160, 160), (28, 21, 16)
GOOD, BAD = (110, 200, 80), (110, 90, 235)
PATH, PATH_EDGE = (40, 150, 255), (20, 20, 20)

Picture = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class FilmFrame:
    """One picture of the film (HWC, BGR) and when its images were taken."""

    stamp_ns: int
    picture: Picture


@dataclass(slots=True)
class Film:
    """The film's state at one moment of the bag."""

    episodes: int
    projector: World
    instruction: str = ""
    status: dict[str, Any] = field(default_factory=dict)
    episode: int = 0
    scene: CameraFrame | None = None  # the scene camera's newest frame
    path_HX: NDArray[np.float64] | None = None  # the chunk's tip positions, pixels right and down
    due_H: NDArray[np.int64] | None = None  # when each is due, ns

    def see(self, message: BagMessage) -> FilmFrame | None:
        """Takes in one message; returns a frame if it completes the images of one instant within an episode."""
        if message.topic == STATUS:
            self.status = json.loads(decode(message).data)
        elif message.topic == INSTRUCTION:  # one per episode
            self.instruction = decode(message).data
            self.episode += 1
            self.path_HX = self.due_H = None
        elif message.topic == CHUNK:
            self._see_chunk(decode(message))
        elif message.topic == SCENE_IMAGE:
            self.scene = camera_frame(message, "scene")
        elif self.scene is not None and self.instruction:  # the wrist's image is published after the scene's
            wrist = camera_frame(message, "wrist")
            if wrist.stamp_ns == self.scene.stamp_ns:
                return FilmFrame(wrist.stamp_ns, self._compose(_picture(self.scene), _picture(wrist), wrist.stamp_ns))
        return None

    def _see_chunk(self, message: Any) -> None:
        order = [message.joint_names.index(name) for name in self.projector.joints]
        position_HJ = np.array([point.positions for point in message.points])[:, order]
        self.path_HX = np.array([self.projector.project("scene", tip) for tip in joints_to_tip(position_HJ)])
        offsets = [time_to_ns(point.time_from_start) for point in message.points]
        self.due_H = header_ns(message) + np.array(offsets)

    def _compose(self, scene: Picture, wrist: Picture, stamp_ns: int) -> Picture:
        frame = np.empty((HEADER + SIDE, 2 * SIDE, 3), dtype=np.uint8)
        frame[:HEADER] = GROUND
        left = frame[HEADER:, :SIDE]
        left[:] = cv2.resize(scene, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        frame[HEADER:, SIDE:] = cv2.resize(wrist, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        if self.path_HX is not None and self.due_H is not None:
            _draw_path(left, self.path_HX[self.due_H >= stamp_ns])
        _write(frame, "predicted chunk", (SIDE - 130, HEADER + SIDE - 12), 0.45, PATH)
        _write(frame, f"{self.episode}/{self.episodes}", (16, 39), 0.6, PALE)
        _write(frame, self.instruction, (96, 40), 0.8, INK)
        if self.status.get("done"):
            self._draw_verdict(frame)
        for text, x in (("scene camera", 10), ("wrist camera", SIDE + 10)):
            _write(frame, text, (x, HEADER + SIDE - 12), 0.45, INK)
        return frame

    def _draw_verdict(self, frame: Picture) -> None:
        success, reached = self.status["success"], self.status["reached"]
        if success:
            corners = np.array([[2 * SIDE - 44, 30], [2 * SIDE - 35, 40], [2 * SIDE - 17, 19]])
            cv2.polylines(frame, [corners], False, GOOD, 5, cv2.LINE_AA)
            _write(frame, "success", (2 * SIDE - 160, 39), 0.7, GOOD)
            return
        text = "time is up"
        if reached is not None:
            wrong = self.status["objects"][reached]
            text = f"reached the {wrong['colour']} {wrong['shape']}"
        (width, _), _ = cv2.getTextSize(text, FONT, 0.7, 1)
        _write(frame, text, (2 * SIDE - 18 - width, 39), 0.7, BAD)


def make_video(bag: Path, path: Path, episodes: int) -> int:
    """Writes the film of `bag` to `path` (H.264 in mp4); returns its number of frames."""
    av = import_av()
    projector = World(render_size=SIDE, render=False)
    projector.reset(sample_scene(0, split="all"))  # camera poses are known only in a world with a scene
    count, time_ms, before_ns = 0, 0, 0
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_S, options={"preset": "veryfast", "crf": "24"})
        stream.width, stream.height, stream.pix_fmt = 2 * SIDE, HEADER + SIDE, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for frame in frames(bag, Film(episodes, projector)):
            picture = av.VideoFrame.from_ndarray(frame.picture, format="bgr24")
            # Real time, even where images were lost; the pauses between episodes are cut.
            time_ms += min(LONGEST_GAP_MS, max(1, (frame.stamp_ns - before_ns) // 1_000_000)) if count else 0
            picture.pts, picture.time_base, before_ns = time_ms, Fraction(1, 1000), frame.stamp_ns
            container.mux(stream.encode(picture))
            count += 1
        container.mux(stream.encode())
    return count


def frames(bag: Path, film: Film) -> Iterator[FilmFrame]:
    """The frames that `film` makes of the bag."""
    with open_bag(bag) as opened:
        for message in opened.messages((STATUS, INSTRUCTION, CHUNK, SCENE_IMAGE, WRIST_IMAGE)):
            if (frame := film.see(message)) is not None:
                yield frame


def import_av() -> Any:
    """PyAV, which encodes the film; ConfigurationError if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise ConfigurationError(
            f"no video without PyAV ({error}); run 'pip install av', or the demo with --no-video"
        ) from error
    return av


def _picture(frame: CameraFrame) -> Picture:
    return np.asarray(cv2.cvtColor(frame.rgb_HWC, cv2.COLOR_RGB2BGR), dtype=np.uint8)


def _draw_path(picture: Picture, path_HX: NDArray[np.float64]) -> None:
    """Draws the path with dots that shrink the farther ahead they are; a dark edge keeps it visible on any colour."""
    shift = 4  # fractional bits of OpenCV's coordinates
    points = np.round(path_HX * 2**shift).astype(int)
    for colour, extra in ((PATH_EDGE, 2), (PATH, 0)):
        cv2.polylines(picture, [points.reshape(-1, 1, 2)], False, colour, 2 + extra, cv2.LINE_AA, shift)
        for k, (u, v) in enumerate(points):
            radius = round((4.5 - 2.5 * k / max(1, len(points) - 1) + extra / 2) * 2**shift)
            cv2.circle(picture, (int(u), int(v)), radius, colour, -1, cv2.LINE_AA, shift)


def _write(picture: Picture, text: str, place: tuple[int, int], size: float, colour: tuple[int, int, int]) -> None:
    cv2.putText(picture, text, place, FONT, size, colour, 1, cv2.LINE_AA)
