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

from cluster.errors import LibraryError, UnknownModel
from cluster.library.ref import Ref
from cluster.library.store import Library
from cluster.weights.exchange import LENDS, Desk, Fetch, Lenders
from cluster.weights.files import small_files, stored_tensors
from cluster.weights.inventory import PARCEL_S, Inventory
from cluster.weights.layout import Array, Bundle, Piece, Tensor, cut, hash_of, is_form

Taken = tuple[Bundle, dict[str, list[Any]]]
"""A version, and a reference to each of its pieces, in a list so that none is read on the way."""

log = logging.getLogger(__name__)


class Store(Protocol):
    """Where pieces lie: the object store, or a dict in a test."""

    def put(self, array: Array) -> Any:
        """Take a copy; what is returned keeps it."""

    def get(self, references: Sequence[Any]) -> list[Array]:
        """Return what lies there, without a copy where it lies on this node."""

    def spilled(self, references: Sequence[Any]) -> list[bool]:
        """Say of each whether it had to make room in memory, and lies on the node's disk."""


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
        self._references: dict[str, Any] = {}
        self._desk, self._given = Desk(clock), 0  # bytes lent so far
        self._told_spilled = 0

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
        for piece, array in arrays.items():
            reference = self._store.put(array)
            with self._lock:
                self._references[piece] = reference
                self._inventory.arrived(parcel, piece, array.nbytes, self._clock())

    def finish(self, parcel: str, bundle: Bundle, tell: bool = True) -> None:
        """All pieces of this node have come: from now on the version is here.

        Where several nodes have their part, the writer does not let each of them ``tell``: it
        says so once, for all.
        """
        with self._lock:
            self._inventory.finish(parcel, bundle, self._clock())
            self._inventory.sweep(self._clock())
            self._forget_pieces()
        if tell:
            self._elsewhere.have(bundle)
        self._spilled()

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
            return [ref for ref in refs if ref not in self._inventory.versions]

    def leave(self, holder: str, ref: str) -> None:
        """End a lease: the version may go when its room is wanted, a form goes now."""
        with self._lock:
            self._inventory.leave(ref, holder)
            if is_form(ref):
                self._inventory.sweep(self._clock())
                self._forget_pieces()

    def damaged(self, piece: str) -> bool:
        """Look at a piece that a reader found damaged; forget it if it is, and say so.

        Else whoever brings the same bytes once more would be told that they are here.
        """
        with self._lock:
            reference = self._references.get(piece)
            if reference is None or hash_of(self._store.get([reference])[0]) == piece:
                return False
            self._inventory.lost(piece)
            del self._references[piece]
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
    ) -> tuple[bool, dict[str, list[Any]]]:
        """Say whether any of the pieces are here, and return references to some of those.

        About ``most`` bytes, the first first; none while ``lends`` others borrow from here.
        """
        with self._lock:
            here = {
                piece: self._inventory.pieces[piece]
                for piece in pieces
                if piece in self._references and piece in self._inventory.pieces
            }
            chosen = self._desk.lend(here, most, who, lends)
            self._given += sum(here[piece] for piece in chosen)
            return bool(here), {piece: [self._references[piece]] for piece in chosen}

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
        with self._lock:
            now = self._clock()
            return {
                "budget": self._inventory.budget,
                "bytes": self._inventory.nbytes,
                "pieces": len(self._inventory.pieces),
                "parcels": len(self._inventory.parcels),
                "given": self._given,
                "spilled": self._spilled(),
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
            self._fetch(found)
        elif Ref.parse(ref).version:
            self._read(ref)
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
                self._store.get,
                lambda arrays: self.put(parcel, arrays),
                bundle,
                missing,
                uuid.uuid4().hex[:12],
            ).run()
        except BaseException:
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
            pieces = [piece for piece in self._references if piece in self._inventory.pieces]
            out = self._store.spilled([self._references[piece] for piece in pieces])
            sizes = self._inventory.pieces
            size = sum(sizes[piece] for piece, gone in zip(pieces, out, strict=True) if gone)
        if size > self._told_spilled:
            log.warning(
                "%.0f MB of the shelf were spilled to disk: readers wait for it; start the node "
                "with a larger object store", size / 1e6,
            )  # fmt: skip
        self._told_spilled = size
        return size

    def _leased(self, ref: str, holder: str) -> Taken:
        self._inventory.lease(ref, holder, self._clock())
        bundle = self._inventory.versions[ref].bundle
        return bundle, {piece: [self._references[piece]] for piece in bundle.pieces}

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
        for piece in set(self._references) - set(self._inventory.pieces):
            del self._references[piece]
