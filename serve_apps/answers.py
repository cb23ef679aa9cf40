"""From a call to token ids, and from an engine's chunks to text that ends where it should."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from cluster.errors import ConfigError, EngineError, RequestError
from cluster.text.chat import ChatText
from cluster.text.stream import TextStream
from serve_apps.calls import Call, Event
from serve_apps.engine.interface import Chunk, EngineRequest, Sampling, Stream
from serve_apps.stops import StopFilter

INLINE_CHARS = 8_000
"""Longer prompts are encoded in a thread, so that other requests keep streaming."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One prompt as ids, with the length that its answer may have."""

    ids: tuple[int, ...]
    max_tokens: int

    def request(self, call: Call, index: int, eos_ids: tuple[int, ...]) -> EngineRequest:
        """Return what the engine is asked."""
        seed = None if call.seed is None else (call.seed + index) % 2**63
        return EngineRequest(
            request_id=f"{call.request_id}-{index}",
            prompt_ids=self.ids,
            max_tokens=self.max_tokens,
            sampling=Sampling(call.temperature, call.top_p, call.top_k, seed),
            stop_ids=eos_ids,
        )


async def prepare(call: Call, text: ChatText, max_model_len: int) -> list[Prepared]:
    """Encode every prompt of a call; RequestError (400) when one is empty or too long."""
    size = sum(len(p) for p in call.prompts) + sum(len(m["content"]) for m in call.messages or ())
    if size <= INLINE_CHARS:
        encoded = _encode(call, text)
    else:
        encoded = await asyncio.to_thread(_encode, call, text)
    param = "prompt" if call.messages is None else "messages"
    return [Prepared(ids, _room(ids, call, text, max_model_len, param)) for ids in encoded]


def _encode(call: Call, text: ChatText) -> list[tuple[int, ...]]:
    if call.messages is None:
        return [text.encode(p) if isinstance(p, str) else p for p in call.prompts]
    if not text.has_template:
        raise RequestError(
            "this model has no chat template; use /v1/completions",
            400,
            "chat_not_supported",
            "messages",
        )
    try:
        return [text.encode_chat(call.messages)]
    except ConfigError as error:
        # what a template says of a conversation that it refuses; a path of ours never
        said = str(error).rpartition("/")[2]
        raise RequestError(
            f"the model's chat template refused the messages: {said:.200}",
            400,
            "invalid_messages",
            "messages",
        ) from None


def _room(ids: tuple[int, ...], call: Call, text: ChatText, max_model_len: int, param: str) -> int:
    """Return how long the answer may be; RequestError where nothing would fit."""
    if not ids:
        raise RequestError("the prompt is empty: it has no token", 400, "empty_prompt", param)
    if not (min(ids) >= 0 and max(ids) < text.vocab_size):
        raise RequestError(
            f"the prompt holds a token id outside 0..{text.vocab_size - 1}",
            400,
            "invalid_token_id",
            param,
        )
    left = max_model_len - len(ids)
    if left < 1:
        raise RequestError(
            f"the prompt has {len(ids)} tokens; this model holds {max_model_len}, prompt and "
            "answer together: shorten the prompt",
            400,
            "context_length_exceeded",
            param,
        )
    if call.max_tokens <= left:
        return call.max_tokens
    if call.clip:
        return left
    raise RequestError(
        f"the prompt has {len(ids)} tokens and max_tokens asks for {call.max_tokens} more; this "
        f"model holds {max_model_len} in all: shorten the prompt or ask for at most {left}",
        400,
        "context_length_exceeded",
        param,
    )


async def answer(
    index: int,
    stream: Stream,
    text: TextStream,
    version: str,
    prompt_tokens: int,
    stop: Sequence[str],
) -> AsyncGenerator[Event, None]:
    """Turn one engine stream into events; the first at the first token, the last with ``finish``.

    A stop string ends it, and ends the engine's work at once.
    """
    stops, tokens, first = StopFilter(stop), 0, True
    async for chunk in stream:
        out, finish = "", _finish(chunk)
        for number in chunk.token_ids:  # one by one: usage counts no token after the stop
            tokens += 1
            out += stops.feed(text.feed((number,)))
            if stops.hit is not None:
                break
        if finish and stops.hit is None:
            out += stops.feed(text.flush())
            out += stops.flush()
        if stops.hit is not None:
            finish = "stop"
            await stream.aclose()
        if out or finish or first:
            yield Event(version, index, out, prompt_tokens, tokens, finish)
        first = False
        if finish:
            return
    raise EngineError("the engine ended the stream without a reason")


def _finish(chunk: Chunk) -> Literal["stop", "length"] | None:
    if chunk.finish == "error":
        raise EngineError(chunk.error or "the engine gave no reason")
    if chunk.finish == "abort":
        raise RequestError(
            "the request was ended: its version was retired, or the replica is shutting down; "
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
