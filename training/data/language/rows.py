"""The JSON objects of a file, one a line or those of one list, read at random: in memory is only where each begins."""

from __future__ import annotations

import mmap
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ki_vla_ros.errors import ConfigurationError, InputError, short_repr
from ki_vla_ros.files import LARGEST_TEXT, open_file, parse_json

# A string, of which an unfinished one counts to the end, or a bracket.
_PART: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\Z)|[\[\]{}]', re.DOTALL)
_BLANK: Final = b" \t\r\n"


class Rows:
    """Opening it reads the file once; ConfigurationError if it has no objects. `InputError` names the row's line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin, self._end, self._line = array("q"), array("q"), array("q")
        try:
            with open_file(path) as file:
                first = _first(file.read(1 << 16))
                file.seek(0)
                if first == b"[":
                    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                        self._index_list(content)
                else:
                    self._index_lines(file)
        except FileNotFoundError:
            raise ConfigurationError(f"{path}: expected a file with one JSON object a line, found none") from None
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{path}: expected JSON objects, got none ({error})") from error
        if not self._begin:
            raise ConfigurationError(f"{path}: expected at least one JSON object, got none")

    def __len__(self) -> int:
        return len(self._begin)

    def where(self, number: int) -> str:
        """The file and what to look for in it."""
        return f"{self.path}: line {self._line[number]}" if self._line else f"{self.path}: entry {number + 1}"

    def read(self, number: int) -> dict[str, Any]:
        """One object; InputError if it is none."""
        with open_file(self.path) as file:
            return self._read(file, number)

    def __iter__(self) -> Iterator[dict[str, Any] | InputError]:
        """All of them, in order; an error in the place of one that is none."""
        with open_file(self.path) as file:
            for number in range(len(self)):
                try:
                    yield self._read(file, number)
                except InputError as error:
                    yield error

    def _read(self, file: Any, number: int) -> dict[str, Any]:
        begin, end = self._begin[number], self._end[number]
        try:
            if end - begin > LARGEST_TEXT:
                raise ValueError(f"it has {end - begin} bytes")
            file.seek(begin)
            content = file.read(end - begin)
            value = parse_json(content.decode("utf-8-sig"))
        except ValueError as error:
            raise InputError(f"{self.where(number)}: expected a JSON object, got none ({error})") from error
        if not isinstance(value, dict):
            raise InputError(f"{self.where(number)}: expected a JSON object, got {short_repr(value)}")
        return value

    def _index_lines(self, file: Any) -> None:
        at = line = 0
        while content := file.readline(LARGEST_TEXT + 1):
            line += 1
            if len(content) > LARGEST_TEXT:
                raise ValueError(f"line {line} has more than {LARGEST_TEXT} bytes")
            if content.strip():
                self._add(at, at + len(content))
                self._line.append(line)
            at += len(content)

    def _index_list(self, content: mmap.mmap) -> None:
        depth, begin, end, after = 0, 0, 0, 0
        for found in _PART.finditer(content):
            part = found[0]
            if part in b"[{":
                depth += 1
                if depth == 1:
                    after = found.end()
                elif depth == 2:
                    begin = found.start()
                    self._check_gap(content[after:begin], b"," if self._begin else b"")
            elif part in b"]}":
                depth -= 1
                if depth == 1:
                    after = found.end()
                    self._add(begin, after)
                elif depth == 0:
                    self._check_gap(content[after : found.start()], b"")
                    end = found.end()
                    break
        if depth or not end:
            raise ValueError("the list has no end; is the copy whole?")
        if content[end:].strip():
            raise ValueError("something follows the list")

    def _check_gap(self, gap: bytes, expected: bytes) -> None:
        """Whatever else is between two objects would be lost."""
        if gap.strip() != expected:
            raise ValueError(f"after {len(self._begin)} objects there is {short_repr(gap.strip())}")

    def _add(self, begin: int, end: int) -> None:
        self._begin.append(begin)
        self._end.append(end)


def _first(content: bytes) -> bytes:
    return content.removeprefix(b"\xef\xbb\xbf").lstrip(_BLANK)[:1]
