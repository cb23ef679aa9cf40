"""Who answers a request while a release runs: a choice, a way back, and what is counted of it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from cluster.errors import RequestError
from serve_apps.calls import Call, Event
from serve_apps.config import Limits
from serve_apps.gateway.backend import Backend, events
from serve_apps.gateway.errors import encode
from serve_apps.release_counts import Counts
from serve_apps.release_policy import Canary, Served, served_id

SESSION = "x-roundhouse-session"
MAX_KEY_CHARS = 512
URGENT_LAST = 1000
"""The priority of an answer in the shadow: after everybody's."""
BUSY = frozenset({"engine_full"})
"""Codes that say nothing of a version."""
LEAST_S = 0.1
"""A second try with less time than this would only put off the error of the first."""

Champion = asyncio.Future[tuple[list[str], float]]
"""What the champion said, and in how many seconds."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which side of a release a request is on."""

    canary: Canary
    candidate: bool


def side(canary: Canary, key: str, draw: Callable[[], float]) -> bool:
    """Say whether the candidate answers; equal keys of one release stay where they are.

    A key has a place between 0 and 100 that nothing moves: as the share grows, people only come
    over. Without a key it is drawn.
    """
    if canary.percent <= 0:
        return False
    place = draw() * 100.0
    if key:
        told = hashlib.blake2b(f"{canary.release}\n{key}".encode(), digest_size=8).digest()
        place = int.from_bytes(told) / 2**64 * 100.0
    return place < canary.percent


def key_of(
    canary: Canary, given: Mapping[str, Any], headers: Mapping[str, str], tenant: str
) -> str:
    """Return what a request is told from others by; empty where it does not say."""
    said: Any = None
    if canary.sticky == "user":
        said = given.get("user")
    elif canary.sticky == "session":
        said = headers.get(SESSION)
    elif canary.sticky == "conversation":
        said = _beginning(given.get("messages"))
    return f"{tenant}\n{said[:MAX_KEY_CHARS]}" if isinstance(said, str) and said else ""


def _beginning(messages: Any) -> str | None:
    """Return what tells a conversation from others: a hash of all up to its first question."""
    if not isinstance(messages, list):
        return None
    told = hashlib.blake2b(digest_size=16)
    for message in messages:
        told.update(encode(message))
        if message.get("role") == "user":
            break
    return told.hexdigest()


