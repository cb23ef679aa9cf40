"""What was measured of a version after it was published.

    <root>/models/<name>/evaluations/<number>/<id>.json     the figures, written last
    <root>/models/<name>/evaluations/<number>/<id>.jsonl    one example a line

A version is immutable, its manifest sealed: what is learnt of it later lies beside it. An id is
made of what was asked, so that asking again replaces the answer.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from cluster.config import Frozen
from cluster.errors import Corrupt
from cluster.library.disk import explained, locked, write_durably

KEPT = 100_000
"""Examples whose outcomes are stored; of more, the first."""
LOWER_IS_BETTER = frozenset(
    {"loss", "perplexity", "pseudo_perplexity", "calibration_error", "mse", "nll", "divergence"}
)
HIGHER_IS_BETTER = frozenset(
    {
        *("accuracy", "token_accuracy", "next_sentence_accuracy", "entity_f1", "f1_macro"),
        *("f1_micro", "matthews", "exact_match", "bleu", "chrf", "rouge_l", "pearson", "spearman"),
        *("margin", "reward"),
    }
)


class Figure(Frozen):
    """One figure with its bootstrap interval."""

    value: float
    low: float | None = None
    high: float | None = None


class Evaluation(Frozen):
    """One evaluation of one version."""

    schema_version: Literal[1] = 1
    id: str
    ref: str
    digest: str
    """Of the version's content."""
    created: str
    """UTC, ISO 8601."""
    objective: dict[str, Any]
    """What was asked of the model, with all its settings."""
    data: dict[str, str]
    """Each file's name to the SHA-256 of its bytes."""
    settings: dict[str, Any] = {}
    """What else decides the figures: how long rows may be, the number format, the seed."""
    reference: str | None = None
    """The version that preferences are measured against."""
    examples: int
    kept: int
    """Examples whose outcomes are stored."""
    level: float = 0.95
    """Of the intervals."""
    draws: int
    """Resamples that the intervals were taken from."""
    figures: dict[str, Figure]
    code_revision: str | None = None


def id_of(objective: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Return the id of an evaluation: the objective's kind and a hash of all that was asked."""
    told = json.dumps([dict(objective), dict(asked)], sort_keys=True, default=str)
    return f"{objective['kind']}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def folder(root: Path, name: str, number: int) -> Path:
    """Return where the evaluations of a version lie."""
    return root / "models" / name / "evaluations" / str(int(number))


def write(
    root: Path, name: str, number: int, found: Evaluation, outcomes: Sequence[Mapping[str, Any]]
) -> Path:
    """Store an evaluation and the first ``KEPT`` outcomes of it; returns the file of figures.

    NotEnough when the disk is full, LibraryError when it cannot be written; then what was there
    before is still there.
    """
    place = folder(root, name, number)
    text = "".join(json.dumps(outcome) + "\n" for outcome in outcomes[:KEPT]).encode()
    with explained(f"evaluation of {found.ref}", place, len(text)):
        place.mkdir(parents=True, exist_ok=True)
        with locked(place / ".lock", f"evaluation of {found.ref}"):
            (place / f"{found.id}.json").unlink(missing_ok=True)  # never figures of other outcomes
            write_durably(place / f"{found.id}.jsonl", text)
            whole = found.model_dump_json(indent=2) + "\n"
            write_durably(place / f"{found.id}.json", whole.encode())
    return place / f"{found.id}.json"


def of(root: Path, name: str, number: int) -> list[Evaluation]:
    """Return what was measured of a version, oldest first; what is no evaluation is left out."""
    found = []
    for path in folder(root, name, number).glob("*.json"):
        try:
            found.append(Evaluation.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError):
            continue
    return sorted(found, key=lambda one: one.created)


def outcomes(root: Path, name: str, number: int, found: Evaluation) -> list[dict[str, Any]]:
    """Return the stored outcomes; Corrupt when they are not as many as the record says."""
    path = folder(root, name, number) / f"{found.id}.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise Corrupt(
            f"{path}: cannot be read ({error}); evaluate {found.ref} again with --again"
        ) from None
    if len(rows) != found.kept:
        raise Corrupt(
            f"{path}: holds {len(rows)} outcomes instead of {found.kept}; evaluate {found.ref} "
            "again with --again"
        )
    return rows


def forget(root: Path, name: str, number: int) -> None:
    """Delete what was measured of a version that is removed."""
    shutil.rmtree(folder(root, name, number), ignore_errors=True)


def lines(found: Iterable[Evaluation]) -> list[tuple[str, str, str]]:
    """Return what a table says of evaluations: objective and data, figures, date."""
    return [
        (
            f"{one.objective['kind']} on {', '.join(Path(name).name for name in one.data)}",
            "  ".join(f"{name} {told(figure)}" for name, figure in one.figures.items()),
            re.sub(r"T.*", "", one.created),
        )
        for one in found
    ]


def told(figure: Figure) -> str:
    """Return ``0.8911 [0.8693, 0.9106]``."""
    value = f"{figure.value:.4f}"
    return value if figure.low is None else f"{value} [{figure.low:.4f}, {figure.high:.4f}]"
