"""A policy in an environment: it sees, makes a chunk of actions, executes the first of them, and sees again.

There is no delay and no robot's loop here (for the simulated arm closed_loop.py has both): what counts is what the
policy wants. The trainer calls `roll_out` during training, `python -m training.evaluate` for a bundle.

Legend: H horizon, D actions, S state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy import Policy, make_model_input
from ki_vla_ros.records import CameraFrame, Observation
from ki_vla_ros.robot import Robot, disagreements
from ki_vla_ros.statistics import wilson_95
from training.evaluate.environment import Environment

Images = Mapping[str, NDArray[np.uint8]]
Act = Callable[[Images, NDArray[np.float64], str, int], NDArray[np.float64]]
"""Images by camera, the state [S], the instruction and a number that no other chunk has -> actions [H, D].

Actions with NaN are no chunk: what a model said in tokens stood for none.
"""

CHUNKS: Final = 1 << 16  # more than an episode has
MOST_FILMED_PER_S: Final = 25
TILE: Final = 240  # height of a film's images, in pixels
HEADER: Final = 32


def act_as(policy: Policy) -> Act:
    """The robot's own policy as an `Act`: what the node computes before it makes a path of the actions."""

    def act(images: Images, state_S: NDArray[np.float64], instruction: str, number: int) -> NDArray[np.float64]:
        frames = {name: CameraFrame(name, 0, image) for name, image in images.items()}
        bundle = policy.bundle
        model_input = make_model_input(bundle.manifest, bundle.tokenizer, Observation(0, frames, state_S), instruction)
        actions_HA = policy.denoise(policy.prefill(model_input), policy.noise(number), model_input.state_S)
        return policy.actions(actions_HA, state_S)

    return act


def check_robot(trained: Robot, environment: Environment, name: str) -> None:
    """ConfigurationError unless the environment shows and takes what the policy was trained on."""
    faults = [str(d) for d in disagreements(trained, environment.robot) if d.place[0] not in ("cameras", "horizon")]
    shown = environment.robot.camera_names
    faults += [
        f"camera {camera.name} in the bundle, {', '.join(shown)} in the robot file"
        for camera in trained.cameras
        if camera.name not in shown and not camera.optional
    ]
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ConfigurationError(
            f"environment {name}: expected the robot of the bundle, {trained.name}, got {environment.robot.name}: "
            f"{'; '.join(faults[:3])}{more}"
        )


def roll_out(
    act: Act,
    environment: Environment,
    seeds: Sequence[int],
    execute: int | None = None,
    films: Mapping[int, Path] | None = None,
    report: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """One episode for each seed. `execute`: how many actions of a chunk are executed; left out: half of them.

    Returns `episodes`, `successes`, `success_rate` with `success_95` (Wilson), `mean_seconds` of simulated time until
    success (None: there was none), `failed_seeds`, and `malformed`: how many of them ended because `act` had no chunk.
    `films`: where to put the mp4 of an episode, by seed; `report` gets the number of episodes that are done.
    """
    failed, seconds, malformed = [], [], 0
    for done, seed in enumerate(seeds):
        taken_s, without_chunk = _run(act, environment, seed, execute, (films or {}).get(seed))
        malformed += without_chunk
        if taken_s is None:
            failed.append(seed)
        else:
            seconds.append(taken_s)
        report(done + 1)
    return {
        "episodes": len(seeds),
        "successes": len(seconds),
        "success_rate": len(seconds) / len(seeds),
        "success_95": wilson_95(len(seconds), len(seeds)),
        "mean_seconds": float(np.mean(seconds)) if seconds else None,
        "failed_seeds": failed,
        "malformed": malformed,
    }


def _run(
    act: Act, environment: Environment, seed: int, execute: int | None, film: Path | None
) -> tuple[float | None, bool]:
    """Simulated seconds until success, None if there was none, and whether the policy had no chunk.

    Without one, a robot would hold, see the same again, and be told the same: so the episode ends.
    """
    environment.reset(seed)
    period_s = environment.robot.action_period_s
    limit = round(environment.time_limit_s / period_s)
    every = max(1, round(1.0 / (period_s * MOST_FILMED_PER_S)))
    pictures, number, step, malformed = [], 0, 0, False
    while step < limit and not environment.over:
        images, state_S = environment.observe()
        actions_HD = act(images, state_S, environment.instruction, seed * CHUNKS + number)
        number += 1
        if malformed := bool(np.isnan(actions_HD).any()):
            break
        if (execute or 1) > len(actions_HD):
            raise ConfigurationError(f"execute: expected at most {len(actions_HD)}, the horizon, got {execute}")
        for action_D in actions_HD[: execute or max(1, len(actions_HD) // 2)]:
            if film is not None and step % every == 0:
                pictures.append(_picture(environment))
            environment.step(action_D)
            step += 1
            if environment.over or step == limit:
                break
    if film is not None:
        _write_film(film, [*pictures, _picture(environment)], 1.0 / (period_s * every))
    return step * period_s if environment.success else None, malformed


def _picture(environment: Environment) -> NDArray[np.uint8]:
    """All images beside each other below the instruction, [H, W, 3]."""
    tiles = []
    for image in environment.observe()[0].values():
        width = 2 * round(image.shape[1] / image.shape[0] * TILE / 2)  # even, as the video's colours need it
        tiles.append(cv2.resize(image, (width, TILE), interpolation=cv2.INTER_AREA))
    row = np.concatenate(tiles, axis=1)
    header = np.zeros((HEADER, row.shape[1], 3), dtype=np.uint8)
    text = environment.instruction + (": done" if environment.success else "")
    font, (width, _) = cv2.FONT_HERSHEY_DUPLEX, cv2.getTextSize(text, cv2.FONT_HERSHEY_DUPLEX, 0.5, 1)[0]
    size = 0.5 * min(1.0, (row.shape[1] - 16) / width)
    cv2.putText(header, text, (8, 21), font, size, (245, 245, 245), 1, cv2.LINE_AA)
    return np.concatenate([header, row])


def _write_film(path: Path, pictures: Sequence[NDArray[np.uint8]], per_s: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        rate = Fraction(per_s).limit_denominator(1000)
        stream: Any = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "24"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
