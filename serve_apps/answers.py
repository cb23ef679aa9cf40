"""From an engine's chunks to events: text that ends where it should, scores, tool calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from cluster.errors import EngineError, RequestError
from cluster.text.stream import TextStream
from serve_apps.calls import Event, Finish, Score, ToolDelta
from serve_apps.engine.interface import Chunk, PromptInfo, Stream
from serve_apps.scores import Scorer
from serve_apps.stops import StopFilter

SLOW = 1.5
"""An engine whose steps take so many intervals needs nobody to wait for its tokens."""


class CallReader(Protocol):
    """What tells tool calls from text."""

    calls: int
    done: bool

    def feed(self, text: str) -> tuple[str, tuple[ToolDelta, ...]]:
        """Add text; return what became certain."""

    def flush(self) -> tuple[str, tuple[ToolDelta, ...]]:
        """Return what is left at the end."""


class Reading:
    """One answer on its way from token ids to text, scores and calls."""

    def __init__(
        self,
        text: TextStream,
        stop: Sequence[str] = (),
        calls: CallReader | None = None,
        scorer: Scorer | None = None,
        echo: str = "",
    ) -> None:
        """``echo`` is the prompt's text, where the answer is to begin with it."""
        self._text, self._stops, self._calls, self._scorer = text, StopFilter(stop), calls, scorer
        self._out, self._tools = [echo] if echo else [], list[ToolDelta]()
        self._scores: list[Score] = []
        self._held: list[Score] = []  # of tokens whose text is not out yet
        self._read = self._shown = len(echo)
        self.tokens = 0
        """Tokens of the answer so far; none after the one that ended a stop string."""
        self.finish: Finish | None = None
        self.prompt: PromptInfo | None = None

    def take(self, chunk: Chunk) -> None:
        """Add what an engine says. Raises what stands for an end that is no end."""
        finish = _finish(chunk)
        if chunk.prompt is not None:
            self.prompt = chunk.prompt
            if self._scorer:
                self._scores += self._scorer.prompt(chunk.prompt.logprobs)
        for at, number in enumerate(chunk.token_ids):
            self.tokens += 1
            if self._scorer:
                self._held.append(self._scorer.score(chunk.logprobs[at], self._read))
            said = self._text.feed((number,))
            self._read += len(said)
            self._say(self._stops.feed(said))
            if self._ended():
                break
        if self.finish is None and finish is not None:
            self._say(self._stops.feed(self._text.flush()))
            if not self._ended():
                self._say(self._stops.flush())
                self.finish = finish
        self._release()
        if self.finish and self._calls:
            self._add(self._calls.flush())
            if self._calls.calls and self.finish == "stop":
                self.finish = "tool_calls"

    def drain(self) -> tuple[str, tuple[Score, ...], tuple[ToolDelta, ...]]:
        """Return what is new since the last time."""
        out, scores, tools = "".join(self._out), tuple(self._scores), tuple(self._tools)
        self._out, self._scores, self._tools = [], [], []
        return out, scores, tools

    @property
    def news(self) -> bool:
        """Whether there is anything to drain."""
        return bool(self._out or self._tools or self._scores)

    def _ended(self) -> bool:
        if self._stops.hit is not None or (self._calls and self._calls.done):
            self.finish = "stop"
        return self.finish is not None

    def _say(self, text: str) -> None:
        if not text:
            return
        self._shown += len(text)
        if self._calls:
            self._add(self._calls.feed(text))
        else:
            self._out.append(text)

    def _add(self, found: tuple[str, tuple[ToolDelta, ...]]) -> None:
        if found[0]:
            self._out.append(found[0])
        self._tools += found[1]

    def _release(self) -> None:
        """Let scores out with the text of their tokens; those of a stop string never."""
        ended = self.finish is not None and self._stops.hit is None
        count = 0
        while count < len(self._held) and (ended or self._held[count].offset < self._shown):
            count += 1
        self._scores += self._held[:count]
        del self._held[:count]


async def answer(
    index: int,
    stream: Stream,
    reading: Reading,
    prompt_tokens: int,
    interval: Callable[[], float | None] = lambda: 0.0,
    clock: Callable[[], float] | None = None,
) -> AsyncGenerator[Event, None]:
    """Turn one engine stream into events; the first at the first token, the last with ``finish``.

    Between two events lie ``interval()`` seconds at least, if tokens come that fast; the first
    does not wait. With None there is nothing between the first and the last. What ends an answer
    here, as a stop string does, ends the engine's work at once.
    """
    clock = clock or asyncio.get_running_loop().time
    sent, first, hurried = 0.0, True, False
    while reading.finish is None:
        least = interval()
        if hurried and least:
            await stream.rest(max(0.0, sent + least - clock()))
        chunk = await anext(stream, None)
        if chunk is None:
            raise EngineError("the engine ended the stream without a reason")
        reading.take(chunk)
        if reading.finish and chunk.finish is None:
            await stream.aclose()
        if not (reading.finish or first or (least is not None and reading.news)):
            continue
        now = clock()
        hurried = not first and now - sent < SLOW * (least or 0.0)
        sent = now
        out, scores, tools = reading.drain()
        info = reading.prompt
        cached = min(info.cached_tokens, prompt_tokens) if info else 0
        yield Event(
            *(stream.version, index, out, prompt_tokens, reading.tokens, reading.finish),
            *(cached, scores, tools, info.queued_s if info and first else None),
        )
        first = False


def _finish(chunk: Chunk) -> Finish | None:
    if chunk.finish == "error":
        raise EngineError(chunk.error or "the engine gave no reason")
    if chunk.finish == "abort":
        raise RequestError(
            chunk.error
            or "the request was ended: its version was retired, or the replica is shutting down; "
            "try again",
            503,
            "aborted",
            None,
            1,
        )
    return chunk.finish


async def merge(streams: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[Event, None]:
    """Yield the events of several answers as they come; the first failure ends all of them."""
    queue: asyncio.Queue[Event | None] = asyncio.Queue(maxsize=len(streams))

    async def pump(stream: AsyncGenerator[Event, None]) -> None:
        async with aclosing(stream):
            async for event in stream:
                await queue.put(event)

    async def pump_all() -> None:
        tasks = [asyncio.create_task(pump(stream)) for stream in streams]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            while queue.full():
                queue.get_nowait()
            queue.put_nowait(None)

    work = asyncio.create_task(pump_all())
    try:
        while (event := await queue.get()) is not None:
            yield event
        await work
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
