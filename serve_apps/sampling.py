"""What a replica does for a trainer: ids in; ids, log-probabilities and version out."""

from __future__ import annotations

import asyncio
import secrets

from cluster.errors import EngineError, RequestError
from cluster.generation import Answered, Ask, Sample
from serve_apps.engine.interface import Engine, EngineRequest, PromptInfo, Sampling, Stream


async def answered(engine: Engine, ask: Ask, version: str) -> Answered:
    """Answer one prompt with one version.

    As many answers run at once as the engine takes; RequestError (429) where it takes none, or for
    what is wrong with the prompt.
    """
    waiting = [_request(ask, k) for k in range(ask.n if ask.max_tokens else 1)]
    samples: list[Sample] = []
    prompt: PromptInfo | None = None
    while waiting:
        streams = _admitted(engine, waiting, version)
        try:
            done = await asyncio.gather(*(_read(stream) for stream in streams))
        finally:
            for stream in streams:
                await stream.aclose()
        samples += [sample for sample, _ in done]
        prompt, waiting = prompt or done[0][1], waiting[len(streams) :]
    if ask.max_tokens:
        return Answered(version, tuple(samples))
    scored = prompt.logprobs if prompt else ()
    return Answered(version, prompt=tuple(one.top[: ask.top] for one in scored))


def _request(ask: Ask, number: int) -> EngineRequest:
    seed = (ask.seed + number) % 2**63
    sampling = Sampling(temperature=ask.temperature, seed=seed, logprobs=0)
    if not ask.max_tokens:
        sampling = Sampling(prompt_logprobs=ask.top)
    return EngineRequest(
        request_id=f"sample-{secrets.token_hex(8)}",
        prompt_ids=ask.prompt_ids,
        max_tokens=ask.max_tokens,
        sampling=sampling,
        stop_ids=ask.stop_ids,
        pinned=True,  # the trainer is told one version for all of its samples
    )


def _admitted(engine: Engine, waiting: list[EngineRequest], version: str) -> list[Stream]:
    streams: list[Stream] = []
    for request in waiting:
        try:
            streams.append(engine.generate(request, version))
        except RequestError as error:
            if error.status != 429 or not streams:
                raise
            break  # full: those that run make room
    return streams


async def _read(stream: Stream) -> tuple[Sample, PromptInfo | None]:
    ids: list[int] = []
    logprobs: list[float] = []
    prompt: PromptInfo | None = None
    finish = None
    async for chunk in stream:
        ids += chunk.token_ids
        logprobs += [one.logprob for one in chunk.logprobs]
        prompt, finish = prompt or chunk.prompt, chunk.finish
        if finish in ("error", "abort"):
            raise EngineError(f"{chunk.request_id}: {chunk.error or 'it was aborted'}")
    return Sample(tuple(ids), tuple(logprobs), finish == "stop"), prompt
