"""Serve a bundle's policy to other machines and programs, in openpi's websocket protocol.

    ki-vla serve --bundle demo --port 8000
    ki-vla serve --bundle my_droid --keys droid --host 0.0.0.0 --token-file token.txt

Chunks are the policy's raw output: nothing has checked them against limits. docs/serve.md has the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final, get_args

from ki_vla_ros.bundle import load_bundle
from ki_vla_ros.console import run_command
from ki_vla_ros.engines import open_engine
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy import Policy, check_instruction
from ki_vla_ros.serve.keys import open_keys
from ki_vla_ros.serve.server import PolicyServer
from ki_vla_ros.serve.token import read_token
from ki_vla_ros.settings import Settings, settings_from_parameters
from ki_vla_ros.share import find_bundle

ANYONE: Final = "whoever reaches this address can use the policy"
LAST_PORT: Final = 65535


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("serve", partial(_serve, _parser().parse_args(arguments)), "stopped")


def _serve(chosen: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, also while the bundle is opened
    token = read_token(chosen.token_file, "--token-file") if chosen.token_file else ""
    if not (token or chosen.allow_anyone or _is_loopback(chosen.host)):
        raise ConfigurationError(
            f"--host {chosen.host}: expected --token-file FILE with it, got none: {ANYONE}; or say --allow-anyone"
        )
    if not 0 <= chosen.port <= LAST_PORT:
        raise ConfigurationError(f"--port: expected 0 to {LAST_PORT}, got {chosen.port}")
    settings = settings_from_parameters({name: getattr(chosen, name) for name in ("engine", "provider", "threads")})
    bundle = load_bundle(find_bundle(chosen.bundle))
    robot = bundle.manifest.robot
    keys = open_keys(chosen.keys, robot)
    if chosen.prompt:
        check_instruction(bundle, chosen.prompt)
    engine = open_engine(bundle, settings)
    try:
        policy = Policy(bundle, engine)
        policy.warm_up()
        server = PolicyServer(policy, keys, token, chosen.prompt)
        asyncio.run(_until_stopped(server, bundle.manifest.name, chosen))
    finally:
        engine.close()
    raise KeyboardInterrupt  # it ends in no other way


async def _until_stopped(server: PolicyServer, name: str, chosen: argparse.Namespace) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    def ready(port: int) -> None:
        host = f"[{chosen.host}]" if ":" in chosen.host else chosen.host
        print(f"{name}: ws://{host}:{port}, keys {chosen.keys}; Ctrl-C ends it", flush=True)

    try:
        await server.run(chosen.host, chosen.port, stop, ready)
    except OSError as error:
        raise ConfigurationError(
            f"--host {chosen.host} --port {chosen.port}: expected a free port of this machine, got {error}"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ki-vla serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", required=True, help="folder of a bundle, or the name of one in models/")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free; default: %(default)s")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: %(default)s, this machine only"
    )
    parser.add_argument(
        "--token-file", type=Path, help="what clients must know, openpi's api_key; a file with one line"
    )
    parser.add_argument("--allow-anyone", action="store_true", help="another address without a token")
    parser.add_argument(
        "--keys",
        default="robot",
        help="what clients call the observation's parts: robot, as the robot file does (default); droid, libero or "
        "aloha, as openpi's clients do; sglang, as SGLang's benchmark does; or a file",
    )
    parser.add_argument("--prompt", default="", help="instruction for clients that send none")
    for setting, standard in (("engine", "onnx"), ("provider", "cpu")):
        choices = get_args(Settings.model_fields[setting].annotation)
        parser.add_argument(f"--{setting}", choices=choices, default=standard, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of the processor; default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
