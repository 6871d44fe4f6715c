"""The exceptions of the robot's side.

Every message says what was expected, what was got, where, and what to do about it. The classes say who has to act:
a user (`ConfigurationError`, `BundleError`), the robot's inputs (`InputError`), or the machine (`EngineError`).
"""

from __future__ import annotations

import difflib
import errno
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import ValidationError


# Characters of an error as text: a name from a file may have millions.
LONGEST_TEXT: Final = 3000
MOST_FINDINGS: Final = 20


class KiVlaError(Exception):
    """Base of everything this package raises on purpose.

    As text it is safe to print, whatever a file or a message had in it: names are quoted in errors, and a terminal
    obeys the control characters in them.
    """

    def __str__(self) -> str:
        return shorten(printable(shorten(super().__str__(), LONGEST_TEXT)), LONGEST_TEXT)


class ConfigurationError(KiVlaError):
    """A setting, argument or environment is wrong; nothing has moved."""


class ParameterError(ConfigurationError):
    """Wrong parameters, one sentence each in `problems`.

    As text each problem is a line, with `where` (a file) in front of it.
    """

    def __init__(self, problems: Sequence[str], where: str = "") -> None:
        super().__init__("\n".join(f"{where}: {problem}" if where else problem for problem in problems))
        self.problems = tuple(problems)


class BundleError(ConfigurationError):
    """The bundle on disk is missing, damaged, or not of the format that this code reads."""


class EngineError(KiVlaError):
    """An inference engine is not available on this machine, or failed while running."""


class InputError(KiVlaError):
    """A message from the robot cannot be used; the node holds until a usable one arrives."""


class StaleInput(InputError):
    """An input is missing or older than its limit; names topic, age and limit."""


class InstructionError(InputError):
    """The instruction is empty, too long, or has words that the bundle's tokenizer does not know."""


class SafetyRefusal(KiVlaError):
    """A chunk that must not reach the wire; names joint, step, value and limit."""


class EmergencyStop(SafetyRefusal):
    """A fault after which nothing may move until someone has looked: latched, released only by ~/reset."""


class SimulationError(KiVlaError):
    """The simulator cannot start or was asked for something it cannot do."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write says where a disk, a quota or the largest permitted file is full."""


@contextmanager
def writing(path: Path | str, left: str = "") -> Iterator[None]:
    """Makes of an OSError in its block a KiVlaError that names `path` and what to do.

    The operating system's own says "No space left on device" without where. `left`: what is there now, as a sentence.
    """
    try:
        yield
    except OSError as error:
        raise KiVlaError(cannot_write(path, error, left)) from error


def cannot_write(path: Path | str, error: Exception, left: str = "") -> str:
    """The message of `writing`, for those who know more than an OSError."""
    reason, remedy = repr(error), "please report this"
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        remedy = "make room" if error.errno in FULL else "choose a place that can be written to"
    return f"{path} cannot be written: {reason}; {f'{left}; ' if left else ''}{remedy}"


