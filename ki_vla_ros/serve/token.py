"""The token that a server asks for and a client knows: one line of a file, so that no list of processes shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.files import read_text
from ki_vla_ros.share import expand

SHORTEST: Final = 16
SCHEME: Final = "Api-Key"  # of the header Authorization, as openpi's client sends it


def read_token(path: Path | str, name: str) -> str:
    """The file's only line; ConfigurationError, which begins with the option's `name`, unless a header can carry it."""
    try:
        token = read_text(expand(path), 4096).strip()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no text"
        raise ConfigurationError(f"{name} {path}: expected a text file, got one that cannot be read ({why})") from None
    if len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigurationError(
            f"{name} {path}: expected one line of {SHORTEST} or more ASCII characters without spaces, got "
            f"{len(token)} characters; make one with `openssl rand -hex 32`"
        )
    return token
