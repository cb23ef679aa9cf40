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
    from train_jobs.data.example import Example
    from train_jobs.data.preview import Decode, Piece

app = typer.Typer(help="Training data, as the trainer sees it.")


@app.callback()
def _group() -> None:
    """Keep `preview` a verb of its own while it is the only one."""


@app.command()
def preview(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A file of configs/train/.")],
    count: Annotated[int, typer.Option("-n", min=1, metavar="N", help="Examples to show.")] = 3,
    heldout: Annotated[
        bool, typer.Option("--heldout", help="Those that are only measured.")
    ] = False,
    overrides: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Show examples as tokens, with what is trained marked, and what became of the other rows."""
    console.use_json(as_json)
    from cluster.errors import ConfigError
    from train_jobs.data import preview as shown
    from train_jobs.plan import resolve
    from train_jobs.task import Task

    task = Task.load(resolve(config, overrides or []))
    data = task.heldout if heldout else task.train
    if data is None:
        raise ConfigError(
            f"{config}: nothing is held out; name a file as data.heldout, or say data.split: 0.05"
        )
    decode, kind = shown.decoder(task.base.path), task.config.objective.kind
    examples = data.first(count)
    for example in examples:
        _show(kind, example, decode)
    fill = None
    if not task.config.objective.packed:
        measured = ([example.tokens for example in row] for row in data.rows)
        batches = measured if heldout else shown.epoch(task.order, task.config.batch.micro)
        fill = shown.padded_fill(batches)
    totals = shown.totals(data, fill)
    for line in (*shown.details(totals), shown.told(totals)):
        console.out(line)
    found = [shown.as_json(kind, example, decode) for example in examples]
    console.result({**totals, "shown": found})


def _show(kind: str, example: Example, decode: Decode) -> None:
    from train_jobs.data.preview import parts_of, pieces

    label = "" if example.label is None else f", label {example.label!r:.200}"
    told = f"{example.tokens} tokens, {example.trained_tokens} trained{label}"
    console.out(f"{example.where}  {told}")
    for name, document in zip(parts_of(kind, example), example.documents, strict=True):
        if name:
            console.out(f"-- {name}")
        _print(list(pieces(document, decode)))


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
