"""From sources to rows of examples. No torch: the plan of a run needs these numbers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from cluster.errors import ConfigError
from train_jobs.data.duplicates import exact
from train_jobs.data.example import Example
from train_jobs.data.packing import fill_rate, pack
from train_jobs.data.readers import find
from train_jobs.data.selection import (
    Pool,
    Shape,
    divided,
    fitting,
    weighed,
    without_duplicates,
    without_heldout,
)
from train_jobs.data.settings import HUB, Data, Source
from train_jobs.data.store import Cache, Tokens
from train_jobs.data.tokenise import opened, tokens_of
from train_jobs.objectives.settings import Objective

Row = tuple[Example, ...]

LENIENT = {"max_bad_share": 1.0, "max_empty_share": 1.0, "split": 0.0, "deduplicate": "none"}
"""For the head of a source: nothing is refused that the rows behind it could make good."""


@dataclass(frozen=True)
class Report:
    """What happened to the rows of some sources on their way."""

    sources: tuple[dict[str, Any], ...] = ()
    """``path``, ``form``, ``rows``, ``bad`` and ``weight`` of each."""
    bad_rows: tuple[str, ...] = ()
    """Place and fault of the first that were skipped."""
    scrubbed: Mapping[str, int] = field(default_factory=dict)
    """What was replaced, by kind."""
    too_long: int = 0
    """Left out because of their length."""
    truncated: int = 0
    duplicates: int = 0
    """Equal to an earlier row, whether removed or not."""
    removed: int = 0
    """Duplicates that were left out."""
    also_heldout: int = 0
    """Left out because they are measured."""


@dataclass(frozen=True)
class Dataset:
    """Examples in rows: what is dealt out to steps and ranks. Packed, a row holds several."""

    rows: Sequence[Row]
    max_len: int
    empty: int
    """Records that were left out because nothing in them is trained."""
    sha256: str
    """Of the sources."""
    report: Report = field(default_factory=Report)
    hashes: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each source file: what lineage remembers."""
    partial: bool = False
    """Whether a source has more rows than were read: nothing is known of the whole."""

    @property
    def examples(self) -> int:
        """Examples in all rows."""
        return len(self.rows.pool) if isinstance(self.rows, Rows) else len(self.lengths)

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each example, in the order of the rows."""
        if isinstance(self.rows, Rows):
            return self.rows.lengths
        return [example.tokens for row in self.rows for example in row]

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        if isinstance(self.rows, Rows):
            return self.rows.tokens
        return tuple(sum(example.tokens for example in row) for row in self.rows)

    @property
    def row_work(self) -> tuple[int, ...]:
        """About what each row costs: every token the layers, a trained one the head as well."""
        if isinstance(self.rows, Rows):
            return self.rows.work
        return tuple(sum(e.tokens + e.trained_tokens for e in row) for row in self.rows)

    @property
    def tokens(self) -> int:
        """Tokens of one pass over the rows."""
        return sum(self.lengths)

    @property
    def trained_tokens(self) -> int:
        """Tokens of one pass that the loss counts."""
        if isinstance(self.rows, Rows):
            return int(self.rows.pool.trained.sum())
        return sum(example.trained_tokens for row in self.rows for example in row)

    @property
    def fill(self) -> float:
        """Share of the rows that is documents, 0 to 1."""
        return fill_rate(self.lengths, len(self.rows), self.max_len)

    def first(self, count: int) -> list[Example]:
        """Return the first examples, in the order of the sources."""
        if isinstance(self.rows, Rows):
            return [self.rows.pool.example(at) for at in range(min(count, self.examples))]
        return [example for row in self.rows for example in row][:count]

    def labels(self) -> list[Any]:
        """Return the label of every example, in no order that means anything."""
        if isinstance(self.rows, Rows):
            return list(self.rows.pool.labels())
        return [example.label for row in self.rows for example in row]


class Rows(Sequence[Row]):
    """Rows whose examples are made from mapped tokens when they are asked for."""

    def __init__(self, pool: Pool, rows: Sequence[Sequence[int]] | None) -> None:
        """Divide the examples of ``pool``; ``rows`` None makes each a row of its own."""
        self.pool = pool
        if rows is None:
            self._members = np.arange(len(pool))
            self._starts = np.arange(len(pool) + 1)
        else:
            self._members = np.fromiter((n for row in rows for n in row), dtype=np.int64)
            self._starts = np.cumsum([0, *map(len, rows)])

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example, in the order of the rows."""
        lengths: list[int] = self.pool.lengths[self._members].tolist()
        return lengths

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return self._by_row(self.pool.lengths)

    @property
    def work(self) -> tuple[int, ...]:
        """Tokens of each row, and those that are trained once more."""
        return self._by_row(self.pool.lengths + self.pool.trained)

    def _by_row(self, numbers: NDArray[np.int64]) -> tuple[int, ...]:
        whole = np.concatenate([[0], np.cumsum(numbers[self._members])])
        return tuple((whole[self._starts[1:]] - whole[self._starts[:-1]]).tolist())

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        if isinstance(at, slice):
            return [self[one] for one in range(*at.indices(len(self)))]
        number = range(len(self))[at]
        start, end = self._starts[number : number + 2]
        return tuple(self.pool.example(int(one)) for one in self._members[start:end])

    def __iter__(self) -> Iterator[Row]:
        return (self[at] for at in range(len(self)))


