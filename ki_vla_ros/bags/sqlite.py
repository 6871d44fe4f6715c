"""Reads rosbag2's sqlite files, damaged ones too: every row that SQLite can still reach from either end.

Opening a file notes each message's time and row (24 bytes of memory per message); contents are read when due.
SQLite has no checksums: a flipped bit in a message's content goes unnoticed here.
"""

from __future__ import annotations

import shutil
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bags.storage import CLOCK_STEP_NS, Faults, Pending, Topic
from ki_vla_ros.errors import short_repr
from ki_vla_ros.files import check_file
from ki_vla_ros.messages import BagMessage

# Rows per query. Each query starts at a row number, so an error costs at most the rest of one.
ROWS = 4096
MOST_TOPICS, LONGEST_NAME = 10_000, 1000
# Of SQLite's virtual machine; a block of rows takes 40,000.
STEPS = 10_000_000
_INDEX = np.dtype([("log_ns", np.int64), ("row", np.int64), ("topic", np.int64)])


class SqliteFile:
    """One .db3 file, which is never written to; what cannot be read goes to `faults`, only OSError is raised."""

    def __init__(self, path: Path, faults: Faults, name: str = "") -> None:
        """`name`: the file's name in faults, by default its own."""
        self._name = name or path.name
        self._faults = faults
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._database: sqlite3.Connection | None = None
        self._steps = 0  # times STEPS, since the last query began
        self._by_id: dict[int, tuple[str, str]] = {}
        self._index: NDArray[Any] = np.zeros(0, dtype=_INDEX)
        self.topics: dict[str, Topic] = {}
        try:
            self._database = self._open(path)
            self._read_topics(self._database)
            self._index = self._read_index(self._database)
        except sqlite3.Error as error:
            self._fault(f"cannot be read: {error}")
        self._count()
        self.start_ns = int(self._index["log_ns"][0]) if len(self._index) else None
        self.end_ns = int(self._index["log_ns"][-1]) if len(self._index) else None

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
        if self._folder is not None:
            self._folder.cleanup()

    def messages(self, topics: Collection[str] | None) -> Iterator[Pending]:
        wanted = [key for key, (topic, _) in self._by_id.items() if topics is None or topic in topics]
        for log_ns, row, key in self._index[np.isin(self._index["topic"], wanted)]:
            yield int(log_ns), partial(self._message, int(log_ns), int(row), *self._by_id[int(key)])

    def _fault(self, message: str) -> None:
        self._faults.add("database", self._name, message)

    def _open(self, path: Path) -> sqlite3.Connection:
        """Opens the database; what the recorder had not yet merged (-wal, -journal) is merged in a copy."""
        beside = [path.with_name(path.name + end) for end in ("-wal", "-journal")]
        pending = [file for file in beside if file.is_file() and file.stat().st_size]
        mode = "immutable=1"
        if pending:
            self._folder = tempfile.TemporaryDirectory(prefix="bag")
            for file in (path, *pending):
                shutil.copy(file, self._folder.name)
            path, mode = Path(self._folder.name, path.name), "mode=rw"
        size = check_file(path)
        database = sqlite3.connect(f"file:{quote(str(path.resolve()))}?{mode}", uri=True, check_same_thread=False)
        if sys.version_info >= (3, 11):
            # A damaged chain of pages may repeat a small file for ever.
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, max(1 << 20, size))
        database.text_factory = lambda text: text.decode(errors="replace")
        # A file from elsewhere must not run functions through its schema.
        database.execute("PRAGMA trusted_schema=OFF")
        database.execute("PRAGMA cell_size_check=ON")
        # Nothing is written, despite the name: without it SQLite refuses a file shorter than its header says.
        database.execute("PRAGMA writable_schema=ON")
        database.set_progress_handler(self._is_endless, STEPS)
        for table in ("topics", "messages"):
            # A view, or a column that is computed, is a program; rosbag2 writes tables.
            kinds = database.execute(
                "SELECT type FROM pragma_table_list WHERE name = ? COLLATE NOCASE", (table,)
            ).fetchall()
            hidden = database.execute("SELECT max(hidden) FROM pragma_table_xinfo(?)", (table,)).fetchone()
            if any(kind != "table" for (kind,) in kinds) or hidden[0]:
                raise sqlite3.DatabaseError(f"expected a table {table}, got a view or computed columns")
        return database

    def _is_endless(self) -> bool:
        """Called by SQLite after each STEPS instructions; a query of ours needs less than twice as many."""
        self._steps += 1
        return self._steps > 2

    def _read_topics(self, database: sqlite3.Connection) -> None:
        rows: dict[int, dict[tuple[str, str, str], None]] = {}
        query = f"SELECT id, name, type, serialization_format FROM topics LIMIT {MOST_TOPICS}"
        for key, *texts in database.execute(query):
            if not isinstance(key, int) or not all(
                isinstance(text, str) and len(text) <= LONGEST_NAME for text in texts
            ):
                self._fault(f"a topic is left out, its row is {short_repr((key, *texts))}")
            else:
                name, kind, encoding = texts
                rows.setdefault(key, {})[name, kind, encoding] = None
        for key, ((name, kind, encoding), *others) in rows.items():
            if others:  # a table without a primary key
                told = f"topic {key} is {name} ({kind}) and {others[0][0]} ({others[0][1]}); its messages are left out"
                self._faults.add("type", self._name, told)
            elif encoding != "cdr":
                self._faults.add("type", f"{self._name}, {name}", f"encoded as {encoding!r}, not as cdr; left out")
                self.topics[name] = Topic(name, kind, 0)
            else:
                self._by_id[key] = name, kind

    def _read_index(self, database: sqlite3.Connection) -> NDArray[Any]:
        """The index in the order of log time; rows after an error are read from the table's end."""
        parts, error = self._walk(database, "ASC", -(1 << 63))
        if error is not None:
            last = max((int(part["row"][-1]) for part in parts), default=-(1 << 63))
            after, _ = self._walk(database, "DESC", last)
            found = sum(map(len, parts)), sum(map(len, after))
            parts += [part[::-1] for part in reversed(after)]
            self._fault(f"{found[0]} messages can be read up to an error, {found[1]} after it: {error}")
        index = np.concatenate(parts) if parts else np.zeros(0, dtype=_INDEX)
        steps = np.maximum.accumulate(index["log_ns"]) - index["log_ns"] if len(index) else index["log_ns"]
        if len(steps) and (back_ns := int(steps.max())) > CLOCK_STEP_NS:
            row = int(index["row"][int(np.argmax(steps > CLOCK_STEP_NS))])
            self._faults.add(
                "clock",
                f"{self._name}, row {row}",
                f"the recorder's clock goes back by {back_ns / 1e9:.1f} s; messages from before and after are mixed",
            )
        return index[np.lexsort((index["row"], index["log_ns"]))]

    def _walk(
        self, database: sqlite3.Connection, order: str, after: int
    ) -> tuple[list[NDArray[Any]], sqlite3.Error | None]:
        """Rows after row `after`, in blocks: ASC: upwards from there; DESC: downwards from the table's end."""
        parts: list[NDArray[Any]] = []
        bounds = (after, (1 << 63) - 1)
        error: sqlite3.Error | None = None
        while error is None:
            query = (
                # Not by `id`, which need not be unique in a table made by others.
                "SELECT timestamp, rowid, topic_id FROM messages WHERE rowid > ? AND rowid < ? "
                f"ORDER BY rowid {order} LIMIT {ROWS}"
            )
            block, self._steps = [], 0
            try:
                for row in database.execute(query, bounds):
                    block.append(row)
            except sqlite3.Error as failure:
                error = failure
            if not block:
                break
            usable = [row for row in block if self._is_usable(row)]
            if len(usable) < len(block):
                self._fault(f"{len(block) - len(usable)} messages without a time or a known topic are left out")
            if usable:
                parts.append(np.array(usable, dtype=_INDEX))
            last = block[-1][1]
            if not isinstance(last, int) or not bounds[0] < last < bounds[1]:
                break  # the rows are not in order, so there is no row to continue from
            bounds = (last, bounds[1]) if order == "ASC" else (bounds[0], last)
        return parts, error

    def _is_usable(self, row: tuple[Any, ...]) -> bool:
        return all(isinstance(value, int) for value in row) and row[0] >= 0 and row[2] in self._by_id

    def _count(self) -> None:
        by_topic = Counter(self._index["topic"].tolist())
        for key, (name, kind) in self._by_id.items():
            known = self.topics.get(name)
            if known is not None and known.type != kind:
                self._faults.add("type", f"{self._name}, {name}", f"has messages of {known.type} and of {kind}")
            count = by_topic[key] + ((known.count or 0) if known else 0)
            self.topics[name] = Topic(name, known.type if known else kind, count)

    def _message(self, log_ns: int, row: int, topic: str, kind: str) -> BagMessage | None:
        assert self._database is not None  # there are rows only if it was opened
        where, self._steps = f"{self._name}, row {row}", 0
        try:
            found = self._database.execute("SELECT data FROM messages WHERE rowid = ?", (row,)).fetchone()
        except (sqlite3.Error, MemoryError) as error:
            self._faults.add("message", where, f"a message on {topic} cannot be read and is left out: {error}")
            return None
        if found is None or not isinstance(found[0], bytes):
            self._faults.add("message", where, f"a message on {topic} has no content and is left out")
            return None
        return BagMessage(topic, kind, log_ns, found[0])
