"""Which examples take part: what is too long, empty, held out or a duplicate, by arrays alone.

Tokens stay on disk; here only numbers about them are held, some 50 bytes an example.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import ConfigError
from train_jobs.data import duplicates
from train_jobs.data.example import Example
from train_jobs.data.settings import Data
from train_jobs.data.store import Cut, Tokens

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Shape:
    """What an example must fit into."""

    max_len: int
    together: bool = True
    """Whether all its documents share a row, or each has one."""
    ending: bool = False
    """Whether the last token of a document survives a cut, as an encoder's separator must."""

    def fits(self, lengths: Sequence[int]) -> bool:
        """Say whether documents of these lengths fit."""
        return (sum(lengths) if self.together else max(lengths)) <= self.max_len

    def cuts(self, lengths: Sequence[int]) -> list[Cut]:
        """Return what to keep of each document; those that share a row give up the longest."""
        limit = self._limit(lengths) if self.together else self.max_len
        return [Cut(min(length, limit), self.ending) for length in lengths]

    def _limit(self, lengths: Sequence[int]) -> int:
        """Return the greatest length to which all can be cut so that they fit together."""
        room, waiting = self.max_len, sorted(lengths)
        for at, length in enumerate(waiting):
            share = room // (len(waiting) - at)
            if length > share:
                return max(1, share)
            room -= length
        return max(lengths)


