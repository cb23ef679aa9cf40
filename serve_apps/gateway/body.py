"""Request bodies: bounded while they arrive, then JSON of bounded depth and honest numbers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import Receive, Scope

from cluster.errors import RequestError
from serve_apps.config import Limits


class ClientGone(Exception):
    """The client hung up; nobody is left to answer."""


async def read_object(scope: Scope, receive: Receive, limits: Limits) -> dict[str, Any]:
    """Return the JSON object that a request carries.

    Raises RequestError: 413 as soon as the body is larger than ``max_body_bytes``, 408 when it
    takes longer than ``body_timeout_s``, 400 when it is not such an object.
    """
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            raw = await _read(scope, receive, limits.max_body_bytes)
    except TimeoutError:
        raise RequestError(
            f"the request body did not arrive within {limits.body_timeout_s:g} s",
            408,
            "body_timeout",
        ) from None
    return parse_object(raw, limits.max_json_depth)


async def _read(scope: Scope, receive: Receive, most: int) -> bytes:
    too_large = RequestError(
        f"the request body is larger than {most} bytes (limits.max_body_bytes)",
        413,
        "body_too_large",
    )
    for name, value in scope["headers"]:
        if name == b"content-length" and (not value.isdigit() or int(value[:20]) > most):
            raise too_large
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise too_large
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def parse_object(raw: bytes, max_depth: int) -> dict[str, Any]:
    """Parse a JSON object: no NaN, no huge number, no lone surrogate, no deep nesting."""
    try:
        value = json.loads(raw, parse_constant=_no_constant)
    except RecursionError:
        raise _too_deep(max_depth) from None
    except ValueError:
        # the parser's own message would quote the body
        raise RequestError("the request body is not valid JSON", 400, "invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError("the request body must be a JSON object", 400, "invalid_json")
    _check(value, max_depth)
    return value


def _no_constant(name: str) -> float:
    raise ValueError(name)


def _check(value: Any, max_depth: int) -> None:
    todo = [(value, 1)]
    while todo:
        item, depth = todo.pop()
        if isinstance(item, str):
            if not item.isascii():
                _check_text(item)
            continue
        if isinstance(item, float) and item in (float("inf"), float("-inf")):
            raise RequestError("a number is too large", 400, "invalid_json")
        if not isinstance(item, dict | list):
            continue
        if depth > max_depth:
            raise _too_deep(max_depth)
        if isinstance(item, dict):
            todo.extend((key, depth + 1) for key in item)
            todo.extend((below, depth + 1) for below in item.values())
        elif not all(type(below) is int for below in item):  # token ids need no look
            todo.extend((below, depth + 1) for below in item)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(
            "a string holds half of a surrogate pair, which is no character", 400, "invalid_json"
        ) from None


def _too_deep(max_depth: int) -> RequestError:
    return RequestError(
        f"the request body nests deeper than {max_depth} (limits.max_json_depth)",
        400,
        "invalid_json",
    )
