"""Finds the files that come with the package: config/, launch/ and models/."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from ki_vla_ros.errors import ConfigurationError, did_you_mean

PACKAGE = "ki_vla_ros"

# Name a file with Fast DDS profiles, such as config/fastdds.xml. Humble's Fast DDS (2.6) knows only the second one, and
# newer ones warn of it.
PROFILE_VARIABLES: Final[tuple[str, ...]] = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")


def expand(path: Path | str) -> Path:
    """The path with ~ as a home; ConfigurationError if no file can have it, or the user's home is not known."""
    try:
        expanded = Path(path).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            expanded.stat()
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"{str(path)[:80]!r}: expected a path, got one that no file can have here ({why})"
        ) from error
    return expanded


def find_share(relative: str) -> Path:
    """The package's file or folder `relative` (say `config/demo.yaml`), in a ROS or pip installation or a checkout."""
    looked = []
    for folder in _share_folders():
        path = folder / relative
        if path.exists():
            return path
        looked.append(str(path))
    raise ConfigurationError(
        f"{relative}: expected it among the package's files, got none of {', '.join(looked)}; install the package again"
    )


def find_bundle(bundle: str) -> Path:
    """The folder as given, or that of the bundle of this name in models/."""
    if not bundle:
        raise ConfigurationError(
            "parameter 'bundle': expected the folder of a model bundle or the name of one in models/, got ''"
        )
    folder = expand(bundle)
    if folder.is_dir() or folder.name != bundle:
        return folder
    try:
        return find_share(f"models/{bundle}")
    except ConfigurationError as error:
        names = sorted({path.parent.name for each in _share_folders() for path in each.glob("models/*/manifest.json")})
        if not names:
            raise
        raise ConfigurationError(
            f"models/{bundle}: expected the folder of a bundle, or one of {', '.join(names)}, got {bundle!r}, "
            f"which is neither{did_you_mean(bundle, names)}"
        ) from error


def _share_folders() -> Iterator[Path]:
    try:
        from ament_index_python.packages import PackageNotFoundError, get_package_share_directory
    except ImportError:  # a checkout without ROS
        pass
    else:
        # ROS without this package (PackageNotFoundError), or with no installation sourced (OSError).
        with suppress(PackageNotFoundError, OSError):
            yield Path(get_package_share_directory(PACKAGE))
    yield Path(sys.prefix) / "share" / PACKAGE
    yield Path(__file__).resolve().parents[1]
