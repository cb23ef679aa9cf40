"""Equal and nearly equal rows, by what they say.

Exact: a digest of the record without case and surplus white space. Near: MinHash signatures of
all windows of WINDOW characters (Broder 1997), compared only where one of BANDS bands of the
signature is equal, which finds 95 % of the pairs at a similarity of 0.8 and all but one in ten
thousand at 0.9. Characters instead of words, so that texts without spaces are compared as well.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train_jobs.data.records import Record

SIGNATURE = 128
"""Hash functions of a signature: the similarity it tells is off by 0.04 at most, mostly."""
BANDS = 16
WINDOW = 9
SIMILAR = 0.8
"""Share of windows that two near duplicates have in common, over all that either has."""
_CHUNK = 4096
_IGNORED = frozenset({"where", "label", "tags", "role"})
"""What may differ between rows that say the same: a text with two labels is one text."""

_random = np.random.Generator(np.random.PCG64(20_000))
_FACTORS = _random.integers(1, 1 << 63, SIGNATURE, dtype=np.uint64) | np.uint64(1)
_TERMS = _random.integers(0, 1 << 63, SIGNATURE, dtype=np.uint64)
_PLACES = _random.integers(1, 1 << 63, WINDOW, dtype=np.uint64) | np.uint64(1)


def content(record: Record) -> str:
    """Return what a record says, normalised: what equal rows have in common."""
    told = (text for f in fields(record) if f.name not in _IGNORED
            for text in _texts(getattr(record, f.name)))  # fmt: skip
    return "\x1f".join(" ".join(unicodedata.normalize("NFC", t).casefold().split()) for t in told)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, below in value.items():
            if key not in _IGNORED:
                yield from _texts(below)
    elif isinstance(value, tuple | list):
        for below in value:
            yield from _texts(below)
    elif value is not None:
        yield str(value)


def digest(text: str) -> int:
    """Return 64 bits that differ for different texts."""
    hashed = hashlib.blake2b(text.encode(), digest_size=8)
    return int.from_bytes(hashed.digest(), "little")


def share(digests: NDArray[np.uint64], salt: str) -> NDArray[np.float64]:
    """Return for each digest a number in [0, 1): a die that always falls the same way."""
    # splitmix64's finaliser: digests are random already, the salt makes the dice independent
    mixed = digests ^ np.uint64(digest(salt))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) / float(1 << 53)


def signature(text: str) -> NDArray[np.uint32]:
    """Return the MinHash signature of a text, ``[SIGNATURE]``."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    # beyond its ends there is nothing, so that every character is in as many windows
    codes = np.pad(codes.astype(np.uint64), WINDOW - 1)
    windows = np.lib.stride_tricks.sliding_window_view(codes, WINDOW)
    least = np.full(SIGNATURE, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(windows), _CHUNK):
        hashes = (windows[start : start + _CHUNK] * _PLACES).sum(axis=1, dtype=np.uint64)
        hashes ^= hashes >> np.uint64(29)
        least = np.minimum(least, (hashes[:, None] * _FACTORS + _TERMS).min(axis=0))
    return (least >> np.uint64(32)).astype(np.uint32)


def exact(digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which rows equal an earlier one."""
    _, first = np.unique(digests, return_index=True)
    again = np.ones(len(digests), dtype=bool)
    again[first] = False
    return again


def near(signatures: NDArray[np.uint32], given: int = 0) -> NDArray[np.bool_]:
    """Return which rows are near an earlier one that stays. ``signatures`` is [rows, SIGNATURE].

    The first ``given`` rows stay in any case.
    """
    rows = len(signatures)
    again = np.zeros(rows, dtype=bool)
    buckets = _buckets(signatures)
    shared = np.zeros(rows, dtype=bool)
    for numbers in buckets:
        shared |= np.bincount(numbers)[numbers] > 1
    kept: list[dict[int, list[int]]] = [{} for _ in buckets]
    for row in np.flatnonzero(shared).tolist():
        mine = [(seen, int(numbers[row])) for seen, numbers in zip(kept, buckets, strict=True)]
        others = sorted({one for seen, bucket in mine for one in seen.get(bucket, ())})
        if others and row >= given and _similar(signatures[row], signatures[others]) >= SIMILAR:
            again[row] = True
            continue
        for seen, bucket in mine:
            seen.setdefault(bucket, []).append(row)
    return again


def _buckets(signatures: NDArray[np.uint32]) -> list[NDArray[np.int64]]:
    """Return for each band which rows have it in common, as numbers of buckets."""
    bands = np.ascontiguousarray(signatures).reshape(len(signatures), BANDS, -1)
    whole = np.dtype((np.void, bands.shape[2] * bands.itemsize))
    return [
        np.unique(np.ascontiguousarray(bands[:, band]).view(whole).ravel(), return_inverse=True)[1]
        for band in range(BANDS)
    ]


def _similar(one: NDArray[np.uint32], others: NDArray[np.uint32]) -> float:
    return float((others == one).mean(axis=1).max())
