"""One node's part of the shelf: it puts pieces into the object store, and so owns them.

A plain class; `cluster.weights.actors` makes one detached actor of it a node. What it put lives
as long as it does, whoever handed it over: an object dies with the process that put it.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from cluster.errors import Corrupt, LibraryError, UnknownModel
from cluster.library.ref import Ref
from cluster.library.store import Library
from cluster.weights.blocks import Place, Store, blocks, read
from cluster.weights.exchange import LENDS, Desk, Fetch, Lenders
from cluster.weights.files import small_files, stored_tensors
from cluster.weights.inventory import PARCEL_S, Inventory
from cluster.weights.layout import Array, Bundle, Piece, Tensor, cut, hash_of, is_form

Taken = tuple[Bundle, dict[str, Place]]
"""A version, and where each of its pieces lies."""
SPILL_S = 10.0
"""Between two looks for what was spilled, while somebody uses the shelf."""

log = logging.getLogger(__name__)


class Elsewhere(Lenders, Protocol):
    """What other nodes have."""

    def find(self, ref: str) -> Bundle | None:
        """Return a version that lies on some node, whole among all of them."""

    def offered(self, ref: str) -> Bundle | None:
        """Have a node that has a version in its library put it on its shelf, if there is one."""

    def have(self, bundle: Bundle) -> None:
        """Tell the others that this node has a version."""

    def lost(self, ref: str) -> None:
        """Tell the others that this node has it no more."""


class Agent:
    """Methods may be called from several threads at once."""

    def __init__(
        self,
        store: Store,
        budget: int,
        elsewhere: Elsewhere,
        library: Library | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``budget`` in bytes; versions that an alias of ``library`` means are kept."""
        self._store, self._elsewhere, self._clock = store, elsewhere, clock
        self._library = library or Library()
        self._inventory = Inventory(budget, self._pinned)
        self._lock = threading.RLock()  # over the inventory and the references
        self._making: dict[str, threading.Lock] = {}
        self._makers: dict[str, tuple[str, float]] = {}  # who prepares a form, and until when
        self._places: dict[str, Place] = {}
        self._spoilt = set[str]()  # versions that were dropped because a piece was damaged
        self._desk, self._given = Desk(clock), 0  # bytes lent so far
        self._told_spilled, self._looked_at = 0, clock()

    def begin(self, parcel: str, pieces: Mapping[str, int]) -> list[str]:
        """Make room for pieces; return those that are not here yet. Raises NotEnough."""
        with self._lock:
            before = set(self._inventory.versions)
            missing = self._inventory.begin(parcel, pieces, self._clock())
            self._forget_pieces()
            for ref in before - set(self._inventory.versions):
                if not is_form(ref):
                    self._elsewhere.lost(ref)
            return missing

    def put(self, parcel: str, arrays: Mapping[str, Array]) -> None:
        """Take pieces by their hashes, which the caller has computed; readers check them."""
        for block in blocks(arrays):
            reference = self._store.put(list(block.values()))
            with self._lock:
                for at, (piece, array) in enumerate(block.items()):
                    self._places[piece] = Place(reference, at)
                    self._inventory.arrived(parcel, piece, array.nbytes, self._clock())

    def finish(self, parcel: str, bundle: Bundle, tell: bool = True) -> None:
        """All pieces of this node have come: from now on the version is here.

        Where several nodes have their part, the writer does not let each of them ``tell``: it
        says so once, for all.
        """
        with self._lock:
            self._inventory.finish(parcel, bundle, self._clock())
            self._spoilt.discard(bundle.ref)
            self._inventory.sweep(self._clock())
            self._forget_pieces()
        if tell:
            self._elsewhere.have(bundle)

    def abandon(self, parcel: str) -> None:
        """Forget what a writer left on its way."""
        with self._lock:
            self._inventory.abandon(parcel)
            self._inventory.sweep(self._clock())
            self._forget_pieces()

    def take(self, ref: str, holder: str) -> Taken:
        """Return a version.

        What is not here comes from other nodes, else from the library. ``holder`` has it leased
        from now on. Raises UnknownModel where nobody has it, NotEnough where it does not fit.
        """
        with self._lock:
            making = self._making.setdefault(ref, threading.Lock())
        with making:  # of several replicas that start at once, one fetches
            if not self._inventory.whole(ref):
                self._bring(ref)
        with self._lock:
            return self._leased(ref, holder)

    def bring(self, ref: str, holder: str) -> Bundle:
        """Take a version for somebody who does not read its pieces."""
        return self.take(ref, holder)[0]

    def take_form(self, key: str, holder: str) -> Taken | bool:
        """Return what another rank of this node prepared, or whether ``holder`` is to prepare it.

        One at a time is; who is told no asks again until that one has, or falls silent.
        """
        with self._lock:
            if self._inventory.whole(key):
                return self._leased(key, holder)
            maker, until = self._makers.get(key, (holder, 0.0))
            if maker != holder and until > self._clock():
                return False
            self._makers[key] = holder, self._clock() + PARCEL_S
            return True

    def leave_form(self, key: str, holder: str) -> None:
        """Let another one prepare what ``holder`` could not."""
        with self._lock:
            if self._makers.get(key, ("", 0.0))[0] == holder:
                del self._makers[key]

    def finish_form(self, parcel: str, bundle: Bundle, holder: str) -> Taken:
        """Keep what a rank prepared of a version, and return it to be mapped.

        Other nodes are not told: to prepare it there takes no longer than to bring it.
        """
        with self._lock:
            self._makers.pop(bundle.ref, None)
            if self._inventory.whole(bundle.ref):
                self._inventory.abandon(parcel)
            else:
                self._inventory.finish(parcel, bundle, self._clock())
            taken = self._leased(bundle.ref, holder)
            self._inventory.sweep(self._clock())
            self._forget_pieces()
            return taken

    def offer(self, ref: str) -> bool:
        """Put a version of this node's library on the shelf; False where it is not in there."""
        if not self._in_library(ref):
            return False
        with self._lock:
            making = self._making.setdefault(ref, threading.Lock())
        with making:
            if not self._inventory.whole(ref):
                self._read(ref)
        return True

    def renew(self, holder: str, refs: Sequence[str]) -> list[str]:
        """Keep versions for ``holder``; return those that are not here."""
        with self._lock:
            for ref in refs:
                if ref in self._inventory.versions:
                    self._inventory.lease(ref, holder, self._clock())
            self._inventory.sweep(self._clock())
            self._forget_pieces()
            gone = [ref for ref in refs if ref not in self._inventory.versions]
        if self._clock() - self._looked_at > SPILL_S:
            self._spilled()
        return gone

    def leave(self, holder: str, ref: str) -> None:
        """End a lease: the version may go when its room is wanted, a form goes now."""
        with self._lock:
            self._inventory.leave(ref, holder)
            if is_form(ref):
                self._inventory.sweep(self._clock())
                self._forget_pieces()

    def damaged(self, piece: str) -> bool:
        """Look at a piece that a reader found damaged; if it is, forget it and what it is part of.

        Else whoever brings the same bytes once more would be told that they are here, and a run's
        newest version would be one that nobody can load. Other nodes keep what they have.
        """
        with self._lock:
            place = self._places.get(piece)
            if place is None or hash_of(read(self._store, [place])[0]) == piece:
                return False
            spoilt = [ref for ref in self._inventory.lost(piece) if not is_form(ref)]
            self._spoilt |= set(spoilt)
            self._inventory.sweep(self._clock())
            self._forget_pieces()
        for ref in spoilt:
            self._elsewhere.lost(ref)
        return True

    def users(self, ref: str) -> int:
        """Return how many have a version leased here."""
        with self._lock:
            held = self._inventory.versions.get(ref)
            return len(held.leases) if held and held.leased(self._clock()) else 0

    def drop(self, ref: str) -> None:
        """Forget a version now; who reads it keeps what it reads."""
        with self._lock:
            self._inventory.drop(ref)
            self._inventory.sweep(self._clock())
            self._forget_pieces()
        self._elsewhere.lost(ref)

    def lend(
        self, pieces: Sequence[str], most: int, who: str, lends: int = LENDS
    ) -> tuple[bool, dict[str, Place]]:
        """Say whether any of the pieces are here, and return where some of those lie.

        About ``most`` bytes, the first first; none while ``lends`` others borrow from here.
        """
        with self._lock:
            here = {
                piece: self._inventory.pieces[piece]
                for piece in pieces
                if piece in self._places and piece in self._inventory.pieces
            }
            chosen = self._desk.lend(here, most, who, lends)
            self._given += sum(here[piece] for piece in chosen)
            return bool(here), {piece: self._places[piece] for piece in chosen}

    def returned(self, who: str) -> None:
        """Take note that a borrower has read what it was lent."""
        with self._lock:
            self._desk.returned(who)

    def bundles(self) -> list[Bundle]:
        """Return what is here: from this the directory of all nodes is made anew."""
        with self._lock:
            held = self._inventory.versions.items()
            return [one.bundle for ref, one in held if not is_form(ref)]

    def status(self) -> dict[str, Any]:
        """Return bytes and versions of this node."""
        spilled = self._spilled()
        with self._lock:
            now = self._clock()
            return {
                "budget": self._inventory.budget,
                "bytes": self._inventory.nbytes,
                "pieces": len(self._inventory.pieces),
                "parcels": len(self._inventory.parcels),
                "given": self._given,
                "spilled": spilled,
                "versions": {
                    ref: {
                        "bytes": held.bundle.nbytes,
                        "users": len(held.leases) if held.leased(now) else 0,
                        "pinned": self._pinned(ref),
                        "form": is_form(ref),
                        "whole": self._inventory.whole(ref),
                    }
                    for ref, held in self._inventory.versions.items()
                },
            }

    def _bring(self, ref: str) -> None:
        found = self._elsewhere.find(ref)
        if found is None and Ref.parse(ref).version and not self._in_library(ref):
            found = self._elsewhere.offered(ref)
        if found is not None:
            try:
                self._fetch(found)
            except Corrupt:
                if ref in self._spoilt:  # the directory had not heard of it when it was asked
                    raise self._damaged_here(ref) from None
                raise
        elif Ref.parse(ref).version:
            self._read(ref)
        elif ref in self._spoilt:
            raise self._damaged_here(ref)
        else:
            raise UnknownModel(
                f"{ref} is on no node's shelf any more; its run publishes the next one, or see "
                f"`roundhouse models show {Ref.parse(ref).name}` for what is in the library"
            )

    def _fetch(self, bundle: Bundle) -> None:
        """Copy what this node lacks of a version; what has come may be taken from here at once."""
        parcel = f"fetch {bundle.ref}"
        missing = self.begin(parcel, bundle.pieces)
        self._elsewhere.have(bundle)
        try:
            Fetch(
                self._elsewhere,
                lambda places: read(self._store, places),
                lambda arrays: self.put(parcel, arrays),
                bundle,
                missing,
                uuid.uuid4().hex[:12],
            ).run()
        except BaseException:
            if bundle.ref not in self._inventory.versions:  # else it keeps offering its part
                self._elsewhere.lost(bundle.ref)
            self.abandon(parcel)
            raise
        self.finish(parcel, bundle)

    def _read(self, ref: str) -> None:
        """Put a version of the library on the shelf; Corrupt names a file that differs."""
        version, parcel = self._library.verify(ref), f"read {ref}"
        tensors: dict[str, Tensor] = {}
        for name, dtype, array in stored_tensors(version.path):
            [part] = cut(array, 0, 1)
            piece = Piece(hash_of(part), part.nbytes)
            if self.begin(parcel, {piece.sha256: piece.nbytes}):
                self.put(parcel, {piece.sha256: part})
            tensors[name] = Tensor(dtype, array.shape, (piece,))
        files = small_files(version.path)
        self.finish(parcel, Bundle(ref, files, tensors, version.manifest.base, time.time()))

    def _in_library(self, ref: str) -> bool:
        try:
            self._library.resolve(ref)
        except LibraryError:
            return False
        return True

    def _spilled(self) -> int:
        """Return the bytes that other objects have driven out of memory, and tell of new ones."""
        with self._lock:
            sizes = dict(self._inventory.pieces)
            objects: dict[int, tuple[Any, int]] = {}
            for piece, (reference, _) in self._places.items():
                _, size = objects.get(id(reference), (None, 0))
                objects[id(reference)] = reference, size + sizes.get(piece, 0)
        out = self._store.spilled([reference for reference, _ in objects.values()])
        size = sum(size for (_, size), gone in zip(objects.values(), out, strict=True) if gone)
        self._looked_at = self._clock()
        if size > self._told_spilled:
            log.warning(
                "%.0f MB of the shelf were spilled to disk: readers wait for it; start the node "
                "with a larger object store", size / 1e6,
            )  # fmt: skip
        self._told_spilled = size
        return size

    def _leased(self, ref: str, holder: str) -> Taken:
        if not self._inventory.whole(ref):  # somebody has just found damage
            raise self._damaged_here(ref)
        self._inventory.lease(ref, holder, self._clock())
        bundle = self._inventory.versions[ref].bundle
        return bundle, {piece: self._places[piece] for piece in bundle.pieces}

    def _damaged_here(self, ref: str) -> Corrupt:
        return Corrupt(
            f"a shard of {ref} on this node differs from its hash, and no other node has it; "
            "publish it again"
        )

    def _pinned(self, ref: str) -> bool:
        """Say whether an alias of the library means a version."""
        if is_form(ref):
            return False
        parsed = Ref.parse(ref)
        try:
            return parsed.version in self._library.aliases(parsed.name).values()
        except LibraryError:
            return True  # rather too much is kept than what answers is taken away

    def _forget_pieces(self) -> None:
        for piece in set(self._places) - set(self._inventory.pieces):
            del self._places[piece]
