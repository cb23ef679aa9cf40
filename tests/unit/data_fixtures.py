"""Files of rows, and a model directory that has a tokenizer only."""

from __future__ import annotations

import atexit
import csv
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tests.unit.text_fixtures import write_tokenizer
from train_jobs.data.dataset import Dataset, load_datasets
from train_jobs.data.example import Example
from train_jobs.data.settings import Data
from train_jobs.objectives.settings import ChatSFT, Objective


def said(question: str, answer: str) -> dict[str, Any]:
    """Return a row of messages."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def jsonl(path: Path, rows: Iterable[object]) -> Path:
    """Write a row a line; a text is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def table(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a csv file; what is no text is JSON."""
    rows = list(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    return path


@cache
def _model() -> str:
    """Return the folder of a tokenizer that is trained once for all tests."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    write_tokenizer(Path(folder.name))
    (Path(folder.name) / "config.json").write_text("{}")
    return folder.name


class Loader:
    """Loads data with one base and one home."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "model"
        shutil.copytree(_model(), self.base)

    def __call__(self, objective: Objective | None = None, **data: Any) -> Dataset:
        return self.both(objective, **data)[0]

    def both(
        self, objective: Objective | None = None, **data: Any
    ) -> tuple[Dataset, Dataset | None]:
        return load_datasets(Data(**data), objective or ChatSFT(), self.base)


def examples(data: Dataset) -> list[Example]:
    """Return the examples in the order of their source."""
    return data.first(data.examples)


def labels(data: Dataset) -> list[Any]:
    """Return the label of each example."""
    return [example.label for example in examples(data)]


def told(data: Dataset) -> list[Any]:
    """Return what examples are, without their place."""
    return [
        ([(d.ids, d.trained) for d in example.documents], example.label)
        for example in examples(data)
    ]
