"""Weights that the ranks of a node map from its shelf, one copy for all of them.

What is shared is what ranks compute with: the packed weights of a version. The rank that finds none
on the shelf packs them, puts them there and maps them itself; whoever comes later only maps. They
go when the last rank that uses them has left.
"""

from __future__ import annotations

import logging
import threading
import uuid
from typing import TYPE_CHECKING

from cluster.errors import RoundhouseError
from cluster.weights import client
from cluster.weights.inventory import LEASE_S
from cluster.weights.layout import Array, form_key, tensor_of

if TYPE_CHECKING:
    import torch

    from cluster.weights.client import Fetched

FORM = 1
"""Which layout the packed weights have; part of their name on the shelf."""
RENEW_S = LEASE_S / 3
CLOSE_S = 5.0

log = logging.getLogger(__name__)


class Mapped:
    """What one rank maps, by version. Its loader calls; what it maps is left from any thread."""

    def __init__(self, quantization: str, dtype: str, rank: int, ranks: int) -> None:
        """Ranks that differ in any of these do not read the same bytes."""
        self._form = f"packed{FORM}-{quantization}-{dtype}-{rank}of{ranks}"
        self._holder = f"rank {uuid.uuid4().hex[:12]}"
        self._keys: dict[str, str] = {}
        self._news, self._closed = threading.Event(), False
        self._making: set[str] = set()
        self._leaving: set[str] = set()
        self._thread = threading.Thread(target=self._renew, name="leases", daemon=True)
        self._thread.start()

    def find(self, version: str) -> list[torch.Tensor] | None:
        """Return what another rank has packed of a version, mapped.

        None where this one is to pack it: ``put`` or ``leave`` come next, others wait for them.
        """
        key = form_key(version, self._form)
        fetched = client.find_form(key, self._holder)
        if fetched is not None:
            return self._take(version, key, fetched)
        self._making.add(key)
        return None

    def put(self, version: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Put packed weights on the shelf and return them as they lie there.

        Raises NotEnough where they do not fit beside what is in use.
        """
        key = form_key(version, self._form)
        named = ((f"{n:06}", tensor) for n, tensor in enumerate(tensors))
        return self._take(version, key, client.put_form(key, named, self._holder))

    def again(self, version: str, other: str) -> None:
        """Take note that ``version`` computes with what ``other`` maps."""
        self._keys[version] = self._keys[other]

    def leave(self, version: str) -> None:
        """Need a version's weights no more; returns at once."""
        making = form_key(version, self._form)
        if making in self._making:
            self._making.discard(making)
            client.leave_form(making, self._holder)
        key = self._keys.pop(version, None)
        if key is not None and key not in self._keys.values():
            self._leaving.add(key)
            self._news.set()

    def close(self) -> None:
        """Leave all of them, within a bound."""
        for version in list(self._keys):
            self.leave(version)
        self._closed = True
        self._news.set()
        self._thread.join(CLOSE_S)

    def _take(self, version: str, key: str, fetched: Fetched) -> list[torch.Tensor]:
        self._keys[version] = key
        self._making.discard(key)
        self._leaving.discard(key)
        return [tensor_of(array, dtype) for _, dtype, array in sorted(fetched.whole(), key=_name)]

    def _renew(self) -> None:
        """Keep the leases, and end those that are left; once more after `close`."""
        closed = False
        while not closed:
            self._news.wait(RENEW_S)
            self._news.clear()
            closed = self._closed  # what is left until then is ended in this turn
            try:
                while self._leaving:
                    client.leave(self._holder, self._leaving.pop())
                keys = sorted(set(self._keys.values()))
                if keys and not closed and (gone := client.renew(self._holder, keys)):
                    log.warning("the shelf has lost %s: mapped on, shared no more", gone)
            except RoundhouseError as error:  # a lease that is not renewed ends by itself
                log.warning("leases of the shelf: %s", error)


def _name(told: tuple[str, str, Array]) -> str:
    return told[0]
