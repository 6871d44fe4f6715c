"""What a client calls the parts of an observation, and how it becomes ours.

Every client has names of its own: openpi's of DROID sends `observation/wrist_image_left`, that of ALOHA a map `images`
with `cam_high` in it. Maps within maps and names with slashes are the same here. A file in config/serve/ says which
camera and which part of the state is what.

Legend: S state, D dimensions of an action.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ki_vla_ros.errors import ConfigurationError, InputError, did_you_mean, short_repr
from ki_vla_ros.policy import resize_with_pad
from ki_vla_ros.records import CameraFrame, Observation
from ki_vla_ros.robot import Frozen, Name, Robot
from ki_vla_ros.share import expand, find_share
from ki_vla_ros.yaml_file import read_yaml

LARGEST_SIDE: Final = 2048  # of an image, in pixels
LARGEST_NUMBER: Final = 1e9  # of a state or an action, in whatever unit; larger ones do not fit a model's float32
RUNNING: Final = "running"  # key of the chunk that a client's arm executes (running.py)
DEEPEST: Final = 4  # maps within maps of an observation
Key = Annotated[str, Field(min_length=1, max_length=256)]


class Keys(Frozen):
    """One client's names."""

    cameras: dict[Name, Key] = Field(description="key of the image, by the robot file's name of the camera")
    state: dict[Key, Annotated[int, Field(ge=1)]] = Field(
        description="how many numbers each key has, in the order of the robot file's state"
    )
    prompt: Key = Field(default="prompt", description="key of the instruction")
    ignored: tuple[Key, ...] = Field(default=(), description="keys that may come and are not used")
    layout: Literal["HWC", "CHW"] = Field(default="HWC", description="order of an image's axes")
    nested: bool = Field(default=False, description="a server gets maps within maps in place of keys with slashes")
    units: Literal["robot", "dataset"] = Field(
        default="dataset", description="of state and actions: the robot file's own, or its datasets'"
    )

    def check(self, robot: Robot) -> None:
        """ConfigurationError unless these are keys of this robot."""
        for name in self.cameras.keys() - set(robot.camera_names):
            raise ConfigurationError(
                f"cameras: expected those of robot {robot.name!r} ({', '.join(robot.camera_names)}), got {name!r}"
                f"{did_you_mean(name, robot.camera_names)}"
            )
        for camera in robot.cameras:
            if not camera.optional and camera.name not in self.cameras:
                raise ConfigurationError(
                    f"cameras: expected a key for {camera.name!r}, which is not optional, got none"
                )
        if sum(self.state.values()) != len(robot.state):
            raise ConfigurationError(
                f"state: expected {len(robot.state)} numbers, those of robot {robot.name!r}, got "
                f"{sum(self.state.values())}"
            )
        known = [*self.cameras.values(), *self.state, self.prompt, *self.ignored]
        if twice := sorted({key for key in known if known.count(key) > 1}):
            raise ConfigurationError(f"expected each key once, got {', '.join(twice)} more than once")
        for key in known:
            if key.partition("/")[0] == RUNNING:
                raise ConfigurationError(f"expected no key {key}: {RUNNING} is the running chunk's (docs/serve.md)")
            if inner := [other for other in known if other.startswith(f"{key}/")]:
                raise ConfigurationError(f"expected {key} to be a value, got it as the map of {inner[0]}, too")

    def observation(self, message: Any, robot: Robot, instruction: str = "") -> tuple[Observation, str]:
        """What a client sent as our record, and its instruction, or `instruction` if it sent none.

        InputError names the key, what was expected and what was got.
        """
        parts = flatten(message)
        known = [*self.cameras.values(), *self.state, self.prompt]
        for key in parts:
            if key not in known and key not in self.ignored:
                if inner := [other for other in known if other.startswith(f"{key}/")]:
                    raise InputError(
                        f"{key!r}: expected a map, or in its place {', '.join(inner)}, got {_kind(parts[key])}"
                    )
                raise InputError(f"{key!r}: expected only {', '.join(known)}{did_you_mean(key, known)}")
        frames = {}
        for camera in robot.cameras:
            place = self.cameras.get(camera.name)  # none: an optional camera that this client does not know
            if place is not None and place in parts:
                frames[camera.name] = CameraFrame(camera.name, 0, self._image(place, parts[place]))
            elif place is not None and not camera.optional:
                raise _missing(place, "an image", parts)
        state_S = np.concatenate([self._numbers(key, size, parts) for key, size in self.state.items()])
        if self.units == "dataset":
            state_S = robot.state_lines.to_robot(state_S)
        text = parts.get(self.prompt, instruction)
        if not isinstance(text, str):
            raise InputError(f"{self.prompt!r}: expected a text, got {_kind(text)}")
        if not text:
            raise _missing(self.prompt, "an instruction", parts)
        return Observation(0, frames, state_S), text

    def message(
        self, observation: Observation, instruction: str, robot: Robot, size: int | None = None
    ) -> dict[str, Any]:
        """The inverse of `observation`: what to send; images as they are, or fitted into `size` x `size` pixels."""
        parts: dict[str, Any] = {self.prompt: instruction}
        for name, key in self.cameras.items():
            if name in observation.frames:
                image = observation.frames[name].rgb_HWC
                if size is not None:
                    image = resize_with_pad(image, size)
                parts[key] = image if self.layout == "HWC" else np.ascontiguousarray(image.transpose(2, 0, 1))
        state_S = observation.state_S
        if self.units == "dataset":
            state_S = robot.state_lines.to_foreign(state_S)
        at = 0
        for key, count in self.state.items():
            parts[key] = state_S[at : at + count]
            at += count
        return nest(parts) if self.nested else parts

    def robot_actions(self, actions_HD: NDArray[np.float64], robot: Robot) -> NDArray[np.float64]:
        """The inverse of `actions`."""
        return robot.action_lines.to_robot(actions_HD) if self.units == "dataset" else actions_HD

    def actions(self, actions_HD: NDArray[np.float64], robot: Robot) -> NDArray[np.float64]:
        """Actions in the units of the client."""
        return robot.action_lines.to_foreign(actions_HD) if self.units == "dataset" else actions_HD

    def expected(self, robot: Robot) -> dict[str, str]:
        """For people: what each key takes."""
        shape = "[height, width, 3]" if self.layout == "HWC" else "[3, height, width]"
        optional = {camera.name for camera in robot.cameras if camera.optional}
        images = {key: f"uint8 {shape}{', optional' if name in optional else ''}" for name, key in self.cameras.items()}
        return {**images, **{key: f"float [{size}]" for key, size in self.state.items()}, self.prompt: "text"}

    def meaning(self, robot: Robot) -> dict[str, Any]:
        """For programs: what the numbers of a policy of this robot are."""
        return {
            "units": self.units,
            "state": [dimension.name for dimension in robot.state],
            "actions": [action.name for action in robot.actions],
            "action_period_s": robot.action_period_s,
        }

    def _image(self, key: str, image: Any) -> NDArray[np.uint8]:
        at = 2 if self.layout == "HWC" else 0
        if (
            not isinstance(image, np.ndarray)
            or image.dtype != np.uint8
            or image.ndim != 3
            or image.shape[at] != 3
            or min(image.shape) == 0
        ):
            shape = "[height, width, 3]" if at else "[3, height, width]"
            raise InputError(f"{key!r}: expected an image, uint8 {shape}, got {_kind(image)}")
        if max(image.shape) > LARGEST_SIDE:
            raise InputError(
                f"{key!r}: expected an image of at most {LARGEST_SIDE} x {LARGEST_SIDE} pixels, got {_kind(image)}; "
                "shrink it before sending"
            )
        return image if at else np.ascontiguousarray(image.transpose(1, 2, 0))

    def _numbers(self, key: str, size: int, parts: dict[str, Any]) -> NDArray[np.float64]:
        if key not in parts:
            raise _missing(key, f"{size} numbers", parts)
        given = parts[key]
        values = given if isinstance(given, np.ndarray) else _plain_numbers(given)
        if values is None or values.dtype.kind not in "fiu" or values.ndim > 1 or values.size != size:
            raise InputError(f"{key!r}: expected {size} numbers, got {_kind(given)}")
        numbers = np.asarray(values, dtype=np.float64).reshape(size)
        if not np.all(np.abs(numbers) < LARGEST_NUMBER):
            raise InputError(f"{key!r}: expected numbers within {LARGEST_NUMBER:g}, got {short_repr(numbers.tolist())}")
        return numbers