@dataclass(frozen=True)
class Pool:
    """Examples of several sources, in the order of the sources and of their rows."""

    sources: tuple[Tokens, ...]
    shape: Shape
    source: NDArray[np.int32]
    number: NDArray[np.int64]
    """Of an example in its source."""
    lengths: NDArray[np.int64]
    """Tokens, after a cut."""
    trained: NDArray[np.int64]
    digests: NDArray[np.uint64]

    @classmethod
    def of(cls, sources: Sequence[Tokens], shape: Shape) -> Pool:
        """Take in all examples as they are."""
        parts = [(at, one) for at, one in enumerate(sources) if len(one)]
        assert parts, "a source without an example is refused before"

        def joined(values: Iterator[NDArray[Any]], dtype: Any) -> NDArray[Any]:
            whole: NDArray[Any] = np.concatenate([np.asarray(one) for one in values])
            return whole.astype(dtype)

        return cls(
            tuple(sources),
            shape,
            joined((np.full(len(one), at) for at, one in parts), np.int32),
            joined((np.arange(len(one)) for _, one in parts), np.int64),
            joined((summed(one, "doc_tokens") for _, one in parts), np.int64),
            joined((summed(one, "doc_trained") for _, one in parts), np.int64),
            joined((one.arrays["digest"] for _, one in parts), np.uint64),
        )

    def __len__(self) -> int:
        return len(self.source)

    def take(self, which: NDArray[Any]) -> Pool:
        """Return some of the examples, by flags or by their numbers here."""
        names = ("source", "number", "lengths", "trained", "digests")
        return replace(self, **{name: getattr(self, name)[which] for name in names})

    def where(self, at: int) -> str:
        """Return ``file:line``."""
        return self._tokens(at).where(int(self.number[at]))

    def example(self, at: int) -> Example:
        """Return one example, cut where it is too long."""
        tokens, number = self._tokens(at), int(self.number[at])
        lengths = self.document_lengths(at)
        return tokens.example(
            number, None if self.shape.fits(lengths) else self.shape.cuts(lengths)
        )

    def labels(self) -> Iterator[Any]:
        """Yield the label of each example."""
        for source, number in zip(self.source.tolist(), self.number.tolist(), strict=True):
            yield self.sources[source].label(number)

    def labelled(self) -> Flags:
        """Return which examples have a label."""
        flags = [np.asarray(one.arrays["label_bytes"]) > 0 for one in self.sources]
        return self._gather(flags, bool)

    def near(self) -> NDArray[np.uint32]:
        """Return the signatures, ``[examples, SIGNATURE]``."""
        shaped = [
            np.asarray(one.arrays["near"]).reshape(-1, duplicates.SIGNATURE) for one in self.sources
        ]
        return self._gather(shaped, np.uint32)

    def too_long(self) -> Flags:
        """Return which examples do not fit as they are."""
        if self.shape.together:
            return self.lengths > self.shape.max_len
        most = [greatest(one, "doc_tokens") for one in self.sources]
        return self._gather(most, np.int64) > self.shape.max_len

    def cut(self, long: Flags) -> tuple[Pool, Flags]:
        """Return the pool with the lengths that a cut leaves, and which lost all of an answer."""
        lengths, trained = self.lengths.copy(), self.trained.copy()
        lost = np.zeros(len(self), dtype=bool)
        for at in np.flatnonzero(long).tolist():
            tokens = self._tokens(at)
            kept = self.example(at)
            before = tokens.arrays["doc_trained"][list(tokens.documents(int(self.number[at])))]
            after = [document.trained_tokens for document in kept.documents]
            lengths[at], trained[at] = kept.tokens, kept.trained_tokens
            lost[at] = any(b and not a for b, a in zip(before.tolist(), after, strict=True))
        return replace(self, lengths=lengths, trained=trained), lost

    def document_lengths(self, at: int) -> list[int]:
        """Return the tokens of each document of an example, before a cut."""
        tokens = self._tokens(at)
        numbers = tokens.documents(int(self.number[at]))
        found: list[int] = tokens.arrays["doc_tokens"][numbers.start : numbers.stop].tolist()
        return found

    def _tokens(self, at: int) -> Tokens:
        return self.sources[int(self.source[at])]

    def _gather(self, of_sources: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
        made = np.empty((len(self), *of_sources[0].shape[1:]), dtype=dtype)
        for at, values in enumerate(of_sources):
            mine = self.source == at
            made[mine] = values[self.number[mine]]
        return made


def summed(tokens: Tokens, name: str) -> NDArray[np.int64]:
    """Return the sum over each example's documents."""
    return np.add.reduceat(tokens.arrays[name], tokens.first[:-1], dtype=np.int64)


def greatest(tokens: Tokens, name: str) -> NDArray[np.int64]:
    """Return the greatest over each example's documents."""
    if not len(tokens):
        return np.empty(0, np.int64)
    return np.maximum.reduceat(tokens.arrays[name], tokens.first[:-1]).astype(np.int64)


@dataclass(frozen=True)
class Kept:
    """A pool after the rules about single examples, and how many each rule took."""

    pool: Pool
    empty: int = 0
    too_long: int = 0
    truncated: int = 0


def fitting(pool: Pool, config: Data) -> Kept:
    """Apply ``truncate`` and ``max_empty_share``.

    Raises ConfigError: an example is too long and may not be; too many have nothing to learn.
    """
    total, long = len(pool), pool.too_long()
    lost = np.zeros(total, dtype=bool)
    dropped = cut = 0
    if long.any():
        if config.truncate == "error":
            raise ConfigError(_too_long(pool, int(np.flatnonzero(long)[0]), int(long.sum())))
        if config.truncate == "end":
            pool, lost = pool.cut(long)
            cut = int(long.sum())
        else:
            dropped = int(long.sum())
            if dropped == total:
                raise ConfigError(_too_long(pool, 0, total))
            pool, lost = pool.take(~long), lost[~long]
    empty = ((pool.trained == 0) & ~pool.labelled()) | lost
    count = int(empty.sum())
    if count and (count == len(pool) or count > config.max_empty_share * total):
        raise ConfigError(
            f"{pool.where(int(np.flatnonzero(empty)[0]))}: no token of this example is trained, as "
            f"in {count} of {total} rows; data.max_empty_share allows {config.max_empty_share:g}. "
            "A dialogue needs an assistant's message, and what is cut off is not learnt; remove "
            "these rows, or raise the share to leave them out"
        )
    return Kept(pool.take(~empty), count, dropped, cut)


def _too_long(pool: Pool, at: int, count: int) -> str:
    lengths = pool.document_lengths(at)
    tokens = sum(lengths) if pool.shape.together else max(lengths)
    more = f", and {count - 1} more are too long" if count > 1 else ""
    return (
        f"{pool.where(at)}: this example has {tokens} tokens, data.max_len is "
        f"{pool.shape.max_len}{more}; shorten it, raise data.max_len, or say data.truncate: end "
        "or drop"
    )


def divided(pool: Pool, split: float) -> tuple[Pool, Pool]:
    """Return the part to train on and the part to hold out, decided by content."""
    held = duplicates.share(pool.digests, "heldout") < split
    if held.all() or not held.any():
        raise ConfigError(
            f"data.split={split:g} of {len(pool)} rows leaves "
            f"{'none to train on' if held.all() else 'none to hold out'}; choose another share, "
            "or name data.heldout"
        )
    return pool.take(~held), pool.take(held)


def without_duplicates(pool: Pool, how: str) -> Pool:
    """Return the first of equal, or of nearly equal, examples."""
    pool = pool.take(~duplicates.exact(pool.digests))
    return pool.take(~duplicates.near(pool.near())) if how == "near" else pool


def without_heldout(pool: Pool, heldout: Pool, how: str) -> Pool:
    """Return what of ``pool`` is not also held out."""
    pool = pool.take(~np.isin(pool.digests, heldout.digests))
    if how != "near" or not len(pool):
        return pool
    # those held out come first: what is near one of them goes
    both = duplicates.near(np.concatenate([heldout.near(), pool.near()]), len(heldout))
    return pool.take(~both[len(heldout) :])


def weighed(pool: Pool, weights: Sequence[float]) -> Pool:
    """Return the pool with each example as often as its source's weight says."""
    if all(weight == 1 for weight in weights):
        return pool
    weight = np.asarray(weights)[pool.source]
    whole = np.floor(weight)
    times = whole + (duplicates.share(pool.digests, "weight") < weight - whole)
    if not times.any():
        raise ConfigError("data.train: with these weights no row is left; raise one")
    return pool.take(np.repeat(np.arange(len(pool)), times.astype(np.int64)))
