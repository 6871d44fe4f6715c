"""Where the files lie that come with the package: config/, launch/ and models/."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ki_vla_ros.errors import ConfigurationError

PACKAGE = "ki_vla_ros"


def find_share(relative: str) -> Path:
    """The file or folder `relative` (say `config/demo.yaml`) of a ROS installation, a pip one or a checkout."""
    looked = []
    for folder in _share_folders():
        path = folder / relative
        if path.exists():
            return path
        looked.append(str(path))
    raise ConfigurationError(
        f"{relative}: expected it among the package's files, but there is none of {', '.join(looked)}"
    )


def find_bundle(bundle: str) -> Path:
    """A folder as given, or the name of a bundle in models/."""
    if not bundle:
        raise ConfigurationError(
            "parameter 'bundle': expected the folder of a model bundle or the name of one in models/, got ''"
        )
    folder = Path(bundle).expanduser()
    if folder.is_dir() or folder.name != bundle:
        return folder
    return find_share(f"models/{bundle}")


def _share_folders() -> Iterator[Path]:
    try:
        from ament_index_python.packages import PackageNotFoundError, get_package_share_directory
    except ImportError:  # a checkout without ROS
        pass
    else:
        # ROS may be there without this package being installed into it, or without any installation in the environment.
        with suppress(PackageNotFoundError, OSError):
            yield Path(get_package_share_directory(PACKAGE))
    yield Path(sys.prefix) / "share" / PACKAGE
    yield Path(__file__).resolve().parents[1]
