"""The demo's child processes and their ROS domain."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from support.waiting import PATIENCE_S, until

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.ros.children import ChildError, Children, free_domain, prepare_environment
from ki_vla_ros.share import PROFILE_VARIABLES, find_share


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> str:
    (folder / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return name


@pytest.mark.parametrize("polite", [True, False])
def test_children_get_sigint_first_and_are_killed_if_they_ignore_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, polite: bool
) -> None:
    ends = (
        "import time\nprint('up', flush=True)\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('bye')\n"
    )
    stays = (
        "import signal, time\nfor s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)\n"
        "print('up', flush=True)\ntime.sleep(600)\n"
    )
    monkeypatch.setattr("ki_vla_ros.ros.children.STOP_LIMIT_S", PATIENCE_S if polite else 0.2)
    with Children(tmp_path) as children:
        child = children.start("child", module(tmp_path, monkeypatch, f"child_{polite}", ends if polite else stays), [])
        until(lambda: "up" in child.log.read_text(), "the child")
        children.check()
    assert child.process.returncode == (0 if polite else -signal.SIGKILL)
    assert ("bye" in child.log.read_text()) == polite


def test_a_dead_child_is_reported_with_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "print('[WARN] [1.5] [x]: hot'); print('[INFO] [1.6] [x]: fine'); raise SystemExit(7)"
    with Children(tmp_path) as children:
        child = children.start("brief", module(tmp_path, monkeypatch, "brief_child", code), [])
        child.process.wait(PATIENCE_S)
        with pytest.raises(ChildError, match=r"(?s)brief ended with exit code 7; .*brief.log says:.*hot"):
            children.check()
        assert child.last_error() == "hot"


@pytest.mark.parametrize("number", [0, 1, 7], ids=["the first", "the second", "a late one"])
def test_a_domain_with_a_participant_is_not_free(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Whichever: those that came before it may be gone."""
    free = free_domain()
    monkeypatch.setattr("ki_vla_ros.ros.children.DOMAINS", range(free, free + 1))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as participant:
        participant.bind(("", 7400 + 250 * free + 10 + 2 * number))
        with pytest.raises(ConfigurationError, match="no free ROS domain"):
            free_domain()
    assert free_domain() == free


def test_a_domain_with_a_participant_or_open_to_other_machines_may_be_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ros_environment: dict[str, str]
) -> None:
    for name in (*PROFILE_VARIABLES, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # so that what the demo would set does not stay for other tests
    assert not prepare_environment(tmp_path)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as participant:
        participant.bind(("", 7400 + 250 * int(ros_environment["ROS_DOMAIN_ID"]) + 10))
        assert prepare_environment(tmp_path)
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "SUBNET")
    assert prepare_environment(tmp_path)


@pytest.mark.parametrize("distribution", ["humble", "jazzy"])
@pytest.mark.parametrize("given", [None, *PROFILE_VARIABLES])
def test_a_profile_that_is_set_is_left_as_it_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ros_environment: dict[str, str],
    given: str | None,
    distribution: str,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ROS_LOCALHOST_ONLY", "1")
    monkeypatch.setenv("ROS_DISTRO", distribution)
    for name in PROFILE_VARIABLES:  # set first, so that it is taken back afterwards
        monkeypatch.setenv(name, "")
    if given:
        monkeypatch.setenv(given, "/my.xml")
    prepare_environment(tmp_path)
    own = PROFILE_VARIABLES[distribution == "humble"]  # newer releases warn of the other
    expected = {given: "/my.xml"} if given else {own: str(find_share("config/fastdds.xml"))}
    assert {name: value for name in PROFILE_VARIABLES if (value := os.environ[name])} == expected


@pytest.mark.parametrize("domain", ["233", "-1", "robot"])
def test_an_impossible_domain_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, domain: str) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", domain)
    with pytest.raises(ConfigurationError, match=f"ROS_DOMAIN_ID: expected 0 to 232, got '{domain}'"):
        prepare_environment(tmp_path)
