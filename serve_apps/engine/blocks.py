"""Which blocks of the cache are free, and which still hold what somebody may ask for again. Pure.

A block is *held* while requests have it in their tables, *cached* while nobody does and its
content is known by a key, else *free*. A key is a chained hash: of the block's tokens and of the
key before it, whose first link names version, adapter and salt. So equal keys mean equal tokens
in equal places under equal weights, and nobody finds a block whose salt he does not know.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import chain as joined

Key = bytes
KEY_BYTES = 32
NOBODY = ("", "")
"""The weights, version and adapter, of a block whose content is not known."""


def root(version: str, adapter: str, salt: str) -> Key:
    """Return the key before the first block's."""
    return blake2b(repr((version, adapter, salt)).encode(), digest_size=KEY_BYTES).digest()


def chain(before: Key, ids: Sequence[int]) -> Key:
    """Return the key of a full block of ``ids`` that follows the block of key ``before``."""
    return blake2b(before + array("i", ids).tobytes(), digest_size=KEY_BYTES).digest()


class BlockPool:
    """All blocks of a cache; the least recently held of the cached ones are given up first."""

    def __init__(self, total: int) -> None:
        self.total = total
        # Lowest first: pages of the cache that were never written stay out of memory.
        self._free = list(range(total - 1, -1, -1))
        self._cached = OrderedDict[int, None]()
        self._readers = [0] * total
        self._keys: list[Key | None] = [None] * total
        self._weights = [NOBODY] * total
        self._index: dict[Key, int] = {}

    @property
    def available(self) -> int:
        """Blocks that ``take`` can hand out: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def held(self) -> int:
        """Blocks that stand in somebody's table."""
        return self.total - self.available

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and whose content is known."""
        return len(self._cached)

    def find(self, key: Key) -> int | None:
        """Return the block that holds what ``key`` stands for, if any does."""
        return self._index.get(key)

    def idle(self, blocks: Iterable[int]) -> int:
        """Count those of ``blocks`` that nobody holds."""
        return sum(not self._readers[b] for b in blocks)

    def take(self) -> int:
        """Hand out a block of no particular content; at least one must be available."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._unname(block)
        self._readers[block] = 1
        return block

    def share(self, block: int) -> None:
        """Enter a found block into one more table."""
        if not self._readers[block]:
            del self._cached[block]
        self._readers[block] += 1

    def give_back(self, block: int) -> None:
        """Strike a block from one table; one that stands in none is our bug."""
        assert self._readers[block] > 0, f"block {block} is held by nobody"
        self._readers[block] -= 1
        if self._readers[block]:
            return
        if self._keys[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None

    def publish(self, block: int, key: Key, version: str, adapter: str = "") -> None:
        """Make a held, fully computed block known; the first of equal content stays known."""
        if key not in self._index:
            self._index[key] = block
            self._keys[block], self._weights[block] = key, (version, adapter)

    def forget(self, version: str, adapter: str | None = None) -> None:
        """Forget what all blocks of ``version`` hold, or those of one of its adapters alone."""
        for block, (held, added) in enumerate(self._weights):
            if self._keys[block] is not None and held == version and adapter in (None, added):
                self._unname(block)
                if not self._readers[block]:
                    del self._cached[block]
                    self._free.append(block)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that free + cached + held = total, and that ``tables`` are what holds them."""
        readers = Counter(joined.from_iterable(tables))
        free, cached = set(self._free), self._cached.keys()
        assert len(free) == len(self._free), "a block is free twice"
        assert free.isdisjoint(cached)
        assert free.isdisjoint(readers)
        assert readers.keys().isdisjoint(cached)
        assert len(free) + len(cached) + len(readers) == self.total
        assert [readers[b] for b in range(self.total)] == self._readers
        known = {b: k for b, k in enumerate(self._keys) if k is not None}
        assert {k: b for b, k in known.items()} == self._index
        assert free.isdisjoint(known), "a free block has a content"
        assert cached <= known.keys(), "a cached block has none"

    def _unname(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        del self._index[key]
        self._keys[block], self._weights[block] = None, NOBODY
