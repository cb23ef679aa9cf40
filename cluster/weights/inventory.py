"""What one node's part of the shelf holds, for whom, and what goes first. Pure bookkeeping.

A piece stays while a version that is here has it, or a parcel that is on its way. A version stays
while somebody uses it (a lease that is renewed) or an alias means it; of the others the longest
unused go when room is wanted. What readers prepared of a version goes with its last user. Times are
seconds of a monotonic clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from cluster.errors import NotEnough
from cluster.weights.layout import Bundle, is_form

LEASE_S = 60.0
"""Who uses a version says so again before this is over."""
PARCEL_S = 120.0
"""What a writer that fell silent left on its way goes after this."""


@dataclass(slots=True)
class Held:
    """A version that is here, whole or in part."""

    bundle: Bundle
    used_at: float
    leases: dict[str, float] = field(default_factory=dict)
    """Until when, by holder."""

    def leased(self, now: float) -> bool:
        """Say whether somebody uses it, and forget who no longer does."""
        self.leases = {who: until for who, until in self.leases.items() if until > now}
        return bool(self.leases)


@dataclass(slots=True)
class Parcel:
    """Pieces of a version that is still being written."""

    pieces: dict[str, int]
    until: float


class Inventory:
    """Versions, parcels and pieces of one node within ``budget`` bytes."""

    def __init__(self, budget: int, pinned: Callable[[str], bool] = lambda ref: False) -> None:
        """``pinned`` says whether an alias means a version."""
        self.budget, self._pinned = budget, pinned
        self.versions: dict[str, Held] = {}
        self.parcels: dict[str, Parcel] = {}
        self.pieces: dict[str, int] = {}
        """Bytes of what is really here, by hash."""

    @property
    def nbytes(self) -> int:
        """Bytes that are here."""
        return sum(self.pieces.values())

    @property
    def promised(self) -> int:
        """Bytes that parcels still bring."""
        coming = {
            piece: size
            for parcel in self.parcels.values()
            for piece, size in parcel.pieces.items()
            if piece not in self.pieces
        }
        return sum(coming.values())

    def begin(self, parcel: str, pieces: Mapping[str, int], now: float) -> list[str]:
        """Make room for a parcel; return the pieces that are not here yet.

        The same parcel may begin again with further pieces. Raises NotEnough, and changes
        nothing, where what is in use leaves too little room.
        """
        self.sweep(now)
        missing = [piece for piece in pieces if piece not in self.pieces]
        known = self.parcels.get(parcel)
        asked = {**(known.pieces if known else {}), **pieces}
        self._make_room(sum(pieces[piece] for piece in missing), set(asked), now)
        self.parcels[parcel] = Parcel(asked, now + PARCEL_S)
        return missing

    def arrived(self, parcel: str, piece: str, size: int, now: float) -> None:
        """Take note of a piece that is here now."""
        self.pieces[piece] = size
        if going := self.parcels.get(parcel):
            going.until = now + PARCEL_S

    def finish(self, parcel: str, bundle: Bundle, now: float) -> None:
        """Turn a parcel into the version that it was for."""
        self.parcels.pop(parcel, None)
        old = self.versions.get(bundle.ref)
        self.versions[bundle.ref] = Held(bundle, now, old.leases if old else {})

    def abandon(self, parcel: str) -> None:
        """Forget a parcel; `sweep` takes its pieces."""
        self.parcels.pop(parcel, None)

    def whole(self, ref: str) -> bool:
        """Say whether every piece of a version is here."""
        held = self.versions.get(ref)
        return held is not None and all(piece in self.pieces for piece in held.bundle.pieces)

    def lease(self, ref: str, holder: str, now: float, seconds: float = LEASE_S) -> None:
        """Keep a version for ``holder`` until it has been silent for so long."""
        held = self.versions[ref]
        held.used_at = now
        held.leases[holder] = now + seconds

    def leave(self, ref: str, holder: str) -> None:
        """End a lease."""
        if held := self.versions.get(ref):
            held.leases.pop(holder, None)

    def lost(self, piece: str) -> list[str]:
        """Forget a piece that is no good, and the versions that it is part of; return those."""
        self.pieces.pop(piece, None)
        spoilt = [ref for ref, held in self.versions.items() if piece in held.bundle.pieces]
        for ref in spoilt:
            self.drop(ref)
        return spoilt

    def drop(self, ref: str) -> None:
        """Forget a version, whoever uses it; `sweep` takes its pieces."""
        self.versions.pop(ref, None)

    def sweep(self, now: float) -> list[str]:
        """Forget pieces that nothing has any more, and return them."""
        unused = [
            ref for ref, held in self.versions.items() if is_form(ref) and not held.leased(now)
        ]
        for ref in unused:
            self.drop(ref)
        self.parcels = {name: one for name, one in self.parcels.items() if one.until > now}
        used = {piece for held in self.versions.values() for piece in held.bundle.pieces}
        used |= {piece for parcel in self.parcels.values() for piece in parcel.pieces}
        gone = [piece for piece in self.pieces if piece not in used]
        for piece in gone:
            del self.pieces[piece]
        return gone

    def _make_room(self, wanted: int, keep: set[str], now: float) -> None:
        free = self.budget - self.nbytes - self.promised
        if wanted <= free:
            return
        victims: list[str] = []
        for ref in self._idle(now):
            if free >= wanted:
                break
            victims.append(ref)
            free += self._freed_by(victims, keep) - self._freed_by(victims[:-1], keep)
        if free < wanted:
            raise NotEnough(
                f"the weight shelf of this node has {_mb(self.budget)}, {_mb(wanted)} more are "
                f"wanted and {_mb(max(0, free))} can be had; in use: {self._told(now) or 'none'}. "
                "Undeploy a model, or start the node with a larger object store"
            )
        for ref in victims:
            self.drop(ref)
        self.sweep(now)

    def _idle(self, now: float) -> list[str]:
        """Return versions that may go, the longest unused first."""
        idle = [
            (held.used_at, ref)
            for ref, held in self.versions.items()
            if not held.leased(now) and not self._pinned(ref)
        ]
        return [ref for _, ref in sorted(idle)]

    def _freed_by(self, gone: Iterable[str], keep: set[str]) -> int:
        going = set(gone)
        stay = keep | {
            piece
            for ref, held in self.versions.items()
            if ref not in going
            for piece in held.bundle.pieces
        }
        stay |= {piece for parcel in self.parcels.values() for piece in parcel.pieces}
        return sum(size for piece, size in self.pieces.items() if piece not in stay)

    def _told(self, now: float) -> str:
        used = [ref for ref, held in self.versions.items() if held.leased(now)]
        kept = [ref for ref in self.versions if ref not in used and self._pinned(ref)]
        parts = [*sorted(used), *(f"{ref} (an alias means it)" for ref in sorted(kept))]
        return ", ".join(parts)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
