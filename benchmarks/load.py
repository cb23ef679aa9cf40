"""A small load client: streaming chat completions over plain asyncio connections.

It keeps one connection for each of at most 64 concurrent requests, reads server-sent events as
they arrive and notes when. Loopback only, one process, no client library: what it costs is told
with each result.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

MAX_CONNECTIONS = 64
CONNECT_S = 10.0


class LoadError(RuntimeError):
    """A server answered with something else than a stream of tokens."""


@dataclass(frozen=True)
class Endpoint:
    """Where chat completions are served, and what this server wants in each request."""

    url: str
    """Base URL that ends in ``/v1``; http, loopback."""
    model: str
    key: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields for every request, such as ``ignore_eos``."""


@dataclass(frozen=True)
class Answer:
    """One streamed answer; times are seconds since its request was sent."""

    first_s: float
    """Until the first text."""
    total_s: float
    gaps_s: tuple[float, ...]
    """Between one piece of text and the next."""
    tokens: int
    """As the server counted them (``usage``)."""
    prompt_tokens: int
    text: str = ""
    versions: tuple[str, ...] = ()
    """What its chunks name as ``system_fingerprint``, each once."""
    finish: str | None = None
    sent: float = 0.0
    """When its request was sent, on the monotonic clock."""
    pieces: tuple[bytes, ...] = ()
    """The bytes of each token, where ``logprobs`` were asked for."""


class Events:
    """Server-sent events out of bytes, however they are cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[str]:
        """Return the ``data`` of every event that is complete by now."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        found = (line.rstrip(b"\r") for line in lines)
        return [line[5:].strip().decode() for line in found if line.startswith(b"data:")]


class Connection:
    """One keep-alive HTTP/1.1 connection; a closed one is opened again for the next request."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        where = urlsplit(endpoint.url)
        if where.scheme != "http" or where.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise LoadError(f"{endpoint.url} is not http on loopback: this load stays on a machine")
        self._host, self._port = where.hostname, where.port or 80
        self._path = where.path.rstrip("/") + "/chat/completions"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, messages: Sequence[dict[str, str]], max_tokens: int) -> Answer:
        """Send one greedy streaming request and read its answer; LoadError on any other reply."""
        body = json.dumps(
            {
                "model": self._endpoint.model,
                "messages": list(messages),
                "max_tokens": max_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                **self._endpoint.extra,
            }
        ).encode()
        head = (
            f"POST {self._path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\n"
            f"authorization: Bearer {self._endpoint.key or 'none'}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode()
        if self._streams is None:
            opening = asyncio.open_connection(self._host, self._port)
            self._streams = await asyncio.wait_for(opening, CONNECT_S)
        reader, writer = self._streams
        sent = time.monotonic()
        writer.write(head + body)
        try:
            return await self._read(reader, sent)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close it; harmless when it is closed."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _read(self, reader: asyncio.StreamReader, sent: float) -> Answer:
        status, headers = await _head(reader)
        chunked = "chunked" in headers.get("transfer-encoding", "")
        if status != 200 or not chunked:
            length = int(headers.get("content-length") or 0)
            text = (await reader.readexactly(length)).decode(errors="replace")
            raise LoadError(f"{self._endpoint.url} answered {status}: {text[:500]}")
        events, times = Events(), list[float]()
        usage: dict[str, Any] = {}
        text, versions, finish = list[str](), dict[str, None](), None
        pieces = list[bytes]()
        while True:
            size = int((await reader.readline()).split(b";")[0], 16)
            piece = await reader.readexactly(size)
            await reader.readexactly(2)
            now = time.monotonic() - sent
            for data in events.feed(piece):
                if data == "[DONE]":
                    continue
                event = json.loads(data)
                if error := event.get("error"):
                    raise LoadError(f"{self._endpoint.url} broke off: {str(error)[:500]}")
                usage = event.get("usage") or usage
                if version := event.get("system_fingerprint"):
                    versions[version] = None
                said = [choice["delta"].get("content") for choice in event.get("choices", ())]
                for choice in event.get("choices", ()):
                    finish = choice.get("finish_reason") or finish
                    scored = (choice.get("logprobs") or {}).get("content") or ()
                    pieces += [bytes(token["bytes"]) for token in scored]
                if any(said):
                    times.append(now)
                    text += [piece for piece in said if piece]
            if size == 0:
                break
        if headers.get("connection", "").lower() == "close":
            self.close()
        if not times or not usage:
            raise LoadError(f"{self._endpoint.url} sent {len(times)} pieces of text, {usage=}")
        gaps = tuple(b - a for a, b in zip(times, times[1:], strict=False))
        return Answer(
            times[0],
            now,
            gaps,
            int(usage["completion_tokens"]),
            int(usage["prompt_tokens"]),
            "".join(text),
            tuple(versions),
            finish,
            sent,
            tuple(pieces),
        )


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    raw = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in raw[1:] if line)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    return int(raw[0].split(" ")[1]), headers


@dataclass(frozen=True)
class Burst:
    """What a number of requests at once gave."""

    seconds: float
    """From the first request to the last token."""
    answers: tuple[Answer, ...]

    @property
    def tokens(self) -> int:
        """Return all generated tokens."""
        return sum(answer.tokens for answer in self.answers)


async def burst(
    endpoint: Endpoint, questions: Sequence[str], max_tokens: int, timeout_s: float
) -> Burst:
    """Ask all questions at once, each on a connection of its own."""
    return await stream(endpoint, questions, max_tokens, len(questions), timeout_s)


async def stream(
    endpoint: Endpoint,
    questions: Sequence[str],
    max_tokens: int,
    concurrency: int,
    timeout_s: float,
) -> Burst:
    """Ask all questions, at most ``concurrency`` at a time; the next starts when one has ended.

    TimeoutError after ``timeout_s``, LoadError when one of them is not answered properly.
    """
    if not 1 <= concurrency <= MAX_CONNECTIONS:
        raise LoadError(f"{concurrency} connections; at least 1, at most {MAX_CONNECTIONS}")
    waiting = iter(questions)
    connections = [Connection(endpoint) for _ in range(concurrency)]
    answers: list[Answer] = []

    async def work(connection: Connection) -> None:
        for question in waiting:
            said = [{"role": "user", "content": question}]
            answers.append(await connection.ask(said, max_tokens))

    began = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
            for connection in connections:
                group.create_task(work(connection))
        return Burst(time.monotonic() - began, tuple(answers))
    finally:
        for connection in connections:
            connection.close()
