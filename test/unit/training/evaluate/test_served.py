"""A policy behind a server in an environment does what its bundle does there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import write_test_bundle
from support.served import open_policy, scripted, serving

from ki_vla_ros.bundle import Bundle
from ki_vla_ros.errors import ConfigurationError, EngineError
from ki_vla_ros.robot import find_robot, read_robot
from training.evaluate.__main__ import main
from training.evaluate.environment import Environment
from training.evaluate.environments import open_environment
from training.evaluate.rollouts import Act, act_as, roll_out
from training.evaluate.served import ServerDriver
from training.export.tiny import robot_policy

ROBOT = read_robot(find_robot("demo_arm"))
CHUNK = {"actions": np.tile([0.0, -0.6, 1.1, 0.0, 0.7, 0.0, 0.0], (8, 1))}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("served") / "arm", robot_policy(ROBOT))


@contextmanager
def reached(port: int, keys: str = "robot") -> Iterator[ServerDriver]:
    driver = ServerDriver(f"ws://127.0.0.1:{port}", keys)
    yield driver
    driver.close()


@pytest.fixture
def arm() -> Iterator[Environment]:
    environment = open_environment("arm", image_size=96)
    environment.time_limit_s = 1.5
    yield environment
    environment.close()


def driven(act: Act, environment: Environment, seeds: list[int], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """All actions that are executed."""
    executed = []
    with monkeypatch.context() as patched:
        step = environment.step
        patched.setattr(environment, "step", lambda action_D: (executed.append(action_D.copy()), step(action_D)))
        roll_out(act, environment, seeds, 5)
    return np.array(executed)


def test_episodes_are_those_of_the_bundle_bit_for_bit(
    bundle: Bundle, arm: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = driven(act_as(open_policy(bundle)), arm, [0], monkeypatch)
    assert len(expected) == 30 and np.ptp(expected, axis=0).max() > 0.01
    with serving(open_policy(bundle)) as port, reached(port) as server:
        act, environment = server.meet(arm, "arm")
        assert environment is arm
        for seeds in ([0], [3, 0]):  # whichever episodes came before
            assert np.array_equal(driven(act, arm, seeds, monkeypatch)[-len(expected) :], expected)


def test_the_command_writes_what_it_writes_of_a_bundle(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    where = ["--environment", "arm/known", "--episodes", "1", "--image-size", "96", "--out", str(out)]
    with serving(open_policy(bundle)) as port:
        address = f"ws://127.0.0.1:{port}"
        assert main(["--policy-server", address, *where]) == 0
        found = json.loads(capsys.readouterr().out)
    assert found.items() <= json.loads(out.read_text()).items()
    with serving(open_policy(bundle)) as port:  # elsewhere, the same policy
        assert main(["--policy-server", f"ws://127.0.0.1:{port}", *where]) == 0
    assert json.loads(capsys.readouterr().out)["environments"] == found["environments"]
    other = open_policy(bundle)
    other.flow_steps += 1
    with serving(other) as port:
        assert main(["--policy-server", f"ws://127.0.0.1:{port}", *where]) == 2
    assert f"policy.flow_steps: expected {other.flow_steps}, got {found['flow_steps']}" in capsys.readouterr().err
    out.unlink()
    assert (found["policy_server"], found["policy"], found["keys"]) == (address, bundle.manifest.name, "robot")
    assert main([str(bundle.path), *where]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert found["environments"].keys() == expected["environments"].keys() and found["seeds"] == expected["seeds"]
    assert found["environments"]["arm/known"].keys() == expected["environments"]["arm/known"].keys()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Traceback\n of theirs", "it refused the observation: Traceback of theirs"),
        (None, "expected an answer, got the end of the connection"),
        ({"actions": np.zeros((8, 6))}, "actions: expected float [any, 7], got float64 [8, 6]"),
        ({"actions": np.zeros((0, 7))}, "actions: expected float [any, 7], got float64 [0, 7]"),
        ({"actions": np.full((8, 7), np.nan)}, "actions: expected numbers within 1e+09, got nan"),
    ],
)
def test_what_a_server_does_wrong_ends_the_evaluation(
    answer: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    with scripted(CHUNK, CHUNK, answer) as port:
        where = ["--environment", "arm", "--episodes", "1", "--image-size", "64", "--out", str(out)]
        assert main(["--policy-server", f"ws://127.0.0.1:{port}", *where]) == 2
        error = capsys.readouterr().err
        assert f"evaluate: policy server ws://127.0.0.1:{port}: {said}" in error and "Traceback (" not in error
    assert not out.exists()


def test_a_server_that_says_nothing_of_itself_may_have_any_horizon(
    arm: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted(*[CHUNK] * 9) as port, reached(port) as server:
        act, _ = server.meet(arm, "arm")
        assert np.array_equal(driven(act, arm, [0], monkeypatch)[0], CHUNK["actions"][0])
        with pytest.raises(ConfigurationError, match="execute: expected at most 8, the horizon, got 9"):
            roll_out(act, arm, [0], 9)


def test_its_period_is_the_servers_and_another_robot_is_refused(arm: Environment) -> None:
    said_s = 3 * ROBOT.action_period_s
    with scripted(metadata={"action_period_s": said_s}) as port, reached(port) as server:
        assert server.meet(arm, "arm")[1].robot.action_period_s == pytest.approx(said_s)
    for metadata, said in (
        ({"action_period_s": 0.033}, "action_period_s: expected 0.05, as environment arm and the keys say, got 0.033"),
        ({"action_period_s": "fast"}, "action_period_s: expected 0.05"),
        ({"actions": ["x"]}, "actions: expected .'shoulder_pan', "),
        ({"units": "dataset"}, "units: expected robot"),
    ):
        refused = pytest.raises(ConfigurationError, match=said)
        with scripted(metadata=metadata) as port, reached(port) as server, refused:
            server.meet(arm, "arm")
    refused = pytest.raises(ConfigurationError, match="cameras: expected those of robot 'demo_arm'")
    with scripted() as port, reached(port, "libero") as server, refused:
        server.meet(arm, "arm")


def test_nobody_there_is_said_at_once() -> None:
    with pytest.raises(EngineError, match="expected a connection, got"):
        ServerDriver("ws://127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--environment", "arm"), "expected one of a bundle, --policy-server and --expert, got none of them"),
        (
            ("models/demo", "--policy-server", "ws://a:1", "--environment", "arm"),
            "got bundle and policy_server",
        ),
        (("--policy-server", "ws://a:1"), "--policy-server: expected --environment or --protocol with it, got neither"),
        (("models/demo", "--policy-server-keys", "droid"), "--policy-server-keys: expected it only with --policy-s"),
        (("--policy-server", "ws://a:1", "--environment", "arm", "--noise-seed", "1"), "expected it only with a bun"),
        (("--policy-server", "ws://a:1", "--environment", "arm", "--set", "a=1"), "--set: expected it only with a b"),
        (("--policy-server", "ws://a:1", "--environment", "arm", "--execute", "0"), "expected at least 1, got 0"),
        (("--policy-server", "", "--environment", "arm"), "policy_server: expected ws://host:port, got ''"),
        (("--policy-server", "a:1", "--environment", "arm"), "policy_server: expected ws://host:port, got 'a:1'"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert main(list(arguments)) == 2
    assert said in capsys.readouterr().err
