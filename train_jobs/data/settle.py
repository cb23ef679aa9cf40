"""What only the whole data can tell: which labels there are, and which sentences make pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.text.chat import ChatText
from train_jobs.data.dataset import Dataset
from train_jobs.data.encoders.masked import paired
from train_jobs.data.example import Example
from train_jobs.objectives.settings import (
    MaskedLM,
    Objective,
    SequenceClassification,
    TokenClassification,
)

MEASURED_TOGETHER = 16
"""Examples of one pass of an evaluation, where they are not packed. Always as many, so that what
is drawn for each of them depends neither on the ranks nor on their memory."""


def settle(
    objective: Objective, base: Path, train: Dataset, heldout: Dataset | None, seed: int
) -> tuple[Objective, Dataset, Dataset | None]:
    """Return the objective with all its labels, and the data ready for it.

    Raises:
        ConfigError: fewer than two labels; a row with a label that the list, or the training
            data, does not have; sentences that make no pairs.
    """
    match objective:
        case SequenceClassification() | TokenClassification():
            objective = with_labels(objective, train, heldout)
        case MaskedLM(next_sentence=True):
            text = ChatText.load(base)
            train = _pairs(train, text, seed)
            heldout = heldout and _pairs(heldout, text, seed)
        case _:
            pass
    if heldout and not objective.packed:
        heldout = together(heldout)
    return objective, train, heldout


def with_labels(
    objective: SequenceClassification | TokenClassification, train: Dataset, heldout: Dataset | None
) -> SequenceClassification | TokenClassification:
    """Return the objective with the labels that its model will have outputs for."""
    if isinstance(objective, SequenceClassification) and objective.problem == "regression":
        return objective
    found = {name for label in train.labels() for name in names(label)}
    labels = objective.labels or tuple(sorted(found, key=_natural))
    if len(labels) < 2:
        has = f"none but {labels[0]!r:.60}" if labels else "none"
        raise ConfigError(
            f"{next(_examples(train)).where}: label: a classifier needs at least two labels, the "
            f"training data has {has}"
        )
    for data in (train, heldout):
        if data and not {name for label in data.labels() for name in names(label)} <= {*labels}:
            raise _unknown(data, labels, bool(objective.labels))
    return objective.model_copy(update={"labels": labels})


def names(label: Any) -> Iterable[str]:
    """Return the names in a label, however many it has."""
    return (label,) if isinstance(label, str) else (name for name in label if name is not None)


def _unknown(data: Dataset, labels: tuple[str, ...], listed: bool) -> ConfigError:
    """Return what is wrong with the first row that has another label than these."""
    source = "objective.labels" if listed else "the training data"
    where, name = next(
        (example.where, name)
        for example in _examples(data)
        for name in names(example.label)
        if name not in labels
    )
    return ConfigError(
        f"{where}: label: {name!r:.60} is none of {source}: {', '.join(labels[:20])}; correct the "
        "row, or list it in objective.labels"
    )


def together(data: Dataset, count: int = MEASURED_TOGETHER) -> Dataset:
    """Return the data with ``count`` examples a row, the shortest first: they need less padding."""
    examples = sorted(_examples(data), key=lambda example: example.tokens)
    rows = tuple(tuple(examples[start : start + count]) for start in range(0, len(examples), count))
    return replace(data, rows=rows)


def _pairs(data: Dataset, text: ChatText, seed: int) -> Dataset:
    made = paired(list(_examples(data)), text, seed, data.max_len)
    return replace(data, rows=tuple((pair,) for pair in made))


def _examples(data: Dataset) -> Iterator[Example]:
    return (example for row in data.rows for example in row)


def _natural(label: str) -> tuple[bool, float, str]:
    """Order numbers by their value, before all other labels."""
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label
