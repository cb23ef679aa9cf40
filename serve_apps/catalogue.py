"""What is served: the library's word on versions and aliases, and what replicas reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime

from cluster.errors import LibraryError, RoundhouseError
from cluster.library.ref import CHAMPION, NEWEST, Ref
from cluster.library.store import Library
from serve_apps.adapter_policy import adapters_of
from serve_apps.deployed import Deployed, asleep
from serve_apps.release_policy import Canary, Served
from serve_apps.rollout import bytes_of
from serve_apps.sleep_policy import most_on_a_node

log = logging.getLogger(__name__)


class Catalogue:
    """Asked anew each time: a damaged entry of the library is told and passed over."""

    def __init__(
        self, library: Library, deployed: Deployed, canary: Callable[[str], Canary | None]
    ) -> None:
        """``canary`` says what gateways need to know of a model's release."""
        self._library, self._deployed, self._canary = library, deployed, canary
        self.newest: dict[str, str] = {}
        """The newest version of each name that a run has put on the shelf."""

    def active(self, name: str, alias: str) -> str | None:
        """Return the version that the library's record says; it may be moved by hand, too."""
        if alias == NEWEST and name in self.newest:
            return self.newest[name]
        try:
            # a bare name is its champion, and before there is one its newest version
            ref = Ref(name) if alias == CHAMPION else Ref(name, alias=alias)
            return self._library.resolve(ref).ref
        except LibraryError as error:
            log.warning("%s@%s: %s", name, alias, error)
            return None

    def newest_of(self, names: Iterable[str]) -> dict[str, str]:
        """Return what the shelf has newest of these names, where it has something."""
        return {name: self.newest[name] for name in names if name in self.newest}

    def served(self) -> dict[str, Served]:
        """Return everything that answers, by the name that requests ask for."""
        served = {}
        for name, model in self._deployed.models.items():
            reports = self._deployed.live(name).values()
            if not reports:
                continue
            active = tuple(sorted({r.active for r in reports if r.active}))
            served[name] = Served(
                name=name,
                alias=model.alias,
                active=active,
                live=tuple(sorted({held for r in reports for held in r.held})),
                aliases=self._aliases(name),
                created=self._created(active[-1]) if active else 0,
                canary=self._canary(name),
                failed={ref: why for r in reports for ref, why in r.failed.items()},
                asleep=asleep(reports),
                memory_bytes=most_on_a_node(reports),
            )
        return self._adapters(served) | served  # a deployed model goes before an adapter

    def estimate(self, name: str, alias: str) -> int:
        """Return the bytes that a model's weights take at most; 0 where nobody can say."""
        try:
            found = self._library.resolve(Ref(name, alias=alias))
        except LibraryError:
            return 0
        return bytes_of(found.manifest.architecture.parameters)

    def _adapters(self, models: Mapping[str, Served]) -> dict[str, Served]:
        return {
            one.name: replace(
                one,
                aliases=self._aliases(one.name),
                created=self._created(one.active[-1]),
                canary=self._canary(one.name),
            )
            for model in models
            for one in adapters_of(model, self._deployed.live(model).values(), self._active_adapter)
        }

    def _active_adapter(self, name: str) -> tuple[str, str] | None:
        """Return what the library's alias says of an adapter: its version and its base."""
        try:
            found = self._library.resolve(name)
        except LibraryError:
            return None
        return (found.ref, found.manifest.base) if found.manifest.base else None

    def _aliases(self, name: str) -> dict[str, int]:
        try:
            return self._library.aliases(name)
        except LibraryError as error:
            log.warning("%s: %s", name, error)
            return {}

    def _created(self, version: str) -> int:
        try:
            made = self._library.resolve(version).manifest.created
            return int(datetime.fromisoformat(made).timestamp())
        except (RoundhouseError, ValueError):
            return 0
