"""The policy server's own command, in a process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
from support import ROOT
from support.served import ask, bench_bundle, message
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

BUNDLE = bench_bundle()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ki_vla_ros", "serve", "--bundle", "bench", "--port", "0", *arguments]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_stopped(number: signal.Signals) -> None:
    with subprocess.Popen(command(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"bench: ws://127\.0\.0\.1:(\d+), keys robot; Ctrl-C ends it\n", line)
        assert found, line or process.stderr.read()
        with connect(f"ws://127.0.0.1:{found[1]}", compression=None, max_size=None, close_timeout=0.5) as connection:
            connection.recv(20)
            assert "actions" in ask(connection, message(BUNDLE))
            os.kill(process.pid, number)
            assert process.wait(20) == 130
            with pytest.raises(ConnectionClosed) as raised:
                connection.recv(20)
            assert raised.value.rcvd is not None and raised.value.rcvd.code == 1001  # going away
        assert process.stderr.read().splitlines()[-1] == "serve: stopped"
