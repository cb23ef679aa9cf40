"""Memory for packed weights that is used again: a new version lies where an old one has lain.

Fresh pages are what packing costs most: the system makes each of them empty first, and a virtual
machine may have to ask its host for them. A replica that takes a version every few minutes needs
room for two of them each time; it keeps the second for a while instead of giving it back.
"""

from __future__ import annotations

import mmap
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 64 << 20
"""Of a mapping; a larger tensor has one of its own."""
ALIGN = 64
KEEP_S = 300.0
"""A spare that no version has wanted for so long goes back to the system."""


class Room:
    """Memory of one version: tensors side by side, all of which go at once."""

    def __init__(self) -> None:
        self._chunks: list[mmap.mmap] = []
        self._at, self._used = 0, 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor with whatever lay there before."""
        import torch

        size = torch.Size(shape).numel() * dtype.itemsize
        while self._at < len(self._chunks) and len(self._chunks[self._at]) - self._used < size:
            self._at, self._used = self._at + 1, 0
        if self._at == len(self._chunks):
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._chunks.append(mmap.mmap(-1, max(CHUNK_BYTES, size), flags))
        chunk, begin = self._chunks[self._at], self._used
        self._used += -(-size // ALIGN) * ALIGN
        if not size:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(chunk, dtype=torch.uint8, count=size, offset=begin)
        return flat.view(dtype).view(shape)

    def rewind(self) -> None:
        """Begin anew: what lay here is gone."""
        self._at, self._used = 0, 0

    @property
    def nbytes(self) -> int:
        """Bytes that are mapped."""
        return sum(len(chunk) for chunk in self._chunks)


class Rooms:
    """One rank's: a room for each version that it holds, and one to spare at most."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = (
            clock,
            threading.RLock(),
        )  # a thread may collect garbage while it holds it
        self._spare: Room | None = None
        self._since = 0.0

    def room(self) -> Room:
        """Return the spare, or an empty one."""
        with self._lock:
            room, self._spare = self._spare, None
        return room or Room()

    def lend(self, room: Room, user: object) -> None:
        """Have ``room`` back once nobody refers to ``user`` any more, who has all its tensors."""
        weakref.finalize(user, self._back, room).atexit = False

    def tidy(self) -> None:
        """Give a spare back to the system that has not been wanted for long."""
        with self._lock:
            if self._spare and self._clock() - self._since > KEEP_S:
                self._spare = None

    @property
    def spare_bytes(self) -> int:
        """Bytes that are kept for the next version."""
        with self._lock:
            return self._spare.nbytes if self._spare else 0

    def _back(self, room: Room) -> None:
        room.rewind()
        with self._lock:
            self._spare, self._since = room, self._clock()
