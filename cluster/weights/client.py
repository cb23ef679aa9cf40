"""How weights get onto the shelf and off it: what trainers, replicas and ranks call.

The process must belong to a Ray cluster already.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, Corrupt
from cluster.home import home
from cluster.library.ref import Update
from cluster.weights.actors import (
    CALL_S,
    MOVE_S,
    ObjectStore,
    agents,
    asked,
    open_agent,
    open_directory,
    this_node,
)
from cluster.weights.agent import Taken
from cluster.weights.blocks import read
from cluster.weights.files import write_files
from cluster.weights.layout import (
    Array,
    Bundle,
    CutPlan,
    Piece,
    Tensor,
    array_of,
    check,
    cut,
    hash_of,
    joined,
)

GROUP_BYTES = 16 << 20
"""Tensors that are hashed and offered together: what a writer holds beside the model."""
PENDING = 2
"""Groups on their way to the agent at once."""

POLL_S = 0.1
"""Between two questions whether others have done something."""

Named = tuple[str, Any]

log = logging.getLogger(__name__)


class Writer:
    """One process that hands versions, or its part of them, to the shelf of its node."""

    def __init__(self) -> None:
        self.node = this_node()
        self._agent = open_agent(self.node)
        asked(self._agent.renew.remote("", []), CALL_S)  # it is there, and answers
        self._pending: list[Any] = []

    def ship(
        self, parcel: str, tensors: Iterable[Named], plan: CutPlan | None = None
    ) -> dict[str, Tensor]:
        """Hand over tensors (torch, on any device), one group after the other.

        Returns what the layout is to say of them. Raises NotEnough where they do not fit. The
        ranks of a trainer use the same ``parcel``; then one of them seals it.
        """
        told: dict[str, Tensor] = {}
        for group in _groups(tensors):
            arrays: dict[str, Array] = {}
            for name, tensor in group:
                dim, parts = (plan or {}).get(name, (0, 1))
                pieces = []
                for array in cut(array_of(tensor), dim, parts):
                    piece = Piece(hash_of(array), array.nbytes)
                    arrays[piece.sha256] = array
                    pieces.append(piece)
                dtype = str(tensor.dtype).removeprefix("torch.")
                told[name] = Tensor(dtype, tuple(tensor.shape), tuple(pieces), dim)
            self._send(parcel, arrays)
        self._wait(0)
        return told

    def seal(self, shipped: Sequence[tuple[str, str]], bundle: Bundle) -> None:
        """Make a version of the parts that (parcel, node) pairs name; it appears at once."""
        for parcel, node in shipped:
            asked(open_agent(node).finish.remote(parcel, bundle, False), CALL_S)
        nodes = sorted({node for _, node in shipped})
        asked(open_directory().have.remote(nodes, bundle), CALL_S)

    def abandon(self, parcel: str) -> None:
        """Take back what this node was given for a parcel."""
        asked(self._agent.abandon.remote(parcel), CALL_S)

    def until_taken(self, ref: str, begin_s: float, most_s: float) -> bool:
        """See :func:`until_taken`."""
        return until_taken(ref, begin_s, most_s)

    def _send(self, parcel: str, arrays: Mapping[str, Array]) -> None:
        sizes = {piece: array.nbytes for piece, array in arrays.items()}
        missing = asked(self._agent.begin.remote(parcel, sizes), CALL_S)
        if missing:
            # a copy in this node's store now: the caller may change the tensors from here on
            some = {piece: arrays[piece] for piece in missing}
            self._pending.append(self._agent.put.remote(parcel, some))
            self._wait(PENDING)

    def _wait(self, most: int) -> None:
        while len(self._pending) > most:
            asked(self._pending.pop(0), MOVE_S)


def publish(
    ref: str,
    files: Mapping[str, bytes],
    tensors: Iterable[Named],
    base: str | None = None,
    plan: CutPlan | None = None,
    update: Update | None = None,
) -> Bundle:
    """Put a version on the shelf of this node; returns it once readers can find it.

    ``update`` says what becomes of requests that run when it goes live; by default the model's
    configuration does. Raises NotEnough where it does not fit beside what is in use; then nothing
    has changed.
    """
    writer, parcel = Writer(), uuid.uuid4().hex
    try:
        told = writer.ship(parcel, tensors, plan)
        bundle = Bundle(ref, dict(files), told, base, time.time(), update)
        writer.seal([(parcel, writer.node)], bundle)
    except BaseException:
        writer.abandon(parcel)
        raise
    return bundle


def until_taken(ref: str, begin_s: float, most_s: float) -> bool:
    """Wait until nobody takes a version any more; False where nobody has begun, or is done.

    ``begin_s`` seconds are waited for the first one, ``most_s`` in all.
    """
    began, known, seen = time.monotonic(), list(agents().values()), False
    while time.monotonic() - began < most_s:
        users = sum(asked(agent.users.remote(ref), CALL_S) for agent in known)
        if not users and (seen or time.monotonic() - began > begin_s):
            return seen
        seen = seen or users > 0
        time.sleep(POLL_S)
    return False


def withdraw(ref: str) -> None:
    """Take a version off every node's shelf; who has loaded it keeps what it loaded."""
    told, known = asked(open_directory().find.remote(ref), CALL_S), agents()
    for node in [] if told is None else told[1]:
        if node in known:
            asked(known[node].drop.remote(ref), CALL_S)
        else:  # it is gone, and what it had with it
            asked(open_directory().gone.remote(node), CALL_S)


