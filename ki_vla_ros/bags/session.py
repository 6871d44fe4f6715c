"""The session in a bag: what the policy that was running said about itself (settings/session.py)."""

from __future__ import annotations

from ki_vla_ros.bags.bag import Bag
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.messages import TEXT, decode
from ki_vla_ros.settings import Session, read_session, session_topic


def find_session(bag: Bag, node: str | None = None) -> Session | None:
    """The first session in the bag, or the first of `node` (its full name); None if there is none.

    ConfigurationError if several nodes have a session and `node` is not given; InputError if it cannot be read.
    """
    wanted = [session_topic(node)] if node else [name for name in bag.topics if name.endswith(session_topic(""))]
    topics = [name for name in wanted if bag.has_messages(name) and bag.topics[name].type == TEXT]
    if len(topics) > 1:
        nodes = ", ".join(topic.removesuffix(session_topic("")) for topic in topics)
        raise ConfigurationError(f"bag {bag.path}: expected one session, got those of {nodes}; choose one with --node")
    message = next(iter(bag.messages(topics)), None) if topics else None
    return None if message is None else read_session(decode(message).data)
