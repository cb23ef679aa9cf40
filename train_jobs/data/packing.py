"""Several documents in one row, none cut: fewer forward passes over the same tokens."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Divide documents into rows of at most ``capacity`` tokens; return document numbers per row.

    Best-fit decreasing finds how few rows do; then the longest document always goes to the
    emptiest row, so that the ranks, which run one row each at a time, finish together. The
    result depends on nothing but the arguments. Within a row documents keep their order.

    Raises:
        ValueError: a document is empty or longer than ``capacity``.
    """
    for number, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"document {number} has {length} tokens; a row holds 1 to {capacity}")
    longest_first = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    tight = _best_fit(lengths, capacity, longest_first)
    rows = _level(lengths, capacity, longest_first, len(tight)) or tight
    return sorted(tuple(sorted(row)) for row in rows)


def fill_rate(lengths: Sequence[int], rows: int, capacity: int) -> float:
    """Return the share of ``rows`` rows that is documents, 0 to 1."""
    return sum(lengths) / (rows * capacity) if rows else 0.0


def _best_fit(lengths: Sequence[int], capacity: int, order: Sequence[int]) -> list[list[int]]:
    rows: list[list[int]] = []
    rooms: list[int] = []  # how much is free anywhere, ascending: the first that fits is tightest
    having: dict[int, list[int]] = {}  # the rows with so much free, as heaps
    for number in order:
        at = bisect.bisect_left(rooms, lengths[number])
        if at == len(rooms):
            free, row = capacity, len(rows)
            rows.append([])
        else:
            free = rooms[at]
            row = heapq.heappop(having[free])
            if not having[free]:
                del having[free], rooms[at]
        rows[row].append(number)
        left = free - lengths[number]
        if left not in having:
            bisect.insort(rooms, left)
        heapq.heappush(having.setdefault(left, []), row)
    return rows


def _level(
    lengths: Sequence[int], capacity: int, order: Sequence[int], count: int
) -> list[list[int]] | None:
    """Fill exactly ``count`` rows evenly, or return None where a document then finds no room."""
    rows: list[list[int]] = [[] for _ in range(count)]
    room = [(-capacity, row) for row in range(count)]  # a heap, the emptiest row first
    for number in order:
        free, row = room[0]
        if -free < lengths[number]:
            return None
        heapq.heapreplace(room, (free + lengths[number], row))
        rows[row].append(number)
    return rows
