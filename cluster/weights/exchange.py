"""How a node takes what it lacks of a version from others: from whoever lends to few just now.

A node lends to ``LENDS`` others at once, some pieces to each, and sends whoever asks besides to
somebody else. So many nodes that want the same share the work from the beginning, without a plan
that would have to be mended whenever one of them goes (docs/decisions/0015).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from cluster.errors import ClusterError, Corrupt, RoundhouseError
from cluster.weights.blocks import Place
from cluster.weights.layout import Array, Bundle, Piece, check

LENDS = 2
"""Borrowers of one node at once: while one checks what it got, the link serves the other."""
STREAMS = 2
"""Loans of one borrower at once, for the same reason."""
LEND_S = 60.0
"""A borrower that has not come back after this is forgotten."""
LOST_S = 5.0
"""So long nobody may have what is lacking before it is called lost."""
SILENT_S = 120.0
"""Without a piece for so long, fetching has failed."""
PAUSE_S = 0.05
"""Before the others are asked again, when all who have something lend it to somebody else."""
SMALL, LARGE = 8 << 20, 64 << 20
"""Bytes of a loan: a thirty-second of what is lacking, within these bounds."""


@dataclass(frozen=True)
class Loan:
    """Where pieces lie on one node; ``node`` is to be told when they have been read."""

    node: str
    places: Mapping[str, Place]


class Lenders(Protocol):
    """The other nodes."""

    def borrow(self, ref: str, pieces: Sequence[str], most: int, who: str) -> Loan | None:
        """Return some of the pieces, in their order and about ``most`` bytes, from one node.

        ``None`` while all who have any are busy. Raises ClusterError where nobody has any.
        """

    def give_back(self, loan: Loan, who: str, failed: bool) -> None:
        """Let the lender serve somebody else; do without one that ``failed`` for a while."""


class Desk:
    """Who borrows from this node now. The caller holds the lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def lend(self, here: Mapping[str, int], most: int, who: str, lends: int = LENDS) -> list[str]:
        """Return the first pieces of about ``most`` bytes (at least one).

        None while it lends to ``lends`` others.
        """
        now = self._clock()
        self._until = {one: until for one, until in self._until.items() if until > now}
        if not here or (who not in self._until and len(self._until) >= lends):
            return []
        self._until[who] = now + LEND_S
        chosen, size = list[str](), 0
        for piece, nbytes in here.items():
            if chosen and size + nbytes > most:
                break
            chosen.append(piece)
            size += nbytes
        return chosen

    def returned(self, who: str) -> None:
        """Forget a borrower."""
        self._until.pop(who, None)


@dataclass
class Fetch:
    """One version on its way to this node."""

    lenders: Lenders
    get: Callable[[Sequence[Place]], list[Array]]
    put: Callable[[Mapping[str, Array]], None]
    bundle: Bundle
    left: list[str]
    """Pieces that are lacking and not on their way; taken from here in a random order."""
    who: str
    """Names the borrower."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _error: RoundhouseError | None = None
    _moved: float = field(default_factory=time.monotonic)
    _stop: bool = False

    def run(self) -> None:
        """Copy all that is lacking, checked piece by piece.

        A lender that goes, or gives what differs from its hash, is done without. Raises Corrupt or
        ClusterError when no node can give what is left.
        """
        random.shuffle(self.left)
        size = sum(self.bundle.pieces[piece] for piece in self.left)
        most = max(SMALL, min(LARGE, size // 32))
        with ThreadPoolExecutor(STREAMS) as pool:
            streams = [pool.submit(self._stream, f"{self.who}/{n}", most) for n in range(STREAMS)]
            for stream in streams:
                stream.result()

    def _stream(self, who: str, most: int) -> None:
        try:
            while not self._stop:
                with self._lock:
                    if not self.left:
                        return
                    loan = self._borrow(who, most)
                if loan is None:
                    time.sleep(PAUSE_S * random.uniform(0.5, 1.5))
                else:
                    self._take(loan, who)
        except BaseException:
            self._stop = True
            raise

    def _borrow(self, who: str, most: int) -> Loan | None:
        try:
            loan = self.lenders.borrow(self.bundle.ref, self.left, most, who)
        except ClusterError as error:
            if time.monotonic() - self._moved > LOST_S:
                if self._error:
                    raise self._error from None
                raise Corrupt(
                    f"{self.bundle.ref}: {len(self.left)} of its shards are on no node any more "
                    f"({error}); publish it again"
                ) from None
            return None
        if loan is None and time.monotonic() - self._moved > SILENT_S:
            raise self._error or ClusterError(
                f"{self.bundle.ref}: no shard has come for {SILENT_S:g} s, all nodes that have "
                "them are busy; try again"
            )
        if loan is not None:
            borrowed = set(loan.places)
            self.left = [piece for piece in self.left if piece not in borrowed]
        return loan

    def _take(self, loan: Loan, who: str) -> None:
        left, good, failed = list(loan.places), dict[str, Array](), True
        try:
            arrays = self.get(list(loan.places.values()))
            for piece, array in zip(loan.places, arrays, strict=True):
                check(Piece(piece, self.bundle.pieces[piece]), array)
                good[piece] = array
            failed = False
        except (Corrupt, ClusterError) as error:
            self._error = error
        try:
            if good:
                self.put(good)  # where this node has no room, no other lender would help
                self._moved = time.monotonic()
                left = [piece for piece in left if piece not in good]
            with self._lock:
                self.left += left  # somebody else may have them
        finally:
            self.lenders.give_back(loan, who, failed)
