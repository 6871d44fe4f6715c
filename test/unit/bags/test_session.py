"""Which session of a bag counts, for replay, doctor and conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.sample_bags import JOINT_STATE, START_NS, STRING, joint_state, text, where, write_mcap

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.bags.session import find_session
from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.messages.decoding import BagMessage
from ki_vla_ros.settings.session import BundleIdentity, Session, SessionTopics


def said(node: str, name: str, log_ns: int = START_NS) -> BagMessage:
    topics = SessionTopics(cameras={}, joint_states="/j", instruction="/i", command="/c", chunk="/k", tick="/t")
    identity = BundleIdentity(name=name, manifest_sha256="0" * 64)
    session = Session(node=node, bundle=identity, parameters={}, topics=topics)
    return BagMessage(session.topic, STRING, log_ns, text(session.text()))


def bundle(folder: Path, messages: list[BagMessage], node: str | None = None) -> str | None:
    with open_bag(write_mcap(folder / "b.mcap", messages)) as bag:
        session = find_session(bag, node)
        return session and session.bundle.name


def test_the_first_session_of_the_node_counts(tmp_path: Path) -> None:
    one = [said("/policy", "first"), said("/policy", "second", START_NS + 1)]
    assert bundle(tmp_path, one) == bundle(tmp_path, one, "/policy") == "first"
    assert bundle(tmp_path, one, "/left/policy") is None
    two = [said("/left/policy", "left"), said("/right/policy", "right", START_NS + 1)]
    assert bundle(tmp_path, two, "/right/policy") == "right"
    with pytest.raises(
        ConfigurationError,
        match="expected one session, got those of /left/policy, /right/policy; choose one with --node",
    ):
        bundle(tmp_path, two)


def test_messages_that_are_no_session(tmp_path: Path) -> None:
    joints = BagMessage("/other/session", JOINT_STATE, START_NS, joint_state(START_NS, where(0.0)))
    assert bundle(tmp_path, [joints]) is None
    assert bundle(tmp_path, [joints, said("/policy", "ours")]) == "ours"
    with pytest.raises(InputError, match="was it recorded with another version"):
        bundle(tmp_path, [BagMessage("/policy/session", STRING, START_NS, text("{}"))])