def withdraw_run(prefix: str) -> None:
    """Take all versions of a run, whose references begin so, off the shelf."""
    for ref in asked(open_directory().refs.remote(), CALL_S):
        if ref.startswith(prefix):
            withdraw(ref)


@dataclass(frozen=True)
class Fetched:
    """A version on this node, mapped: whoever keeps an array keeps its memory."""

    bundle: Bundle
    pieces: Mapping[str, Array]

    def whole(self) -> Iterator[tuple[str, str, Array]]:
        """Yield name, torch's dtype and read-only array of each tensor."""
        for name, tensor in self.bundle.tensors.items():
            yield name, tensor.dtype, joined(tensor, self.pieces)


def fetch(ref: str, holder: str, verify: bool = True) -> Fetched:
    """Map a version, bringing it to this node first; ``holder`` has it leased from now on.

    ``verify`` reads every byte and raises Corrupt where one differs from its hash.
    """
    return _mapped(asked(open_agent().take.remote(ref, holder), MOVE_S), verify)


def find_form(key: str, holder: str) -> Fetched | None:
    """Map what another process of this node prepared of a version.

    None where the caller is to prepare it, which it ends with `put_form` or `leave_form`: of
    several that ask at once the others wait for it here. One that turns out damaged is prepared
    once more; Corrupt where that is damaged, too.
    """
    agent, until, spoilt = open_agent(), time.monotonic() + MOVE_S, False
    while time.monotonic() < until:
        told = asked(agent.take_form.remote(key, holder), CALL_S)
        if told is True:
            return None
        if told is not False:
            try:
                return _mapped(told, verify=True)
            except Corrupt as error:  # the agent has dropped it: the next question makes it ours
                if spoilt:
                    raise
                spoilt = True
                log.warning("%s, prepared anew: %s", key, error)
                continue
        time.sleep(POLL_S)
    raise ClusterError(f"{key} was not prepared on this node within {MOVE_S:g} s; repeat")


def leave_form(key: str, holder: str) -> None:
    """Say that the caller does not prepare it after all."""
    asked(open_agent().leave_form.remote(key, holder), CALL_S)


def put_form(key: str, tensors: Iterable[Named], holder: str) -> Fetched:
    """Put what this process prepared of a version on the shelf, and map it from there.

    Raises NotEnough where it does not fit beside what is in use.
    """
    writer, parcel = Writer(), uuid.uuid4().hex
    try:
        bundle = Bundle(key, {}, writer.ship(parcel, tensors), created=time.time())
        taken = asked(open_agent().finish_form.remote(parcel, bundle, holder), CALL_S)
    except BaseException:
        writer.abandon(parcel)
        raise
    return _mapped(taken, verify=False)


def _mapped(taken: Taken, verify: bool) -> Fetched:
    bundle, places = taken
    sizes = bundle.pieces
    arrays = read(ObjectStore(), [places[piece] for piece in sizes])
    pieces = dict(zip(sizes, arrays, strict=True))
    if verify:
        for piece, array in pieces.items():
            try:
                check(Piece(piece, sizes[piece]), array)
            except Corrupt:
                asked(open_agent().damaged.remote(piece), CALL_S)
                raise
    return Fetched(bundle, pieces)


def bring(ref: str, holder: str) -> Path:
    """Bring a version to this node's shelf, and write its small files; return their folder.

    The folder is named by their content, so that versions that differ in weights alone share it.
    """
    return materialised(take(ref, holder).files)


def take(ref: str, holder: str) -> Bundle:
    """Bring a version to this node's shelf; ``holder`` has it leased from now on."""
    bundle: Bundle = asked(open_agent().bring.remote(ref, holder), MOVE_S)
    return bundle


def materialised(files: Mapping[str, bytes]) -> Path:
    """Return a folder with these files, written unless it is there already."""
    digest = Bundle("", files, {}).digest[:32]
    folder = home() / "cache" / "shelf" / digest
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_files(files, folder)
    return folder


def renew(holder: str, refs: Sequence[str]) -> list[str]:
    """Keep versions for ``holder``; return those that this node's shelf has no more."""
    gone: list[str] = asked(open_agent().renew.remote(holder, list(refs)), CALL_S)
    return gone


def leave(holder: str, ref: str) -> None:
    """End a lease."""
    asked(open_agent().leave.remote(holder, ref), CALL_S)


def _groups(tensors: Iterable[Named]) -> Iterator[list[Named]]:
    group: list[Named] = []
    size = 0
    for name, tensor in tensors:
        group.append((name, tensor))
        size += tensor.numel() * tensor.element_size()
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
