"""The local socket between a replica's front and rank 0: length-prefixed msgpack frames.

A frame is four bytes of length (little endian) and one msgpack map with text keys. Never pickle:
a frame can carry data, not behaviour. A length above ``MAX_FRAME_BYTES`` ends the connection
before a byte of it is kept.

    front → each rank   load, adapt
    front → rank 0      admit, abort, release, stats, stop
    each rank → front   hello (once), beat (each second), reply
    rank 0 → front      step (one a step, all requests)

Fields that are seldom used (sampling rules, log-probabilities) are left out where they say
nothing: most frames of a decoding step carry one id a request.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import msgpack

from cluster.errors import EngineError
from serve_apps.engine.interface import (
    EngineRequest,
    FinishReason,
    Grammar,
    Logprob,
    PromptInfo,
    Sampling,
)

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
    prefix_cache: bool
    prompt_lookup: int
    quantization: Literal["none", "int8"]
    weights: Literal["packed", "shared"]
    threads: int | None
    start_timeout_s: float
    step_timeout_s: float


def pack(message: dict[str, Any]) -> bytes:
    """Return ``message`` as one frame; EngineError when it is larger than a frame may be."""
    body = msgpack.packb(message)
    if len(body) > MAX_FRAME_BYTES:
        raise EngineError(f"a frame of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body)) + bytes(body)


def pack_request(request: EngineRequest, version: str, adapter: str = "") -> dict[str, Any]:
    """Return the message that admits ``request``; `unpack_sampling` reads its rules."""
    plain = Sampling()
    rules = {
        f.name: value
        for f in fields(Sampling)
        if (value := getattr(request.sampling, f.name)) != getattr(plain, f.name)
    }
    if request.sampling.seed is not None:
        rules["seed"] = request.sampling.seed & (2**64 - 1)  # what msgpack and the generator take
    if request.sampling.grammar is not None:
        rules["grammar"] = (request.sampling.grammar.kind, request.sampling.grammar.text)
    return {
        "t": "admit",
        "id": request.request_id,
        "version": version,
        "prompt": request.prompt_ids,
        "max_tokens": request.max_tokens,
        "sampling": rules,
        "stop": request.stop_ids,
        "priority": request.priority,
        "deadline_s": request.deadline_s,
        "salt": request.salt,
        **({"adapter": adapter} if adapter else {}),
        **({"pinned": True} if request.pinned else {}),
    }


def unpack_sampling(rules: dict[str, Any]) -> Sampling:
    """Return the rules that `pack_request` wrote."""
    bias = tuple((int(token), float(by)) for token, by in rules.get("logit_bias", ()))
    grammar = Grammar(*rules["grammar"]) if "grammar" in rules else None
    return Sampling(**(rules | {"logit_bias": bias, "grammar": grammar}))


class Told(NamedTuple):
    """What rank 0 says of one request after a step."""

    request_id: str
    token_ids: tuple[int, ...]
    finish: FinishReason | None
    error: str | None = None
    logprobs: tuple[Logprob, ...] = ()
    prompt: PromptInfo | None = None

    def pack(self) -> list[Any]:
        """Return plain data; ``unpack`` is its inverse."""
        short = [self.request_id, self.token_ids, self.finish, self.error]
        if self.prompt is None:
            return [*short, _plain(self.logprobs)] if self.logprobs else short
        prompt = self.prompt
        told = (prompt.cached_tokens, prompt.queued_s, _plain(prompt.logprobs))
        return [*short, _plain(self.logprobs), told]

    @classmethod
    def unpack(cls, said: list[Any]) -> Told:
        """Return what ``pack`` made plain."""
        request_id, ids, finish, error, *more = said
        logprobs = _logprobs(more[0]) if more else ()
        prompt = None
        if len(more) > 1:
            cached, queued_s, scores = more[1]
            prompt = PromptInfo(cached, queued_s, _logprobs(scores))
        return cls(request_id, tuple(ids), finish, error, logprobs, prompt)


def _plain(logprobs: tuple[Logprob, ...]) -> list[Any]:
    return [(one.token_id, one.logprob, one.top) for one in logprobs]


def _logprobs(plain: list[Any]) -> tuple[Logprob, ...]:
    return tuple(Logprob(i, p, tuple((j, q) for j, q in top)) for i, p, top in plain)


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
