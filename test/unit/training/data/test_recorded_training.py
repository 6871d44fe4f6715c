"""A recorded dataset in training: chunks, images and tasks as `RobotFrames` takes them, and a step with every loss."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.sample_bags import JOINTS, START_NS, recording, where, write_bag

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy.preprocess import normalize, tokenize
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.robot import Robot, find_robot, read_robot
from training.config import TrainingConfig
from training.convert.__main__ import main
from training.data.batch import NO_TARGET, ChunkTiming
from training.data.lerobot.arrays import load_dataset, load_recorded, make_chunks
from training.data.lerobot.dataset import Dataset
from training.run import Run

HORIZON, PERIOD_S = 16, 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of the demo's robot at 20 Hz."""
    folder = tmp_path_factory.mktemp("recorded")
    bag = write_bag(folder / "bag", recording())
    out, arguments = folder / "dataset", ["--bundle", "demo", "--fps", "20", "--actions", "states"]
    assert main(["from-bag", str(bag), *arguments, "--out", str(out)]) == 0
    return out


def load(folder: Path, **how: object) -> dict[str, np.ndarray]:
    sizes = {"cameras": ("wrist", "scene"), "image_size": 96, "horizon": HORIZON, "period_s": PERIOD_S}
    return load_dataset(Dataset(folder), **(sizes | how))  # type: ignore[arg-type]


def test_arrays_are_the_frames_their_images_and_what_the_arm_did_next(folder: Path) -> None:
    dataset, arrays = Dataset(folder), load(folder)
    (episode,) = dataset.episodes
    stamp_N = dataset.columns(episode)["stamp_ns"][: episode.length - HORIZON + 1]
    assert {name: (array.shape, array.dtype.kind) for name, array in arrays.items()} == {
        "images": ((len(stamp_N), 2, 96, 96, 3), "u"),
        "state": ((len(stamp_N), 7), "f"),
        "chunk": ((len(stamp_N), HORIZON, 7), "f"),
        "task": ((len(stamp_N),), "U"),
        "episode": ((len(stamp_N),), "i"),
    }
    for i, stamp_ns in enumerate(stamp_N.tolist()):
        since_s = (stamp_ns - START_NS) / NS_PER_S
        np.testing.assert_allclose(arrays["state"][i], where(since_s), atol=1e-6)
        wanted_HJ = [where(since_s + (k + 1) * PERIOD_S) for k in range(HORIZON)]
        np.testing.assert_allclose(arrays["chunk"][i], wanted_HJ, atol=1e-6)
        assert np.abs(arrays["images"][i].astype(int) - stamp_ns // 10**7 % 251).max() <= 3


def test_chunks_near_the_end_are_left_out_or_held(folder: Path) -> None:
    action_FJ = np.arange(5.0)[:, None]
    assert make_chunks(action_FJ, 3, "drop")[..., 0].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert make_chunks(action_FJ, 3, "hold")[2:, :, 0].tolist() == [[2, 3, 4], [3, 4, 4], [4, 4, 4]]
    assert len(make_chunks(action_FJ, 6, "drop")) == 0
    assert len(load(folder, ends="hold")["state"]) == Dataset(folder).info.total_frames
    with pytest.raises(ConfigurationError, match="no episode has the 99 frames of a chunk"):
        load(folder, horizon=99)


def test_a_frame_rate_other_than_that_of_the_actions_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"expected 10 frames per second.*got 20; .*--fps 10"):
        load(folder, period_s=0.1)


