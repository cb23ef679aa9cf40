"""One row of a file, before any form is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it is written."""

    file: int
    """Which of the source's files."""
    line: int
    """Where it begins, from 1; in files without lines, which row it is."""
    fields: Fields | None
    bad: str = ""
    """Why there are no fields."""