def open_keys(keys: str, robot: Robot) -> Keys:
    """The keys of a name or a file: `robot` stands for the robot file's own names."""
    return named_keys(robot) if keys == "robot" else read_keys(find_keys(keys), robot)


def named_keys(robot: Robot) -> Keys:
    """The robot file's own names: `images/CAMERA`, `state/DIMENSION` and `prompt`, in the robot's units."""
    cameras = {camera.name: f"images/{camera.name}" for camera in robot.cameras}
    return Keys(cameras=cameras, state={f"state/{dimension.name}": 1 for dimension in robot.state}, units="robot")


def find_keys(keys: str) -> Path:
    """The file as given, or the one in config/serve/ of this name; ConfigurationError if it has none."""
    path = expand(keys)
    if path.name != keys or path.suffix:
        return path
    folder = find_share("config/serve")
    if not (known := folder / f"{keys}.yaml").exists():
        names = ["robot", *sorted(file.stem for file in folder.glob("*.yaml"))]
        raise ConfigurationError(
            f"--keys: expected a file or one of {', '.join(names)}, got {keys!r}{did_you_mean(keys, names)}"
        )
    return known


def read_keys(path: Path, robot: Robot) -> Keys:
    """Read a file of keys, and check that it is one for this robot; ConfigurationError names the file."""
    keys = read_yaml(path, Keys, "keys", "config/serve/")
    try:
        keys.check(robot)
    except ConfigurationError as error:
        raise ConfigurationError(f"keys {path}: {error}; config/serve/ has examples") from None
    return keys


