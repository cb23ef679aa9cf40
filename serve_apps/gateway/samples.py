"""The gateway's ``/metrics``: this node's samples of ours, and nobody else's."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from cluster.errors import RequestError
from cluster.metrics import EXPORTED

if TYPE_CHECKING:
    from aiohttp import StreamReader

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TIMEOUT_S = 5.0
MAX_READ_BYTES = 64_000_000
MAX_LINE_BYTES = 65_536
MAX_KEPT_BYTES = 4_000_000
FRESH_S = 2.0
"""Answers younger than this are given again: a client cannot make the node work harder."""

_OURS = tuple(f"{start}{EXPORTED}".encode() for start in ("", "# HELP ", "# TYPE "))
# what says something of the machine, and tells no series from another on one node
_MACHINE = re.compile(rb'\b(?:NodeAddress|SessionName|Version|otel_scope_\w+)="(?:[^"\\]|\\.)*",?')


def ours(line: bytes) -> bytes | None:
    """Return a line of the export if it is one of ours, without the machine's address.

    A histogram's ``_sum`` is left out: Ray makes it up from the buckets' middles.
    """
    if not line.startswith(_OURS) or b"_seconds_sum{" in line:
        return None
    if line.startswith(b"#"):
        return line
    head, brace, rest = line.partition(b"{")
    labels, end, value = rest.rpartition(b"} ")
    return line if not end else head + brace + _MACHINE.sub(b"", labels) + end + value


class Samples:
    """Reads a node's export, one reader at a time, bounded in bytes and seconds."""

    def __init__(self, address: Callable[[], Awaitable[str]]) -> None:
        """``address`` finds the http URL of this node's export."""
        self._address = address
        self._lock = asyncio.Lock()
        self._text, self._read_at = b"", float("-inf")

    async def text(self) -> bytes:
        """Return the lines of ours; RequestError (503) when they cannot be had."""
        async with self._lock:
            if time.monotonic() - self._read_at > FRESH_S:
                self._text = await self._read()
                self._read_at = time.monotonic()
            return self._text

    async def _read(self) -> bytes:
        import aiohttp

        try:
            async with asyncio.timeout(TIMEOUT_S):
                async with aiohttp.ClientSession(auto_decompress=False) as session:
                    url = await self._address()
                    async with session.get(url, headers={"accept-encoding": "identity"}) as answer:
                        answer.raise_for_status()
                        return await _keep(answer.content)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            raise RequestError(
                "the node's metrics cannot be read now; try again", 503, "no_metrics", None, 5
            ) from None


async def _keep(content: StreamReader) -> bytes:
    read, size, held = 0, 0, b""
    kept: list[bytes] = []
    async for part in content.iter_any():
        read += len(part)
        *lines, held = (held + part).split(b"\n")
        for line in lines:
            if (line_kept := ours(line)) is not None:
                kept.append(line_kept)
                size += len(line_kept)
        if read > MAX_READ_BYTES or size > MAX_KEPT_BYTES or len(held) > MAX_LINE_BYTES:
            raise ValueError("the export is larger than it can be")
    return b"\n".join([*kept, b""])


async def node_export() -> str:
    """Return the URL of the export of the node that this actor runs on."""
    return await asyncio.to_thread(_node_export)


def _node_export() -> str:
    import ray

    here = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == here:
            return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    raise ValueError(f"Ray does not list this node, {here}")
