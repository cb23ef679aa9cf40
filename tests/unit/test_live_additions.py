"""What a LoRA run puts on the shelf: held beside its base, answering for the model's own name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.errors import Corrupt, UnknownModel
from cluster.library.ref import Update
from cluster.library.store import Library
from cluster.weights import client
from cluster.weights.layout import Bundle
from serve_apps.config import Fake, ModelConfig
from serve_apps.engine.fake import FakeEngine
from serve_apps.release_policy import Order, Report
from serve_apps.shelf import NodeShelf
from serve_apps.versions import Versions
from tests.unit.serving_fixtures import publish, until

pytestmark = pytest.mark.anyio
FIRST, SECOND = "tiny@run.demo.1", "tiny@run.demo.2"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Board:
    """Gives the order that a test has written down."""

    order: Order
    reports: list[Report] = field(default_factory=list)

    async def watch(
        self, name: str, alias: str, replica: str, report: Report, have: Order | None
    ) -> Order:
        await until(lambda: self.order != have, "another order")
        return self.order

    async def report(self, name: str, alias: str, replica: str, report: Report) -> None:
        self.reports.append(report)

    async def leave(self, name: str, replica: str) -> None:
        pass


@dataclass
class Shelf:
    """Has additions to one base."""

    folder: Path
    base: str
    holder: str = "r0"
    left: list[str] = field(default_factory=list)
    update: Update | None = None
    broken: set[str] = field(default_factory=set)

    async def open(self) -> None:
        pass

    async def bring(self, version: str) -> Path:
        if version not in (FIRST, SECOND):
            raise UnknownModel(version)
        if version in self.broken:
            raise Corrupt(f"{version} is damaged")
        told = {"peft_type": "LORA", "base_model_name_or_path": self.base}
        (self.folder / "adapter_config.json").write_text(json.dumps(told))
        return self.folder

    def update_of(self, version: str) -> Update | None:
        return self.update

    async def renew(self, versions: list[str]) -> None:
        pass

    async def leave(self, version: str) -> None:
        self.left.append(version)


async def test_what_failed_is_told_until_another_version_answers(tmp_path: Path) -> None:
    library = Library(tmp_path / "library")
    publish(library, tmp_path)
    library.move_alias("tiny", "live", 1, None, "test")
    settings = Fake(kind="fake")
    engine, board = FakeEngine(settings), Board(Order("tiny@1"))
    (tmp_path / "shelf").mkdir()
    shelf = Shelf(tmp_path / "shelf", "tiny@1", broken={FIRST})
    config = ModelConfig(model="tiny@live", engine=settings, drain_s=5.0)
    versions = Versions(config, engine, library, board, "r0", shelf)
    told = lambda: versions._report().failed  # noqa: E731
    await engine.start()
    await versions.start()
    try:
        board.order = Order(FIRST)
        await until(lambda: FIRST in told(), "it cannot be loaded")
        board.order = Order("tiny@1")  # nobody wants it any more: it has left the shelf
        await until(lambda: versions._order == board.order, "the order has come")
        await until(lambda: not versions._failed, "and is obeyed")
        assert "damaged" in told()[FIRST]
        assert versions.pick(None)[0] == "tiny@1"
        shelf.broken.clear()
        board.order = Order(FIRST)
        await until(lambda: versions.pick(None)[0] == FIRST, "published again, it is tried again")
        await until(lambda: told() == {}, "and nothing is told of it any more")
    finally:
        await versions.stop()
        await engine.stop()


async def test_an_addition_answers_beside_its_base_and_both_go_in_their_order(
    tmp_path: Path,
) -> None:
    library = Library(tmp_path / "library")
    publish(library, tmp_path, mark="a")
    publish(library, tmp_path, mark="b")
    library.move_alias("tiny", "live", 1, None, "test")
    settings = Fake(kind="fake")
    engine, board = FakeEngine(settings), Board(Order("tiny@1"))
    (tmp_path / "shelf").mkdir()
    shelf = Shelf(tmp_path / "shelf", "tiny@1")
    config = ModelConfig(model="tiny@live", engine=settings, drain_s=5.0)
    versions = Versions(config, engine, library, board, "r0", shelf)
    await engine.start()
    await versions.start()
    try:
        board.order = Order(FIRST)
        await until(lambda: versions.pick(None)[0] == FIRST, "the addition answers")
        assert versions.held == {"tiny@1", FIRST}, "its base stays, and may be asked for"
        assert versions.pick(None)[1] is versions.pick("tiny@1")[1], "it speaks as its base does"
        assert shelf.left == [FIRST]
        board.order = Order(SECOND)
        await until(lambda: versions.held == {"tiny@1", SECOND}, "the next one replaces it")
        await until(lambda: list(engine._adapters) == [SECOND], "and the first is released")
        board.order = Order("tiny@2")
        await until(lambda: list(engine._versions) == ["tiny@2"], "a whole version follows")
        assert not engine._adapters
        assert versions.pick(None)[0] == "tiny@2"
        board.order = Order(FIRST)
        await until(lambda: versions.pick(None)[0] == FIRST, "an addition brings its base back")
        assert versions.held == {"tiny@1", FIRST}
    finally:
        await versions.stop()
        await engine.stop()


class Moving(FakeEngine):
    """Remembers what it was asked to move."""

    def __init__(self, config: Fake) -> None:
        super().__init__(config)
        self.moves: list[tuple[str, str]] = []

    async def move(self, source: str, target: str) -> int:
        self.moves.append((source, target))
        return await super().move(source, target)


@pytest.mark.parametrize(
    ("model", "run", "order", "moves"),
    [
        ("finish", None, None, False),
        ("recompute", None, None, True),
        ("finish", "recompute", None, True),
        ("recompute", "finish", None, False),
        ("finish", "finish", "recompute", True),
        ("recompute", "recompute", "finish", False),
    ],
)
async def test_who_promotes_says_what_becomes_of_requests_then_the_run_then_the_model(
    tmp_path: Path, model: Update, run: Update | None, order: Update | None, moves: bool
) -> None:
    library = Library(tmp_path / "library")
    publish(library, tmp_path, mark="a")
    library.move_alias("tiny", "live", 1, None, "test")
    settings = Fake(kind="fake")
    engine, board = Moving(settings), Board(Order("tiny@1"))
    (tmp_path / "shelf").mkdir()
    shelf = Shelf(tmp_path / "shelf", "tiny@1", update=run)
    config = ModelConfig(model="tiny@live", engine=settings, drain_s=5.0, update=model)
    versions = Versions(config, engine, library, board, "r0", shelf)
    await engine.start()
    await versions.start()
    try:
        board.order = Order(FIRST, update=order)
        await until(lambda: FIRST in [r.active for r in board.reports], "the addition answers")
        assert engine.moves == ([("tiny@1", FIRST)] if moves else [])
    finally:
        await versions.stop()
        await engine.stop()


async def test_what_a_run_says_travels_with_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = {
        ref: Bundle(ref, {}, {}, update=update)
        for ref, update in ((FIRST, "recompute"), (SECOND, None))
    }
    monkeypatch.setattr(client, "take", lambda ref, holder: bundles[ref])
    monkeypatch.setattr(client, "materialised", lambda files: tmp_path)
    shelf = NodeShelf("r0")
    for ref in bundles:
        assert await shelf.bring(ref) == tmp_path
    assert (shelf.update_of(FIRST), shelf.update_of(SECOND)) == ("recompute", None)