class Traffic:
    """One gateway's part in all releases."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._clock, self._draw = clock, draw
        self._counts: dict[str, dict[str, Counts]] = {}
        self._shadows: set[asyncio.Task[None]] = set()

    def choose(
        self,
        served: Served,
        asked: str,
        version: str | None,
        given: Mapping[str, Any],
        headers: Mapping[str, str],
        tenant: str,
    ) -> Choice | None:
        """Return a request's side, ``None`` where no release has a say in it.

        That is so for whoever names a version or another alias than the deployed one.
        """
        canary = served.canary
        if canary is None or version is not None or asked not in (served.name, served_id(served)):
            return None
        key = key_of(canary, given, headers, tenant)
        return Choice(canary, side(canary, key, self._draw))

    def drain(self) -> dict[str, dict[str, Counts]]:
        """Return what was counted since the last time, by release and version."""
        counts, self._counts = self._counts, {}
        return counts

    def put_back(self, counts: Mapping[str, Mapping[str, Counts]]) -> None:
        """Keep counts that could not be handed on."""
        for release, versions in counts.items():
            for version, more in versions.items():
                self._of(release, version).add(more)

    async def events(
        self, backend: Backend, served: Served, call: Call, limits: Limits, choice: Choice
    ) -> AsyncGenerator[Event, None]:
        """Yield a call's events from the side it is on.

        What fails on the candidate's side before its first token is answered by the champion, in
        what is left of ``request_timeout_s``, and under an id of its own: a replica may still hold
        the first one.
        """
        canary, begun, arrived = choice.canary, False, self._clock()
        if choice.candidate:
            asked = replace(call, version=canary.version)
            try:
                stream = self._counted(backend, served, asked, limits, canary, canary.version)
                async with aclosing(stream):
                    async for event in stream:
                        begun = True
                        yield event
                return
            except RequestError as error:
                left = limits.request_timeout_s - (self._clock() - arrived)
                if begun or not _turns_back(error) or left < LEAST_S:
                    raise
                log.warning("request %s: %s failed (%s); the champion answers",
                            call.request_id, canary.version, error.code)  # fmt: skip
                call, limits = _again(call, limits, left)
        stream = self._counted(backend, served, call, limits, canary, canary.champion)
        shadow = None if choice.candidate else self._shadow(backend, served, call, limits, canary)
        said, began = [""] * call.answers, self._clock()
        try:
            async with aclosing(stream):
                async for event in stream:
                    if shadow is not None:
                        said[event.number] += event.text
                    yield event
            if shadow is not None and not shadow.done():  # it may have waited long enough
                shadow.set_result((said, self._clock() - began))
        finally:
            if shadow is not None:
                shadow.cancel()  # nothing, when it has its result

    async def _counted(
        self,
        backend: Backend,
        served: Served,
        call: Call,
        limits: Limits,
        canary: Canary,
        version: str,
    ) -> AsyncGenerator[Event, None]:
        counts, began = self._of(canary.release, version), self._clock()
        first: dict[int, tuple[float, int]] = {}
        try:
            async with aclosing(events(backend, served.model, call, limits)) as stream:
                async for event in stream:
                    now = self._clock()
                    # counts may have been handed on meanwhile: ask for them anew
                    counts = self._of(canary.release, version)
                    if not first:
                        counts.first_token(now - began)
                    since, tokens = first.setdefault(event.number, (now, event.completion_tokens))
                    if event.finish:
                        counts.answered(event.completion_tokens - tokens, now - since)
                    yield event
        except RequestError as error:
            counts = self._of(canary.release, version)
            if _not_live(error):
                counts.missed += 1
            elif error.status >= 500 and error.code not in BUSY:
                counts.requests += 1
                counts.errors += 1
            raise
        self._of(canary.release, version).requests += 1

    def _of(self, release: str, version: str) -> Counts:
        return self._counts.setdefault(release, {}).setdefault(version, Counts())

    def _shadow(
        self, backend: Backend, served: Served, call: Call, limits: Limits, canary: Canary
    ) -> Champion | None:
        """Begin an answer in the shadow; returns where to put what the champion said."""
        if (
            self._draw() * 100.0 >= canary.shadow_percent
            or len(self._shadows) >= canary.shadow_concurrent
        ):
            return None
        said: Champion = asyncio.get_running_loop().create_future()
        asked = replace(
            call,
            request_id=f"{call.request_id}-shadow",
            version=canary.version,
            interval_s=None,
            priority=max(call.priority, URGENT_LAST),
        )
        task = asyncio.create_task(self._answer(backend, served, asked, limits, canary, said))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)
        return said

    async def _answer(
        self,
        backend: Backend,
        served: Served,
        call: Call,
        limits: Limits,
        canary: Canary,
        champion: Champion,
    ) -> None:
        said, began = [""] * call.answers, self._clock()
        try:
            async with aclosing(events(backend, served.model, call, limits)) as stream:
                async for event in stream:
                    said[event.number] += event.text
            took = self._clock() - began
            async with asyncio.timeout(limits.request_timeout_s):
                other, other_took = await champion
        except (RequestError, TimeoutError) as error:
            failed = isinstance(error, RequestError) and error.status >= 500
            self._of(canary.release, canary.version).shadow_errors += failed
            return
        counts = self._of(canary.release, canary.version)
        counts.shadows += 1
        counts.shadow_s += took
        counts.shadowed_s += other_took
        if call.sampling.seed is not None or call.sampling.temperature == 0:
            counts.compared += 1
            counts.matched += said == other


def _not_live(error: RequestError) -> bool:
    return error.status == 404 and error.code == "model_not_found"


def _turns_back(error: RequestError) -> bool:
    return _not_live(error) or (error.status >= 500 and error.code not in BUSY)


def _again(call: Call, limits: Limits, left: float) -> tuple[Call, Limits]:
    """Return a call's second try, which may take ``left`` seconds."""
    until = left if call.deadline_s is None else min(call.deadline_s, left)
    again = replace(call, request_id=f"{call.request_id}-champion", deadline_s=until)
    return again, limits.model_copy(update={"request_timeout_s": left})
