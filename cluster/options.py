"""What the verbs have in common: ``--json``, ``--dry-run``, and arguments that complete.

Completion runs at every press of the tab key: directory listings only, nothing heavy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from cluster.home import library_dir

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")]


def who(verb: str) -> str:
    """Return what a record says of whoever runs a verb: the user and the verb."""
    user = os.environ.get("USER") or os.environ.get("LOGNAME")
    return f"{user} ({verb})" if user else verb


def complete_name(incomplete: str) -> list[str]:
    """Return the library's model names."""
    return [name for name in _listed(library_dir() / "models") if name.startswith(incomplete)]


def complete_version(incomplete: str) -> list[str]:
    """Return ``name@number`` for every version; names first, while more than one fits."""
    return _complete(incomplete, with_aliases=False)


def complete_ref(incomplete: str) -> list[str]:
    """Return references: names first, and behind a name its versions and aliases."""
    return _complete(incomplete, with_aliases=True)


Ref = Annotated[
    str,
    typer.Argument(metavar="REF", help="name, name@3 or name@alias.", autocompletion=complete_ref),
]
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="The model's name.", autocompletion=complete_name)
]


def _complete(incomplete: str, with_aliases: bool) -> list[str]:
    names = complete_name(incomplete.partition("@")[0])
    if "@" not in incomplete and len(names) != 1:
        return names
    found = [f"{name}@{selector}" for name in names for selector in _selectors(name, with_aliases)]
    bare = names if with_aliases and "@" not in incomplete else []
    return [text for text in [*bare, *found] if text.startswith(incomplete)]


def _selectors(name: str, with_aliases: bool) -> Iterator[str]:
    home = library_dir() / "models" / name
    numbers = [text for text in _listed(home / "versions") if text.isdecimal()]
    for number in sorted(numbers, key=int):
        if (home / "versions" / number / "manifest.json").is_file():  # else it was removed
            yield number
    if with_aliases:
        try:
            yield from sorted(json.loads((home / "aliases.json").read_text())["aliases"])
        except (OSError, ValueError, KeyError, TypeError):
            return  # nothing to offer; the verb itself says what is wrong with the file


def _listed(directory: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except OSError:
        return []
