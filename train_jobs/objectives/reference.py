"""What the base itself thinks of the data: computed once, kept with the run, no second model.

The base is the reference of DPO and KTO, and the policy begins as the base. So its
log-probabilities are computed before the first step, each row by itself and therefore the same
for any number of ranks, and a resumed run reads them from the run's folder.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.errors import JobError
from train_jobs.data.dataset import Dataset
from train_jobs.data.example import Document
from train_jobs.objectives.head import Head, nll
from train_jobs.objectives.packed import Packed, pack_documents
from train_jobs.ports import World
from train_jobs.ulysses import Team

NAME = "reference.safetensors"

Known = dict[bytes, float]
"""By fingerprint, the log-probability of a document's trained tokens, summed, in nats."""


@dataclass(frozen=True)
class Documents:
    """Rows of documents that are made when they are asked for."""

    count: int
    row: Callable[[int], Sequence[Document]]

    @classmethod
    def of(cls, data: Dataset) -> Documents:
        """Return the documents of each row."""
        rows = data.rows
        return cls(len(rows), lambda n: [d for example in rows[n] for d in example.documents])


def fingerprint(document: Document) -> bytes:
    """Return what tells a document from others: a hash of its tokens and of which are trained."""
    told = array("q", document.ids).tobytes() + bytes(document.trained)
    return hashlib.blake2b(told, digest_size=16).digest()


def log_probabilities(head: Head, model: Any, packed: Packed) -> torch.Tensor:
    """Return the summed log-probability of each document's trained tokens, with gradients."""
    return -packed.by_document(head.rows(model, packed.inputs, nll, packed.targets_K)[:, 0])


def remember(
    head: Head,
    model: Any,
    parts: Sequence[Documents],
    path: Path,
    world: World,
    team: Team | None = None,
) -> Known:
    """Return what ``model`` thinks of all documents; every rank calls it and gets all.

    Read from ``path`` where an earlier process of this run has written it for the same documents.
    ``team`` shares each row.
    """
    rows = [part.row for part in parts for _ in range(part.count)]
    places = [number for part in parts for number in range(part.count)]

    def row(number: int) -> Sequence[Document]:
        return rows[number](places[number])

    every = Documents(len(rows), row)
    names = [fingerprint(document) for n in range(every.count) for document in row(n)]
    about = hashlib.sha256(b"".join(names)).hexdigest()
    told: list[Any] = [read(path, about) if world.rank == 0 else None]
    dist.broadcast_object_list(told)
    values = told[0]
    if values is None:
        # it may take long: whoever follows the run is told what it waits for
        world.report({"event": "reference", "documents": len(names)})
        values = compute(head, model, every, world, team)
        if world.rank == 0:
            write(path, values, about)
    return dict(zip(names, values, strict=True))


def compute(
    head: Head, model: Any, rows: Documents, world: World, team: Team | None = None
) -> list[float]:
    """Return the value of each document, in order; the ranks, or their teams, divide the rows.

    Every rank runs equally many passes, because ZeRO 3 gathers parameters in each of them.
    """
    training = model.training
    model.eval()
    device, mine = next(model.parameters()).device, []
    sharing = team.size if team else 1
    with torch.no_grad():
        for first in range(0, rows.count, world.size // sharing):
            number = first + world.rank // sharing
            row = rows.row(number if number < rows.count else 0)
            packed = pack_documents(row, device).slice_of(team)
            found = log_probabilities(head, model, packed).tolist()
            if number < rows.count:
                mine.append((number, found))
    model.train(training)
    every: list[Any] = [None] * world.size
    dist.all_gather_object(every, mine)
    found_at = {number: found for share in every for number, found in share}
    return [value for number in sorted(found_at) for value in found_at[number]]


def value_of(known: Known, document: Document) -> float:
    """Return what the reference thinks of a document; JobError where nobody asked it before."""
    value = known.get(fingerprint(document))
    if value is None:
        raise JobError(
            f"{document.where}: the reference has no log-probability of this row; it is computed "
            "when a run begins, for the rows of that run only"
        )
    return value


def read(path: Path, about: str) -> list[float] | None:
    """Return stored values, None where there are none for these documents."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            if (stored.metadata() or {}).get("documents") != about:
                return None
            values: list[float] = stored.get_tensor("logps").tolist()
    except (FileNotFoundError, SafetensorError):
        return None
    return values


def write(path: Path, values: Iterable[float], about: str) -> None:
    """Store values by rename, so that a reader sees all of them or none."""
    from safetensors.torch import save_file

    staged = path.with_suffix(".partial")
    save_file(
        {"logps": torch.tensor(list(values), dtype=torch.float64)}, staged, {"documents": about}
    )
    os.replace(staged, path)
