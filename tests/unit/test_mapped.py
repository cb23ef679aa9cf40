"""What a rank maps is left when it says so, even at the very end."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from cluster.weights.client import Fetched
from cluster.weights.layout import Bundle
from serve_apps.engine import mapped
from serve_apps.engine.mapped import Mapped


class Shelf:
    """As `client`: keeps who has what leased; ``gate`` holds up who renews."""

    def __init__(self) -> None:
        self.leased: set[str] = set()
        self.renewing, self.gate = threading.Event(), threading.Event()

    def find_form(self, key: str, holder: str) -> Any:
        self.leased.add(key)
        return Fetched(Bundle(key, {}, {}), {})

    def renew(self, holder: str, keys: list[str]) -> list[str]:
        self.renewing.set()
        assert self.gate.wait(10)
        return []

    def leave(self, holder: str, key: str) -> None:
        self.leased.remove(key)


@pytest.mark.parametrize("leaves_first", [True, False])
def test_RC10_who_ends_while_it_renews_its_leases_leaves_them_all(
    monkeypatch: pytest.MonkeyPatch, leaves_first: bool
) -> None:
    shelf = Shelf()
    monkeypatch.setattr(mapped, "client", shelf)
    monkeypatch.setattr(mapped, "RENEW_S", 0.01)
    rank = Mapped("none", "float32", 0, 1)
    for version in ("m@1", "m@2"):
        rank.find(version)
    assert shelf.renewing.wait(10)
    if leaves_first:
        rank.leave("m@1")
    threading.Timer(0.1, shelf.gate.set).start()
    rank.close()
    assert shelf.leased == set()
