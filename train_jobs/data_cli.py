"""``roundhouse data``: look at what a run would learn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster import console
from cluster.options import AsJson
from train_jobs.verbs import Sets

if TYPE_CHECKING:
    from train_jobs.data.preview import Piece

app = typer.Typer(help="Training data, as the trainer sees it.")


@app.callback()
def _group() -> None:
    """Keep `preview` a verb of its own while it is the only one."""


@app.command()
def preview(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A file of configs/train/.")],
    count: Annotated[int, typer.Option("-n", min=1, metavar="N", help="Dialogues to show.")] = 3,
    heldout: Annotated[
        bool, typer.Option("--heldout", help="Those that are only measured.")
    ] = False,
    overrides: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Show dialogues as tokens, with what is trained marked, and how full the rows are."""
    console.use_json(as_json)
    from cluster.errors import ConfigError
    from train_jobs.data import preview as shown
    from train_jobs.plan import resolve
    from train_jobs.task import Task

    task = Task.load(resolve(config, overrides or []))
    data = task.heldout if heldout else task.train
    if data is None:
        raise ConfigError(f"{config}: data.heldout: names no file, so nothing is held out")
    decode = shown.decoder(task.base.path)
    rows = [(d, list(shown.pieces(d, decode))) for d in shown.first_documents(data, count)]
    for document, parts in rows:
        console.out(
            f"{document.where}  {len(document.ids)} tokens, {document.trained_tokens} trained"
        )
        _print(parts)
    totals = shown.totals(data)
    console.out(shown.told(totals))
    console.result({**totals, "shown": [shown.as_json(*row) for row in rows]})


def _print(parts: Sequence[Piece]) -> None:
    from train_jobs.data.preview import marked

    if console.is_plain():
        console.out(marked(parts).rstrip("\n") + "\n")
        return
    from rich.console import Console
    from rich.text import Text

    text = Text()
    for part in parts:
        text.append(part.text, style="bold green" if part.trained else "dim")
    Console(stderr=console.is_json(), highlight=False).print(text)
