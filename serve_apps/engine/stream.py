"""What every engine's front shares: the check of a request, and the stream that answers it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Self

from cluster.errors import RequestError
from serve_apps.engine.interface import (
    Chunk,
    EngineInfo,
    EngineRequest,
    FinishReason,
    Logprob,
    PromptInfo,
)


def check_request(request: EngineRequest, info: EngineInfo) -> None:
    """Raise RequestError (400) when ``request`` can never be served by such an engine."""
    prompt, wanted = len(request.prompt_ids), request.max_tokens
    if prompt == 0:
        raise RequestError("the prompt is empty; send at least one token", param="prompt")
    least = 1 if request.sampling.prompt_logprobs is None else 0
    if wanted < least:
        raise RequestError(f"max_tokens={wanted} must be at least {least}", param="max_tokens")
    if prompt + wanted > info.max_model_len:
        raise RequestError(
            f"the prompt has {prompt} tokens and max_tokens asks for {wanted} more, "
            f"{prompt + wanted} in all; this model holds {info.max_model_len}: shorten either",
            code="context_length_exceeded",
            param="max_tokens" if prompt < info.max_model_len else "prompt",
        )
    if info.vocab_size and not (
        min(request.prompt_ids) >= 0 and max(request.prompt_ids) < info.vocab_size
    ):
        raise RequestError(
            f"the prompt holds a token id outside 0..{info.vocab_size - 1}", param="prompt"
        )
    sampling = request.sampling
    if not (0 <= sampling.temperature < float("inf")):
        raise RequestError(
            f"temperature={sampling.temperature} must be 0 or more", param="temperature"
        )
    if not (0 < sampling.top_p <= 1):
        raise RequestError(f"top_p={sampling.top_p} must be in (0, 1]", param="top_p")
    if sampling.top_k < 0:
        raise RequestError(f"top_k={sampling.top_k} must be 0 (all) or more", param="top_k")


def check_room(outstanding: int, info: EngineInfo) -> None:
    """Raise RequestError (429) when as many requests run and wait as the engine takes."""
    waiting = outstanding - info.max_concurrent
    if waiting >= info.max_queued:
        raise RequestError(
            f"{info.max_concurrent} requests run and {max(waiting, 0)} wait, the most this engine "
            "takes; try again later",
            status=429,
            code="engine_full",
            retry_after_s=1 + max(waiting, 0) // info.max_concurrent,
        )


class Answer:
    """The engine's end of one stream: tokens are pushed in, never blocking the engine."""

    def __init__(self, request: EngineRequest, version: str) -> None:
        self.request_id, self.version = request.request_id, version
        self.ready, self.ended = asyncio.Event(), asyncio.Event()
        self.ids: list[int] = []  # at most max_tokens: the request ends there
        self.logprobs: list[Logprob] = []
        self.prompt: PromptInfo | None = None
        self.finish: FinishReason | None = None
        self.error: str | None = None
        self.exception: Exception | None = None

    def push(
        self,
        ids: tuple[int, ...],
        finish: FinishReason | None = None,
        error: str | None = None,
        logprobs: tuple[Logprob, ...] = (),
        prompt: PromptInfo | None = None,
    ) -> None:
        """Append one step's tokens, and how the answer ends if it does."""
        self.ids.extend(ids)
        self.logprobs.extend(logprobs)
        self.prompt = prompt or self.prompt
        self.finish, self.error = finish, error
        self.ready.set()
        if finish:
            self.ended.set()

    def fail(self, exception: Exception) -> None:
        """End the answer with ``exception``, after the tokens that are there already."""
        self.exception = exception
        self.ready.set()
        self.ended.set()


class TokenStream:
    """The caller's end of one stream; implements ``interface.Stream``.

    A class, not an async generator: a generator that was never started runs no ``finally``, and
    one dropped at a ``yield`` is closed only when the event loop gets to it.
    """

    def __init__(self, answer: Answer, on_close: Callable[[str], None]) -> None:
        self._answer, self._on_close = answer, on_close
        self._loop = asyncio.get_running_loop()
        self._ended = False

    @property
    def version(self) -> str:
        """What answers; settled with the first chunk."""
        return self._answer.version

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if self._ended:
            raise StopAsyncIteration
        answer = self._answer
        try:
            await answer.ready.wait()
        except BaseException:
            self._close()
            raise
        if answer.ids or answer.finish:
            chunk = Chunk(
                answer.request_id,
                tuple(answer.ids),
                answer.finish,
                answer.error,
                tuple(answer.logprobs),
                answer.prompt,
            )
            answer.ids.clear()
            answer.logprobs.clear()
            answer.prompt = None
            self._ended = answer.finish is not None
            if answer.exception is None:
                answer.ready.clear()
            return chunk
        self._ended = True
        if answer.exception is None:
            raise StopAsyncIteration
        raise answer.exception

    async def rest(self, seconds: float) -> None:
        """Let tokens come together for so long, or until the answer has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._answer.ended.wait()

    async def aclose(self) -> None:
        """End the request if it still runs."""
        self._close()

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            self._on_close(self._answer.request_id)

    def __del__(self) -> None:
        if not self._ended and not self._loop.is_closed():
            # The collector may run in any thread; the engine's tables belong to the loop's.
            self._loop.call_soon_threadsafe(self._on_close, self._answer.request_id)
