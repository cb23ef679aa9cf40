"""What the command line prints: rich in a terminal, plain lines without one, JSON on request."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def is_plain() -> bool:
    """Say whether output goes to something other than a terminal that knows colours."""
    return not sys.stdout.isatty() or os.environ.get("TERM") == "dumb" or "NO_COLOR" in os.environ


def out(text: str = "") -> None:
    """Print one text to standard output, as it is: nothing in it is taken for markup."""
    sys.stdout.write(text + "\n")
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
    Console().print(drawn)


def emit_json(value: Any) -> None:
    """Print one JSON document; paths and other objects as their text."""
    out(json.dumps(value, indent=2, default=str))


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)