def printable(text: str) -> str:
    """The text with all that a terminal would not show as a character (controls, marks that reverse text, halves of
    surrogate pairs) written as in Python's literals; line breaks stay."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )


def shorten(text: str, most: int) -> str:
    """At most about `most` characters: a long text loses its middle, since its end says what to do."""
    if len(text) <= most:
        return text
    return f"{text[: most * 3 // 4]} [... {len(text) - most} characters ...] {text[-most // 4 :]}"


def short_repr(value: Any) -> str:
    """The beginning of `repr(value)`, at a cost that does not grow with the value."""
    return _REPR.repr(value)[:80]


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 80, 80, 80
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = _REPR.maxset = 6


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The end of a message, "; did you mean 'x'?", or "" if no candidate is close."""
    found = difflib.get_close_matches(name[:200], list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


class Finding(NamedTuple):
    """What pydantic found: `said` is "expected X, got Y", as far as whoever raised it says so.

    `place`: keys and indices of the part, also where the whole record's validator only names it in `said`; `where` is
    "" then. `remedy`: what to do, or what the field is; "" if nothing is known.
    """

    place: tuple[str | int, ...]
    where: str
    said: str
    remedy: str
    value: Any

    def __str__(self) -> str:
        return (f"{self.where}: " if self.where else "") + self.said + (f" ({self.remedy})" if self.remedy else "")


def validation_findings(error: ValidationError, record: Any = None) -> list[Finding]:
    """pydantic's findings, without "too few items" of a list whose items are found fault with themselves.

    With the `record` (its class) that was validated they also say which keys there are, and what a field is.
    """
    found = error.errors(include_url=False)
    inside = [finding["loc"] for finding in found]
    return [
        _finding(finding, record)
        for finding in found
        if finding["type"] != "too_short"
        or not any(place[:-1][: len(finding["loc"])] == finding["loc"] for place in inside)
    ]


def describe_validation(error: ValidationError, record: Any = None) -> str:
    """pydantic's findings on one line: where, what was expected, what was got; `record` as in validation_findings."""
    findings = validation_findings(error, record)
    parts = [str(finding) for finding in findings[:MOST_FINDINGS]]
    if len(findings) > MOST_FINDINGS:
        parts.append(f"and {len(findings) - MOST_FINDINGS} more")
    return "; ".join(parts)


def _finding(finding: Any, record: Any) -> Finding:
    # A union's tag is no key of the file.
    place = tuple(part for part in finding["loc"] if not _TAG.fullmatch(str(part)))
    kind, value = finding["type"], finding["input"]
    where, key = ".".join(map(str, place)), str(place[-1]) if place else ""
    fields = _fields(record, place)
    if kind == "value_error":
        said = finding["msg"].removeprefix("Value error, ")
        return Finding(_named_in(said, value, place), where, said, "", value)
    if kind == "missing":
        return Finding(place, where, f"expected {key}, got none", _described(fields, key), value)
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known, _, rest = key.partition(":")
        if rest and known in fields:
            remedy = f"write '{known}: {rest.strip()}', with a space after the colon"
        else:
            remedy = did_you_mean(key, fields).removeprefix("; ")
        keys = f"one of {', '.join(fields)}" if fields else "another key"
        return Finding(place, where, f"expected {keys}, got {short_repr(value)} for {key}: no such key", remedy, value)
    expected = _OUGHT.sub("", finding["msg"])
    for wordy, plain in _PLAINLY.items():
        expected = re.sub(wordy, plain, expected)
    names = re.findall("'([^']+)'", finding["msg"]) if kind in ("literal_error", "enum") else []
    near = did_you_mean(value, names).removeprefix("; ") if isinstance(value, str) else ""
    said = f"expected {expected}, got {short_repr(value)}"
    return Finding(place, where or "as a whole", said, near or _described(fields, key), value)


_TAG = re.compile("<[a-z]+>")
_OUGHT = re.compile(r"^\w+ should (be |have )?")
_PLAINLY = {
    "greater than or equal to": ">=",
    "less than or equal to": "<=",
    "greater than": ">",
    "less than": "<",
    r"a valid (dictionary|mapping).*": "keys with values",
    r"a valid (tuple|list|array)": "a list",
    r"a valid integer": "an integer",
    r"a valid ": "a ",
    r"^match pattern": "the pattern",
    r", unable to .*| after validation, not .*": "",
}


def _models(annotation: Any) -> Iterator[Any]:
    """The records that a field of this type may have in it."""
    if hasattr(annotation, "model_fields") or (isinstance(annotation, type) and is_dataclass(annotation)):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _fields(record: Any, place: Sequence[str | int]) -> dict[str, Any]:
    """The fields of the part that the last key of `place` is, or would be, one of."""
    models, named = list(_models(record)), False
    for key in place[:-1]:
        if named:  # a key of the user's own, such as a source's name
            named = False
        elif isinstance(key, str):
            known = [fields[key] for fields in map(_fields_of, models) if key in fields]
            models = [model for field in known for model in _models(getattr(field, "annotation", None))]
            named = any(get_origin(getattr(field, "annotation", None)) is dict for field in known)
    if named:
        return {}
    return {name: field for model in models for name, field in _fields_of(model).items()}


def _fields_of(model: Any) -> Mapping[str, Any]:
    """Of pydantic's records, or of a dataclass, whose fields have no description."""
    found: Mapping[str, Any] = model.__dataclass_fields__ if is_dataclass(model) else model.model_fields
    return found


def _described(fields: Mapping[str, Any], key: str) -> str:
    return (key in fields and getattr(fields[key], "description", None)) or ""


def _named_in(said: str, content: Any, place: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The place that a fault names itself, such as "actions: 'elbow': unit: ...": of several alike the last."""
    if not place and (group := re.match(r"(\w+): ", said)):
        parts = content.get(group[1]) if isinstance(content, dict) else None
        place, said = (group[1],), said[group.end() :]
        parts = parts if isinstance(parts, list) else []
        names = [part.get("name") if isinstance(part, dict) else None for part in parts]
        if (name := re.match(r"'([^']+)': ", said)) and name[1] in names:
            place = (group[1], len(names) - 1 - names[::-1].index(name[1]))
    key = re.match(r"(?:'[^']+': )?([\w.]+): ", said)
    return (*place, *key[1].split(".")) if key else place


def cause_of(reason: str) -> str:
    """What a hold or refusal is counted under: the part of its message before the first colon."""
    return reason.partition(":")[0]