def load_datasets(
    config: Data,
    objective: Objective,
    base: Path,
    cache: Cache | None = None,
    head: int | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Read, tokenise and pack what a run learns from, and what it is measured on.

    Not packed, every example is a row of its own. ``head`` bounds the rows of each source that
    are read; of longer ones nothing is refused that other rows could make good.

    Raises:
        ConfigError: a source or a row that cannot be; an example longer than ``max_len``; more
            bad rows, or rows without a trained token, than the configuration allows.
    """
    opened(objective, base)  # refuses what cannot be, also where all tokens are there already

    def read(sources: Sequence[Source]) -> list[tuple[Tokens, dict[str, str]]]:
        return [tokens_of(one, config, objective, base, cache, head) for one in sources]

    learnt, measured = read(config.train), read(config.heldout) if config.heldout else None
    partial = any(tokens.partial for tokens, _ in (*learnt, *(measured or ())))
    rules = config.model_copy(update=LENIENT) if partial else config
    shape = shape_of(objective, config.max_len)
    train, heldout = _Part.of(learnt, config.train, rules, shape), None
    if config.heldout and measured:
        heldout = _Part.of(measured, config.heldout, rules, shape)
    elif rules.split:
        train, heldout = train.divided(rules.split)
    train = train.unique(rules.deduplicate)
    if heldout:
        heldout = heldout.unique(rules.deduplicate)
        train = train.apart_from(heldout, rules.deduplicate)
    if not partial:
        train = train.weighed([source.weight for source in config.train])
    names, packed = (
        short_names([*train.hashes, *(heldout.hashes if heldout else ())]),
        objective.packed,
    )
    kept = train.rows(packed, names), heldout.rows(packed, names) if heldout else None
    return replace(kept[0], partial=partial), kept[1]


def hashes_of(config: Data) -> dict[str, str]:
    """Return the SHA-256 of each source file by its name in lineage, without reading a row.

    Raises ConfigError for a source that is not there.
    """
    sources = (*config.train, *(config.heldout or ()))
    found: dict[str, str] = {}
    for source in sources:
        found |= find(source).hashes()
    names = short_names(list(found))
    return {names[path]: value for path, value in found.items()}


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Return for each path what lineage calls it: without the folder that all of them share."""
    files = [path for path in paths if not path.startswith(HUB)]
    shared = os.path.commonpath([os.path.dirname(path) for path in files]) if files else ""
    return {path: os.path.relpath(path, shared) if path in files else path for path in paths}


def shape_of(objective: Objective, max_len: int) -> Shape:
    """Return what an example of an objective must fit into."""
    if getattr(objective, "next_sentence", False):
        return Shape(1 << 31, together=False)  # documents are sentences, of which pairs are made
    apart = objective.family == "seq2seq" or objective.kind == "reward"
    return Shape(max_len, together=not apart, ending=objective.family != "decoder")


@dataclass(frozen=True)
class _Part:
    """One of the two data sets while it is made."""

    pool: Pool
    max_len: int
    empty: int
    report: Report
    hashes: Mapping[str, str]

    @classmethod
    def of(
        cls,
        read: Sequence[tuple[Tokens, dict[str, str]]],
        sources: Sequence[Source],
        config: Data,
        shape: Shape,
    ) -> _Part:
        tokens = [found for found, _ in read]
        _check_bad(tokens, config.max_bad_share)
        if not any(map(len, tokens)):
            raise ConfigError(f"{', '.join(tokens[0].names)}: holds no rows")
        kept = fitting(Pool.of(tokens, shape), config)
        scrubbed: dict[str, int] = {}
        for kind, times in (item for one in tokens for item in one.index["scrubbed"].items()):
            scrubbed[kind] = scrubbed.get(kind, 0) + times
        told = Report(
            tuple(_told(*both) for both in zip(sources, tokens, strict=True)),
            tuple(row for one in tokens for row in one.bad_rows()),
            scrubbed,
            kept.too_long,
            kept.truncated,
        )
        hashes = {name: value for _, found in read for name, value in found.items()}
        return cls(kept.pool, config.max_len, kept.empty, told, hashes)

    def divided(self, split: float) -> tuple[_Part, _Part]:
        train, heldout = divided(self.pool, split)
        told = Report(self.report.sources)
        return self._with(train), replace(self, pool=heldout, empty=0, report=told)

    def unique(self, how: str) -> _Part:
        found = int(exact(self.pool.digests).sum())
        pool = self.pool if how == "none" else without_duplicates(self.pool, how)
        removed = len(self.pool) - len(pool)
        return self._with(pool, duplicates=max(found, removed), removed=removed)

    def apart_from(self, heldout: _Part, how: str) -> _Part:
        if how == "none":
            return self
        pool = without_heldout(self.pool, heldout.pool, how)
        if not len(pool):
            raise ConfigError("data.train: every row of it is held out as well; train on others")
        return self._with(pool, also_heldout=len(self.pool) - len(pool))

    def weighed(self, weights: Sequence[float]) -> _Part:
        return self._with(weighed(self.pool, weights))

    def rows(self, packed: bool, names: Mapping[str, str]) -> Dataset:
        made = pack(self.pool.lengths.tolist(), self.max_len) if packed else None
        told = "\n".join(self.hashes.values())
        return Dataset(
            Rows(self.pool, made),
            self.max_len,
            self.empty,
            hashlib.sha256(told.encode()).hexdigest(),
            self.report,
            {names[path]: value for path, value in self.hashes.items()},
        )

    def _with(self, pool: Pool, **told: Any) -> _Part:
        return replace(self, pool=pool, report=replace(self.report, **told))


def _told(source: Source, tokens: Tokens) -> dict[str, Any]:
    return {
        "path": str(source.path),
        "form": tokens.index["form"],
        "rows": len(tokens),
        "bad": tokens.index["bad"],
        "weight": source.weight,
    }


def _check_bad(tokens: Sequence[Tokens], allowed: float) -> None:
    bad = sum(one.index["bad"] for one in tokens)
    total = bad + sum(map(len, tokens))
    if bad > allowed * total:
        first = next(row for one in tokens for row in one.bad_rows())
        raise ConfigError(
            f"{first}; {bad} of {total} rows are bad, data.max_bad_share allows {allowed:g}; mend "
            "them, or raise the share to leave them out"
        )
