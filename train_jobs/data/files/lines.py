"""Bytes of a file, plain or compressed, as text or as numbered lines."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cluster.errors import ConfigError


def _open(path: Path) -> gzip.GzipFile | IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def whole_text(path: Path) -> str:
    """Return all of a file. ConfigError: it cannot be read, or is not UTF-8."""
    try:
        with _open(path) as file:
            return file.read().decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def numbered_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield number, text and fault of each line; only a line feed ends one."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8"), ""
                except UnicodeDecodeError as error:
                    yield number, "", f"not UTF-8 text ({error})"
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
