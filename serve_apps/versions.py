"""Which versions a replica holds: it follows orders by loading, activating, draining, releasing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from cluster.errors import EngineError, RequestError, RoundhouseError, UnknownModel
from cluster.library.ref import NEWEST, Ref, Update
from cluster.library.store import Library
from cluster.text.chat import ChatText
from serve_apps import room
from serve_apps.config import ModelConfig
from serve_apps.engine.interface import Engine
from serve_apps.release_policy import Order, Report
from serve_apps.shelf import Shelf, read_base
from serve_apps.sleeper import Sleeper

AWAY_S = 0.5
"""Pause before the board is asked again after it did not answer."""
FIRST_ORDER_S = 60.0

log = logging.getLogger(__name__)


class Board(Protocol):
    """What hands out orders: the Releases actor, or the plain object in a test."""

    async def watch(
        self, name: str, alias: str, replica: str, report: Report, have: Order | None
    ) -> Order:
        """Report, and wait a bounded time for an order other than ``have``."""

    async def report(self, name: str, alias: str, replica: str, report: Report) -> None:
        """Report at once."""

    async def leave(self, name: str, replica: str) -> None:
        """Say goodbye."""

    async def wake(self, name: str) -> str:
        """Have a model woken that somebody waits for; return why that takes longer, if it does."""


class Versions:
    """The versions of one replica.

    Orders say what should be, not what to do: after a crash on either side the next is enough.
    """

    def __init__(
        self,
        config: ModelConfig,
        engine: Engine,
        library: Library,
        board: Board | None,
        replica_id: str,
        shelf: Shelf | None = None,
    ) -> None:
        """Without a ``shelf`` there are no versions but those of the library."""
        self._config, self._engine, self._library = config, engine, library
        self._board, self._id, self._shelf = board, replica_id, shelf
        self._texts: dict[str, ChatText] = {}
        self._bases: dict[str, str] = {}  # of live versions that are an addition to another
        self._active: str | None = None
        self._failed: dict[str, str] = {}  # what is wanted and cannot be loaded, and why
        self._past: dict[str, str] = {}  # failed live ones that are gone; until another answers
        self._pinned: frozenset[str] = frozenset()  # bases that adapters need
        self._adapters: tuple[dict[str, str], tuple[str, ...]] = ({}, ())
        self._unfit: dict[str, str] = {}  # adapters, and why
        self._read: tuple[str, ...] = ()  # adapters in the engine
        self._draining: dict[str, asyncio.Task[None]] = {}
        self._order: Order | None = None
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._answering = False
        self.sleeper = Sleeper(config.name, engine, config.wake_s, self._ask_to_wake)
        self._need: int | None = None
        self._adapter_news = asyncio.Event()
        self.slept = 0
        """Times that the engine was ended, with all that it held."""

    async def start(self) -> None:
        """Load and activate the version that the first order names; then follow."""
        self._order = await self._first_order()
        if self._order.active is None:
            raise EngineError(
                f"{self._config.model} points to no version of the library; see "
                f"`roundhouse models show {self._config.name}`"
            )
        if self._shelf and (self._config.alias == NEWEST or self._config.live_adapters):
            await self._shelf.open()
        if not self._order.asleep or not await self.sleeper.sleep():
            await self._load(self._order.active)
            await self._engine.activate(self._order.active)
            self._active = self._order.active
        self._answering = True
        if self._board is not None:
            self._tasks = [
                asyncio.create_task(self._follow(self._board)),
                asyncio.create_task(self._work()),
            ]

    async def stop(self) -> None:
        """Stop following, and say goodbye."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._board is not None:
            try:
                await self._board.leave(self._config.name, self._id)
            except RoundhouseError as error:
                log.warning("could not say goodbye: %s", error)

    def pick(self, wanted: str | None) -> tuple[str, ChatText]:
        """Return the version to answer with; RequestError when the wanted one is not held."""
        version = wanted or self._active
        if version is None:
            raise RequestError("the model is not ready yet", 503, "unavailable", None, 2)
        if version not in self._texts:
            raise RequestError(
                f"{version} is not live; live: {', '.join(sorted(self._texts))}",
                404,
                "model_not_found",
                "model",
            )
        return version, self._texts[version]

    def holds(self, version: str) -> bool:
        """Say whether a version can still be answered with."""
        return version in self._texts

    @property
    def held(self) -> frozenset[str]:
        """The versions that can be answered with."""
        return frozenset(self._texts)

    @property
    def ordered_adapters(self) -> Mapping[str, str]:
        """Of the adapters that follow the shelf the newest version there, by name."""
        return self._order.adapters if self._order else {}

    @property
    def tried_adapters(self) -> tuple[str, ...]:
        """Versions of adapters that releases try."""
        return self._order.tries if self._order else ()

    async def adapters_ordered(self, most_s: float) -> None:
        """Wait until that may have changed, or so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                await self._adapter_news.wait()
        self._adapter_news.clear()

    async def tell_adapters(
        self,
        fits: dict[str, str],
        active: tuple[str, ...],
        unfit: dict[str, str],
        pinned: frozenset[str],
        read: tuple[str, ...],
    ) -> None:
        """Report adapters with their bases, and keep the versions that they need."""
        if pinned != self._pinned:
            self._pinned = pinned
            self._news.set()
        if (fits, active, unfit, read) != (*self._adapters, self._unfit, self._read):
            self._adapters, self._unfit, self._read = (fits, active), unfit, read
            await self._tell()

    def check(self) -> None:
        """Raise EngineError when following has stopped: a replica that obeys no order is ill."""
        for task in self._tasks:
            if task.done():
                why = "cancelled" if task.cancelled() else repr(task.exception())
                raise EngineError(f"the replica follows no orders any more: {why}")
        if not self._answering:
            self._answering = True
            self._news.set()

    async def withdraw(self) -> None:
        """Report that this replica cannot answer, so that nobody calls it ready."""
        self._answering = False
        await self._tell()

    async def _first_order(self) -> Order:
        if self._board is None:
            return Order(self._library.resolve(self._config.model).ref)
        async with asyncio.timeout(FIRST_ORDER_S):
            while True:
                try:
                    return await self._watch(self._board, None)
                except RoundhouseError as error:
                    log.warning("no first order yet: %s", error)
                    await asyncio.sleep(AWAY_S)

    async def _follow(self, board: Board) -> None:
        while True:
            try:
                order = await self._watch(board, self._order)
            except RoundhouseError as error:
                log.warning("no order: %s", error)
                await asyncio.sleep(AWAY_S)
                continue
            if order != self._order or order.asleep != self.sleeper.asleep:
                if (order.adapters, order.tries) != (self.ordered_adapters, self.tried_adapters):
                    self._adapter_news.set()
                self._order = order
                self._news.set()

    async def _watch(self, board: Board, have: Order | None) -> Order:
        name, alias = self._config.name, self._config.alias
        return await board.watch(name, alias, self._id, self._report(), have)

    async def _work(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._order is not None:
                await self._obey(self._order)
                await self._tell()

    async def _rest(self, order: Order) -> bool:
        """Sleep or wake as ordered; return whether there is an engine to work with.

        Raises what starting one raises: then this replica is ill, and is rebuilt.
        """
        if order.asleep and not self.sleeper.asleep:
            need = self._measure()
            await asyncio.gather(*self._draining.values())
            if await self.sleeper.sleep():
                self._need, self.slept = need, self.slept + 1
                self._texts, self._bases, self._active = {}, {}, None
                self._failed, self._past = {}, {}
        elif self.sleeper.asleep and not order.asleep:
            await self.sleeper.wake()
        return not self.sleeper.asleep

    def _measure(self) -> int | None:
        """Return the bytes of memory that the ranks take, where there are processes to ask."""
        return room.resident_bytes(getattr(self._engine, "rank_pids", ())) or self._need

    async def _ask_to_wake(self) -> str:
        return "" if self._board is None else await self._board.wake(self._config.name)

    async def _obey(self, order: Order) -> None:
        if not await self._rest(order):
            return
        wanted = {version for version in (order.active, order.also, *self._pinned) if version}
        told = self._past | self._failed
        self._failed = {v: why for v, why in self._failed.items() if v in wanted}
        self._past = {v: why for v, why in told.items() if v not in wanted and Ref.parse(v).live}
        for version in sorted(wanted - set(self._texts) - set(self._failed)):
            try:
                await self._load(version)
            except Exception as error:  # whatever it is, the old version goes on answering
                log.error("cannot load %s: %s: %s", version, type(error).__name__, error)
                self._failed[version] = f"{error}" or type(error).__name__
            await self._tell()
        if order.active in self._texts and order.active != self._active:
            await self._engine.activate(order.active)
            before, self._active, self._past = self._active, order.active, {}
            log.info("%s answers", order.active)
            await self._move(before, order.active, order.update)
            await self._tell()
        if self._active is None:
            raise EngineError(f"cannot wake with {order.active}: {self._failed}")
        self.sleeper.open()
        bases = {self._bases[v] for v in (*wanted, self._active) if v in self._bases}
        for version in set(self._texts) - wanted - {self._active} - bases:
            del self._texts[version]
            self._draining[version] = asyncio.create_task(self._release(version))

    async def _move(self, source: str | None, target: str, update: Update | None) -> None:
        """Recompute what has no token yet, where that is asked for and both encode alike.

        Whoever promotes says it, else the run that made the target, else the configuration.
        """
        old, new = self._texts.get(source or ""), self._texts[target]
        said = update or (self._shelf.update_of(target) if self._shelf else None)
        if (said or self._config.update) != "recompute" or source is None or old is None:
            return
        if not await asyncio.to_thread(new.is_as, old):
            log.info("%s reads text otherwise than %s: requests stay there", target, source)
            return
        try:
            count = await self._engine.move(source, target)
        except EngineError as error:  # they finish where they are
            log.error("requests stay with %s: %s", source, error)
        else:
            log.info("%d requests moved from %s to %s", count, source, target)

    async def _load(self, version: str) -> None:
        if going := self._draining.get(version):
            await asyncio.shield(going)  # at most drain_s
        if self._shelf is not None and Ref.parse(version).live:
            self._texts[version] = await self._load_from(self._shelf, version)
            return
        try:
            found = self._library.resolve(version)
        except UnknownModel:
            if self._shelf is None:
                raise
            # another node has it in its library: nothing of it needs to be on this one's disk
            self._texts[version] = await self._load_from(self._shelf, version)
            return
        if self._texts:
            spare = (await self._engine.stats()).spare_bytes
            room.check(version, found.manifest.architecture.parameters, self._engine.info, spare)
        text = await asyncio.to_thread(ChatText.shared, found.path)
        await self._engine.load(version, str(found.path))
        self._texts[version] = text

    async def _load_from(self, shelf: Shelf, version: str) -> ChatText:
        """Load what lies on the shelf; the engine's own copy made, the shelf may forget it."""
        began = time.monotonic()
        try:
            folder = await shelf.bring(version)
            brought = time.monotonic()
            base = read_base(folder)
            if base is not None:
                await self._load_addition(version, base, folder, shelf.holder)
                return self._texts[base]
            text = await asyncio.to_thread(ChatText.shared, folder)
            read = time.monotonic()
            await self._engine.load(version, str(folder), shelf.holder)
        finally:
            await shelf.leave(version)
        loaded = time.monotonic()
        log.info(
            "holds %s: %.2f s to bring it, %.2f s for its text, %.2f s for its weights",
            version, brought - began, read - brought, loaded - read,
        )  # fmt: skip
        return text

    async def _load_addition(self, version: str, base: str, folder: Path, holder: str) -> None:
        """Load what a LoRA run has put on the shelf, and the base that it adds to."""
        began = time.monotonic()
        if base not in self._texts:
            await self._load(base)
            await self._tell()
        await self._engine.load_adapter(version, base, str(folder), holder)
        self._bases[version] = base
        log.info("holds %s beside %s after %.2f s", version, base, time.monotonic() - began)

    async def _release(self, version: str) -> None:
        for other, base in list(self._bases.items()):
            if base == version and (going := self._draining.get(other)):
                await asyncio.shield(going)  # what adds to it goes first
        try:
            if version in self._bases:
                await self._engine.release_adapter(version, self._config.drain_s)
            else:
                await self._engine.release(version, self._config.drain_s)
            log.info("released %s", version)
        except (EngineError, RequestError) as error:
            log.error("cannot release %s: %s", version, error)
        finally:
            self._bases.pop(version, None)
            del self._draining[version]

    def _report(self) -> Report:
        held = tuple(sorted(self._texts))
        where = room.node(), room.free_bytes()
        if not self._answering:
            return Report(None, (), dict(self._failed), {}, (), *where)
        active = self._active
        if not self.sleeper.ready and self._order and self._order.active:
            active = self._order.active  # it will answer with that
            held = tuple(sorted({active, *held}))
        return Report(
            active,
            held,
            self._unfit | self._past | self._failed,
            *self._adapters,
            *where,
            self.sleeper.asleep,
            self.sleeper.idle_s,
            self._config.idle_s,
            self._need if self.sleeper.asleep else self._measure(),
            self._config.live_adapters,
            self._read,
        )

    async def _tell(self) -> None:
        if self._board is None:
            return
        try:
            name, alias = self._config.name, self._config.alias
            await self._board.report(name, alias, self._id, self._report())
        except RoundhouseError as error:
            log.warning("report not delivered; the next watch brings it: %s", error)
