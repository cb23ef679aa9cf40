"""Where the parts of a library lie below its root, and which numbers are taken."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from cluster.errors import ConfigError
from cluster.library.ref import NAME

REMOVED = ".removed.json"
"""What a removed version leaves in its directory: its manifest, under a name nobody loads."""


def home(root: Path, name: str) -> Path:
    """Return the directory of a model; ConfigError for what is no name."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"model name {name!r:.80}: 1 to 64 of a-z 0-9 . _ -, starting with a letter or "
            "digit, as in smollm2-135m-instruct"
        )
    return root / "models" / name


def directory(root: Path, name: str, number: int) -> Path:
    """Return where the files of a version lie."""
    return home(root, name) / "versions" / str(int(number))


def numbers(root: Path, name: str) -> list[int]:
    """Return the numbers that were ever taken, ascending; not each has a version."""
    found = children(home(root, name) / "versions")
    return sorted(int(text) for text in found if re.fullmatch(r"[1-9]\d{0,8}", text))


def names(root: Path) -> list[str]:
    """Return the models that ever had a version, sorted; what is no name is left out."""
    return sorted(name for name in children(root / "models") if NAME.fullmatch(name))


def everything(place: Path) -> set[str]:
    """Return all names in a directory, but for those that NFS keeps open files under."""
    found = set(os.listdir(place)) if place.is_dir() else set()
    return {name for name in found if not name.startswith(".nfs")}


def children(place: Path) -> list[str]:
    """Return the names in a directory that do not start with a dot; none when there is none."""
    try:
        return [name for name in os.listdir(place) if not name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def empty(place: Path) -> None:
    """Delete what lies in a version's directory, but for the trace of a removal."""
    for path in place.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != REMOVED:
            path.unlink(missing_ok=True)