@pytest.mark.slow
def test_training_takes_recorded_frames_in_place_of_simulated_ones(folder: Path, tmp_path: Path) -> None:
    """One step with every loss on robot frames; the batch holds what was recorded."""
    sizes = {"width": 16, "depth": 3, "mlp": 16, "heads": 2, "kv_heads": 1, "head_dim": 8}
    vision = {"image_size": 96, "patch_size": 12, "width": 16, "depth": 1, "heads": 2, "mlp": 16, "stem": "conv"}
    losses = {"fast": 1.0, "readout": 1.0, "pointing": 1.0, "grounding": 1.0, "flow": 1.0}
    parts = ["vision", "backbone", "heads", "expert"]
    stage = {
        "name": "joint",
        "losses": losses,
        "train": parts,
        "sources": {"robot": 4},
        "steps": 1,
        "learning_rate": 0.01,
    }
    simulated = {"robot_episodes": 2, "frames_per_episode": 2, "scenes": 2, "validation_episodes": 1}
    config = {
        "name": "recorded",
        "robot": "demo_arm",
        "out": tmp_path / "run",
        "data": {"folder": tmp_path / "data", "recorded": folder, **simulated},
        "model": {"vision": vision, "backbone": sizes, "expert": sizes | {"width": 8}, "state_token": True},
        "prompt_length": 32,
        "hints": {"readout_frequencies": 4, "probe_layer": 1},
        "max_prefix_delay": 3,
        "stages": [stage],
    }
    run = Run(TrainingConfig.model_validate(config))
    arrays, space = load(folder, ends="hold"), run.space
    rows = np.array([0, 7, 20, len(arrays["state"]) - 1])
    batch = run.frames.take(rows, np.random.default_rng(0))
    assert batch.images_BVCHW.shape == (4, 2, 3, 96, 96) and batch.images_BVCHW.abs().max() <= 1.0
    state_BJ, chunk_BHJ = arrays["state"][rows].astype(float), arrays["chunk"][rows].astype(float)
    np.testing.assert_allclose(batch.state_BJ, normalize(state_BJ, space.state_low, space.state_high), atol=1e-6)
    assert batch.state_BJ.abs().max() <= 1.0  # type: ignore[union-attr]
    reach_J = np.array(space.action_high)
    np.testing.assert_allclose(batch.action_BHA, (chunk_BHJ - state_BJ[:, None]) / reach_J, atol=1e-5)
    assert 0.5 < float(batch.action_BHA.abs().max()) < 1.5  # type: ignore[union-attr]
    assert batch.action_BHA.shape == (4, HORIZON, len(JOINTS))  # type: ignore[union-attr]
    prompt = run.frames.render("touch the red cube", state_BJ[1])
    tokens_L, mask_L = tokenize(run.tokenizer, prompt, length=32)
    assert batch.tokens_BL[1][batch.token_mask_BL[1]].tolist() == tokens_L[mask_L].tolist()
    assert (batch.target_cell_B == NO_TARGET).all() and batch.place_B2.isnan().all()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    values = run.trainer.accumulate_gradients(run.config.stages[0], np.random.default_rng(0))
    assert set(values) == set(losses) and all(np.isfinite(value) for value in values.values())
    assert values["pointing"] == 0.0 and values["flow"] > 0.1
    run.run()
    after = run.model.state_dict()
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert {"vision", "backbone", "expert"} <= changed


def test_numbers_are_the_robots_whatever_the_datasets_are(folder: Path) -> None:
    """As the robot file maps them: in another order, and of another scale and sign."""
    robot = read_robot(find_robot("demo_arm"))
    mapped = robot.model_dump(exclude_defaults=True)
    for dimensions in (mapped["state"], mapped["actions"]):
        for i, dimension in enumerate(dimensions):
            dimension["dataset"] = {"index": 6 - i} | ({"scale": 2.0, "sign": -1} if i == 0 else {})
    timing = ChunkTiming(image_size=96, horizon=HORIZON, period_s=PERIOD_S, grid=8)
    meta = {"fingerprint": "of the simulated data", "counts": {}}
    plain, other = (load_recorded(folder, r, timing, meta)[0] for r in (robot, Robot.model_validate(mapped)))
    for name in ("state", "chunk"):
        expected = plain[name][..., ::-1] * np.array([-2.0, 1, 1, 1, 1, 1, 1])
        np.testing.assert_allclose(other[name], expected, rtol=1e-5)


def test_the_fingerprint_covers_the_dataset(folder: Path) -> None:
    timing = ChunkTiming(image_size=96, horizon=HORIZON, period_s=PERIOD_S, grid=8)
    meta = {"fingerprint": "of the simulated data", "counts": {}}
    fingerprints = []
    for change in ("", " "):
        path = folder / "meta/ki_vla_ros.json"
        path.write_text(path.read_text() + change)
        fingerprints.append(load_recorded(folder, read_robot(find_robot("demo_arm")), timing, meta)[1]["fingerprint"])
    assert len({meta["fingerprint"], *fingerprints}) == 3
