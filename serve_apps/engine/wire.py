"""The local socket between a replica's front and rank 0: length-prefixed msgpack frames.

A frame is four bytes of length (little endian) and one msgpack map with text keys. Never pickle:
a frame can carry data, not behaviour. A length above ``MAX_FRAME_BYTES`` ends the connection
before a byte of it is kept.

    front → each rank   load
    front → rank 0      admit, abort, release, stats, stop
    each rank → front   hello (once), beat (each second), reply
    rank 0 → front      step (one a step, all requests)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgpack

from cluster.errors import EngineError

MAX_FRAME_BYTES = 32 * 2**20
"""A prompt of a million tokens takes five of these 32 MiB."""
HEADER = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class RankSpec:
    """All that a rank needs to know; travels as JSON or as an actor call's plain dict."""

    engine: str
    """Name for logs and errors."""
    rank: int
    num_ranks: int
    local_device: int
    """Which of the GPUs that this process sees is the rank's."""
    socket: str
    store: str
    """File through which the ranks meet; it must live as long as the engine."""
    parent_pid: int
    """The rank ends with this process; 0 when something else (Ray) sees to that."""
    device: str
    dtype: str
    max_model_len: int
    max_concurrent: int
    max_batch_tokens: int
    cache_tokens: int | None
    threads: int | None
    start_timeout_s: float
    step_timeout_s: float


def pack(message: dict[str, Any]) -> bytes:
    """Return ``message`` as one frame; EngineError when it is larger than a frame may be."""
    body = msgpack.packb(message)
    if len(body) > MAX_FRAME_BYTES:
        raise EngineError(f"a frame of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body)) + bytes(body)


class Frames:
    """Cuts a byte stream back into messages, whatever pieces it arrives in."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Yield each message that ``data`` completes; EngineError on a frame that cannot be."""
        self._held += data
        while len(self._held) >= HEADER.size:
            (size,) = HEADER.unpack_from(self._held)
            if size > MAX_FRAME_BYTES:
                raise EngineError(f"a frame of {size} bytes exceeds {MAX_FRAME_BYTES}")
            if len(self._held) < HEADER.size + size:
                return
            body = bytes(self._held[HEADER.size : HEADER.size + size])
            del self._held[: HEADER.size + size]
            try:
                message = msgpack.unpackb(body)
            except ValueError as error:
                raise EngineError(f"a frame is not msgpack: {error}") from None
            if not isinstance(message, dict):
                raise EngineError(f"a frame holds {type(message).__name__}, not a map")
            yield message


class PeerFailed(EngineError):
    """Another rank failed, and says why itself."""
