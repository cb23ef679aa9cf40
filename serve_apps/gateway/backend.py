"""What stands behind the gateway, as the gateway sees it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Protocol

from cluster.errors import RequestError
from serve_apps.calls import Call, Event, Refusal
from serve_apps.config import Limits
from serve_apps.gateway import errors
from serve_apps.release_policy import Served

log = logging.getLogger(__name__)


class Backend(Protocol):
    """The models that can be asked."""

    def served(self) -> Mapping[str, Served]:
        """Return what is live now, by name; never waits."""

    def ready(self) -> bool:
        """Say whether every model that should answer does."""

    async def move(self, name: str, load: bool) -> str:
        """Bring a model into memory, or have it leave once it is idle; return what that waits for.

        Raises RequestError.
        """

    def generate(self, name: str, call: Call) -> AsyncGenerator[Event | Refusal, None]:
        """Ask a model; closing the stream ends the request there. May raise anything."""


async def events(
    backend: Backend, name: str, call: Call, limits: Limits
) -> AsyncGenerator[Event, None]:
    """Yield a call's events; whatever goes wrong above comes out as a RequestError.

    Nothing waits without a bound: ``first_token_timeout_s`` for the first event,
    ``request_timeout_s`` for all of them.
    """
    clock = asyncio.get_running_loop().time
    began = clock()
    last = began + limits.request_timeout_s
    until = min(began + limits.first_token_timeout_s, last)
    open_answers = set(range(call.answers))
    async with aclosing(backend.generate(name, call)) as stream:
        while open_answers:
            event = await _next(stream, call, until, last)
            until = last
            if event.finish:
                open_answers.discard(event.number)
            yield event


async def _next(
    stream: AsyncGenerator[Event | Refusal, None], call: Call, until: float, last: float
) -> Event:
    try:
        async with asyncio.timeout_at(until) as bound:
            event = await anext(stream)
    except TimeoutError as error:
        if not bound.expired():
            raise _lost(call, error) from error
        raise _too_late(until < last) from None
    except RequestError:
        raise
    except Exception as error:  # a replica's death has many classes; none means more than this
        raise _lost(call, error) from error
    if isinstance(event, Refusal):
        raise event.error()
    return event


def _lost(call: Call, error: Exception) -> RequestError:
    # StopAsyncIteration too: a stream that ends before its answers have ended is broken
    log.error("request %s: upstream failed: %s", call.request_id, type(error).__name__)
    return errors.upstream()


def _too_late(first: bool) -> RequestError:
    if first:
        return RequestError(
            "no token came within limits.first_token_timeout_s; the model is overloaded or being "
            "rebuilt, try again",
            503,
            "first_token_timeout",
            retry_after_s=5,
        )
    return RequestError(
        "the answer took longer than limits.request_timeout_s; ask for fewer tokens",
        504,
        "request_timeout",
    )
