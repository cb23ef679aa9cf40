"""How pieces lie in a node's object store: large ones alone, small ones together in a block.

An object costs about a millisecond to put and half of one to hand to a reader, whatever its size,
and an adapter has hundreds of small matrices. A block goes when the last of its pieces has: what
came together goes together as a rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from cluster.weights.layout import Array

ALONE_BYTES = 1 << 20
"""A piece of so many bytes has an object of its own."""
BLOCK_BYTES = 8 << 20
"""Small pieces fill a block up to about so many."""


class Store(Protocol):
    """Where pieces lie: the object store, or a list in a test."""

    def put(self, arrays: Sequence[Array]) -> Any:
        """Take a copy of arrays as one object; what is returned keeps it."""

    def get(self, references: Sequence[Any]) -> list[list[Array]]:
        """Return what lies there, without a copy where it lies on this node."""

    def spilled(self, references: Sequence[Any]) -> list[bool]:
        """Say of each whether it had to make room in memory, and lies on the node's disk."""


class Place(NamedTuple):
    """Where a piece lies."""

    reference: Any
    """Of an object, which other pieces may share."""
    at: int
    """Which of its arrays."""


def blocks(arrays: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """Yield pieces as they are to lie together."""
    block, size = dict[str, Array](), 0
    for piece, array in arrays.items():
        if array.nbytes >= ALONE_BYTES:
            yield {piece: array}
            continue
        block[piece] = array
        size += array.nbytes
        if size >= BLOCK_BYTES:
            yield block
            block, size = {}, 0
    if block:
        yield block


def read(store: Store, places: Sequence[Place]) -> list[Array]:
    """Return the arrays that lie at ``places``; each object is asked for once."""
    references = {id(place.reference): place.reference for place in places}
    objects = dict(zip(references, store.get(list(references.values())), strict=True))
    return [objects[id(place.reference)][place.at] for place in places]
