"""Errors on the wire: OpenAI's shape, a request id, and nothing about the machine."""

from __future__ import annotations

import json
from typing import Any

from cluster.errors import RequestError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def body(error: RequestError, request_id: str) -> dict[str, Any]:
    """Return the JSON object that a client gets, alone or as an event of a stream."""
    kind = TYPES.get(error.status, "server_error" if error.status >= 500 else None)
    return {
        "error": {
            "message": error.message,
            "type": kind or "invalid_request_error",
            "param": error.param,
            "code": error.code,
            "request_id": request_id,
        }
    }


def headers(error: RequestError) -> list[tuple[bytes, bytes]]:
    """Return the headers that go with it."""
    out = [(b"content-type", b"application/json")]
    if error.retry_after_s is not None:
        out.append((b"retry-after", str(error.retry_after_s).encode()))
    if error.status == 401:
        out.append((b"www-authenticate", b"Bearer"))
    if error.status in {408, 413}:
        # the rest of the body may still be on its way; do not read it
        out.append((b"connection", b"close"))
    return out


def encode(value: dict[str, Any]) -> bytes:
    """Return compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def internal() -> RequestError:
    """Return what a client learns of a bug of ours."""
    return RequestError("internal error; the server's log has it", 500, "internal_error")


def upstream() -> RequestError:
    """Return what a client learns when a replica dies under its request."""
    return RequestError(
        "the model's replica stopped answering; it is being rebuilt, try again in some seconds",
        502,
        "upstream_failed",
        retry_after_s=5,
    )
