"""A connection with the bounds that the library lacks, or has in its newest releases alone.

It bounds a handshake's time, but not how many wait for theirs; a message's bytes, but not its pieces, which may be
empty; and not what it writes to a client that sends pings and never reads.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from websockets.asyncio.server import ServerConnection
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request

MOST_ARRIVING: Final = 64  # connections that have not asked for anything yet
MOST_PIECES: Final = 1024  # frames of one message
MOST_UNREAD: Final = 16 << 20  # bytes for a client that does not read


class Connection(ServerConnection):
    """`arriving` has all connections of a server that have not asked for anything yet, the oldest first.

    Where there are too many, the oldest is dropped: whoever means it has asked within milliseconds.
    """

    def __init__(self, *arguments: Any, arriving: dict[Connection, None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._arriving, self._pieces = arriving, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._arriving[self] = None
        if len(self._arriving) > MOST_ARRIVING:
            oldest = next(iter(self._arriving))
            del self._arriving[oldest]
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arriving.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.get_write_buffer_size() > MOST_UNREAD:
            self.transport.abort()

    def process_event(self, event: Any) -> None:
        if isinstance(event, Request):
            self._arriving.pop(self, None)
        elif isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            self._pieces = 1 if event.opcode is not Opcode.CONT else self._pieces + 1
            if self._pieces > MOST_PIECES:
                self.protocol.fail(CloseCode.MESSAGE_TOO_BIG, f"expected a message of at most {MOST_PIECES} frames")
                self.send_data()
                self._pieces = 0
                return
        super().process_event(event)
