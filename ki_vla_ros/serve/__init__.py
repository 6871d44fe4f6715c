"""A bundle behind a websocket, in openpi's protocol: observations in, chunks of actions out (docs/serve.md)."""

from ki_vla_ros.serve.keys import Keys, find_keys, named_keys, read_keys
from ki_vla_ros.serve.server import PolicyServer
from ki_vla_ros.serve.wire import pack, unpack

__all__ = [
    "Keys",
    "PolicyServer",
    "find_keys",
    "named_keys",
    "pack",
    "read_keys",
    "unpack",
]
