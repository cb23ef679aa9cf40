"""What the command line prints: rich in a terminal, plain lines without one, JSON on request.

With ``--json`` standard output holds one JSON object and nothing else: what a verb tells on its
way goes to standard error, and its answer, or its error, is the object.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

_json = False


def use_json(as_json: bool) -> None:
    """Say whether this run of a verb answers in JSON; every verb calls it first."""
    global _json
    _json = as_json


def is_json() -> bool:
    """Say whether the answer is one JSON object."""
    return _json


def is_plain() -> bool:
    """Say whether output goes to something other than a terminal that knows colours."""
    told = sys.stderr if _json else sys.stdout
    return not told.isatty() or os.environ.get("TERM") == "dumb" or "NO_COLOR" in os.environ


def out(text: str = "") -> None:
    """Print one text as it is, nothing in it taken for markup: the answer for people.

    It goes to standard output; in JSON mode to standard error, where it tells what happens.
    """
    told = sys.stderr if _json else sys.stdout
    told.write(text + "\n")
    told.flush()


def counted(number: int, what: str) -> str:
    """Return ``1 rank``, ``2 ranks``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def result(value: Any) -> None:
    """Print the answer as one JSON object, paths and the like as text; nothing without --json."""
    if _json:
        sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
        sys.stdout.flush()


def note(text: str) -> None:
    """Tell something beside the result, on standard error, so that ``--json`` stays pure."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def error(text: str) -> None:
    """Print ``error: ...`` on standard error, red in a terminal."""
    red = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    note(f"\x1b[31merror:\x1b[0m {text}" if red else f"error: {text}")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows under a title; without a terminal one line a row, cells two spaces apart."""
    cells = [[_cell(value) for value in row] for row in rows]
    if is_plain():
        widths = [
            max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(columns)
        ]
        out(f"{title}:" if cells else f"{title}: none")
        for row in [list(columns), *cells] if cells else []:
            line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
            out(f"  {line.rstrip()}")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for name in columns:
        drawn.add_column(name)
    for row in cells:
        drawn.add_row(*(Text(cell) for cell in row))
    Console(stderr=_json).print(drawn)


def failure(kind: str, message: str) -> None:
    """Tell why a verb failed: a line on standard error, or with ``--json`` one JSON object."""
    if _json:
        result({"error": {"type": kind, "message": message}})
    else:
        error(message)


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)
