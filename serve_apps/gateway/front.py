"""The outermost layer: a request id for everybody, a key from everybody, no error uncaught.

It knows nothing of routes. Whether a request may pass depends on the ASGI path alone, never on a
URL put together from headers, and what is not on the list of public paths needs a key.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import RequestError
from cluster.keys import ADMIN
from serve_apps.gateway import errors
from serve_apps.gateway.metering import GONE, HttpMeter

PUBLIC = frozenset({"/healthz", "/readyz"})
MAX_KEY_CHARS = 512
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = logging.getLogger(__name__)


class Keys(Protocol):
    """Who may come in."""

    def check(self, plaintext: str) -> Any | None:
        """Return the key that this text is, or ``None``."""


class Front:
    """ASGI middleware: see the module. ``tag`` adds the id as a header, unless a proxy does.

    ``meter`` is told every request once it is over.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, tag: bool = True, meter: HttpMeter | None = None
    ) -> None:
        self._app, self._keys, self._tag, self._meter = app, keys, tag, meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        state, began = scope.setdefault("state", {}), time.monotonic()
        state["request_id"] = _request_id(scope)
        state["salt"], state["admin"] = "", False
        state["outcome"] = GONE  # until an answer begins; a stream that breaks corrects it
        try:
            await self._handle(scope, receive, send, state)
        finally:
            if self._meter:
                self._meter.done(scope["path"], state["outcome"], time.monotonic() - began)
        return None

    async def _handle(
        self, scope: Scope, receive: Receive, send: Send, state: dict[str, Any]
    ) -> None:
        request_id, started = state["request_id"], False

        async def tagged(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                state["outcome"] = message["status"]
                if self._tag:
                    named = (b"x-request-id", request_id.encode())
                    message = {**message, "headers": [*message.get("headers", ()), named]}
            await send(message)

        try:
            if scope["path"] not in PUBLIC:
                # who shares cached prompts with whom: keys of one tenant
                key = self._admit(scope)
                state["salt"] = str(getattr(key, "tenant", ""))
                state["admin"] = getattr(key, "scope", "") == ADMIN
            await self._app(scope, receive, tagged)
        except RequestError as error:
            failure = error
        except Exception as error:
            log.exception("request %s: %s", request_id, type(error).__name__)
            failure = errors.internal()
        else:
            return
        if not started:
            await _refuse(failure, request_id, tagged)

    def _admit(self, scope: Scope) -> Any:
        """Return the key; RequestError (401) unless exactly one good one came along.

        Malformed, unknown and revoked take the same way: one look at the store.
        """
        if (key := self._keys.check(_bearer(scope))) is None:
            raise RequestError(
                "no valid API key: send `Authorization: Bearer KEY`; `roundhouse keys add NAME` "
                "makes one",
                401,
                "invalid_api_key",
            )
        return key


def _bearer(scope: Scope) -> str:
    given: list[bytes] = [
        value for name, value in scope["headers"] if name.lower() == b"authorization"
    ]
    if len(given) != 1:
        return ""
    kind, _, key = given[0].decode("latin-1").partition(" ")
    key = key.strip()
    return key if kind.lower() == "bearer" and len(key) <= MAX_KEY_CHARS else ""


def _request_id(scope: Scope) -> str:
    """Return the id that the client or a proxy gave, if it is a tame one, else a new one."""
    for name, value in scope["headers"]:
        text = str(value, "latin-1")
        if name.lower() == b"x-request-id" and _ID.fullmatch(text):
            return text
    return f"req-{secrets.token_hex(12)}"


async def _refuse(error: RequestError, request_id: str, send: Send) -> None:
    content = errors.encode(errors.body(error, request_id))
    head = [*errors.headers(error), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": head})
    await send({"type": "http.response.body", "body": content})
