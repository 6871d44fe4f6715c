"""A bundle behind a websocket, in openpi's protocol: observations in, chunks of actions out (docs/serve.md)."""

from ki_vla_ros.serve.keys import Keys, find_keys, named_keys, open_keys, read_keys
from ki_vla_ros.serve.packing import pack, unpack
from ki_vla_ros.serve.remote import RemotePolicy, ServerEngine, open_remote
from ki_vla_ros.serve.server import PolicyServer
from ki_vla_ros.serve.token import read_token

__all__ = [
    "Keys",
    "PolicyServer",
    "RemotePolicy",
    "ServerEngine",
    "find_keys",
    "named_keys",
    "open_keys",
    "open_remote",
    "pack",
    "read_keys",
    "read_token",
    "unpack",
]