def flatten(message: Any) -> dict[str, Any]:
    """Maps within maps as one, with slashes in its keys; InputError for what is no map, or too deep."""
    if not isinstance(message, dict):
        raise InputError(f"observation: expected a map of keys and values, got {_kind(message)}")
    parts: dict[str, Any] = {}
    for key, value in _leaves(message, ""):
        if key in parts:
            raise InputError(f"{key!r}: expected once, got it as a map in a map, and with slashes")
        parts[key] = value
    return parts


def nest(parts: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    message: dict[str, Any] = {}
    for key, value in parts.items():
        *outer, name = key.split("/")
        inside = message
        for part in outer:
            inside = inside.setdefault(part, {})
        inside[name] = value
    return message


def _leaves(message: dict[Any, Any], before: str, depth: int = 1) -> Iterator[tuple[str, Any]]:
    if depth > DEEPEST:
        raise InputError(f"{before[:-1]!r}: expected maps within maps of at most {DEEPEST} levels, got more")
    for key, value in message.items():
        if not isinstance(key, str):
            raise InputError(f"observation: expected keys that are texts, got {short_repr(key)}")
        if isinstance(value, dict):
            yield from _leaves(value, f"{before}{key}/", depth + 1)
        else:
            yield f"{before}{key}", value


def _plain_numbers(value: Any) -> NDArray[np.float64] | None:
    """A number, or a list of them, that did not come as an array; None if it is neither."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(number, float | int | np.number) and not isinstance(number, bool) for number in values):
        return None
    return np.array(values, dtype=np.float64)


def _missing(key: str, what: str, parts: dict[str, Any]) -> InputError:
    return InputError(f"{key!r}: expected {what}, got none; the message has {short_repr(sorted(parts))}")


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} {short_repr(value)}"
