"""A wire between a client and a server that can be slow, stall or be cut: TCP, byte by byte, over loopback."""

from __future__ import annotations

import random
import socket
import threading
import time
from contextlib import suppress

PIECE = 1 << 16
LOST_S = 0.2  # until TCP sends again what was lost at the end of a message: Linux's least timeout


class Between:
    """Forwards connections of `port` to a server. `way`: "" as they come, "gone" cuts and refuses them, "stalls" holds
    everything back; `delay_s` (least, most) holds each piece back for a time drawn from it; their order stays. `lost`
    is the share of pieces that come LOST_S later, and all that is behind them: over TCP a loss is no more than that.
    """

    def __init__(self, server_port: int, port: int = 0) -> None:
        self._server_port = server_port
        self.way = ""
        self.delay_s = (0.0, 0.0)
        self.lost = 0.0
        self._draw = random.Random(0)
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept)]
        self._closing = False
        self._threads[0].start()

    def close(self) -> None:
        self._closing, self.way = True, "gone"
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def cut(self) -> None:
        """Ends all connections, as where a cable is pulled and somebody notices."""
        while self._sockets:
            with suppress(OSError):
                self._sockets.pop().shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closing:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.way == "gone":
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._server_port))
            self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                thread = threading.Thread(target=self._forward, args=(source, sink))
                self._threads.append(thread)
                thread.start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with source, suppress(OSError):
            while piece := source.recv(PIECE):
                time.sleep(self._draw.uniform(*self.delay_s) if len(piece) < PIECE else 0.0)
                time.sleep(LOST_S if self._draw.random() < self.lost else 0.0)
                while self.way == "stalls" and not self._closing:
                    time.sleep(0.01)
                if self.way == "gone":
                    break
                sink.sendall(piece)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
