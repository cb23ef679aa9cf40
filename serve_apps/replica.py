"""One engine's front: text to ids and back, admission, health, and versions that flip live.

A plain class without torch; ``serve_apps.app`` wraps it for Serve, tests use it as it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext

from cluster.errors import EngineError, RequestError
from cluster.generation import Answered, Ask
from cluster.library.store import Library
from cluster.meter import Meter
from cluster.text.chat import ChatText
from serve_apps.adapters import Adapters
from serve_apps.answers import CallReader, Reading, answer, merge
from serve_apps.calls import Call, Event, Refusal
from serve_apps.config import ModelConfig
from serve_apps.engine.interface import Engine, EngineInfo, Stream
from serve_apps.metering import ReplicaMeter, Rest
from serve_apps.prepare import Plan, prepare
from serve_apps.room import resident_bytes
from serve_apps.sampling import answered
from serve_apps.scores import Scorer
from serve_apps.shelf import Shelf
from serve_apps.tools.forced import ForcedCalls
from serve_apps.tools.free import FreeCalls
from serve_apps.versions import Board, Versions

HEALTH_S = 8.0
"""Bound of one health check; below the time-out that Serve is given for it."""
CHUNKS_A_CORE = 50
"""A second, where the limits name no number."""
TRIES = 3
"""Times that a call may see its version retired while its prompt is encoded."""

log = logging.getLogger(__name__)


class Replica:
    """Call ``start`` first; then ``generate`` any number of times at once; ``stop`` at the end."""

    def __init__(
        self,
        config: ModelConfig,
        engine: Engine,
        library: Library,
        board: Board | None = None,
        replica_id: str = "replica",
        meter: Meter | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        """``board`` gives orders about versions; without one the library's alias decides once.

        ``meter`` takes the replica's numbers; without one nothing is counted. ``shelf`` has the
        versions that are not in the library.
        """
        self._config, self._engine = config, engine
        self._meter = ReplicaMeter(meter, config.name, config.engine.kind) if meter else None
        self._measuring: asyncio.Task[None] | None = None
        self._versions = Versions(config, engine, library, board, replica_id, shelf)
        self._adapters = Adapters(config, engine, library, self._versions, shelf)
        self._healthy = True
        self._streaming = 0
        self._budget = CHUNKS_A_CORE * len(os.sched_getaffinity(0))

    async def start(self) -> EngineInfo:
        """Start the engine and load the version that answers. Raises what that raises."""
        await self._engine.start()
        await self._versions.start()
        await self._adapters.start()
        if self._meter:
            self._measuring = asyncio.create_task(self._meter.run(self._engine.stats, self._rest))
        return self._engine.info

    def _rest(self) -> Rest:
        sleeper, pids = self._versions.sleeper, getattr(self._engine, "rank_pids", ())
        return Rest(sleeper.asleep, resident_bytes(pids), sleeper.wakes, sleeper.waking_s)

    async def generate(self, call: Call) -> AsyncGenerator[Event | Refusal, None]:
        """Answer a call; the first event comes with the first token. Closing it aborts.

        A failure is the last thing in the stream, as a Refusal: nothing is raised.
        """
        with self._meter.call(call.answers) if self._meter else nullcontext() as watch:
            try:
                async with aclosing(self._events(call)) as events:
                    async for event in events:
                        if watch:
                            watch.saw(event)
                        yield event
            except (RequestError, EngineError) as error:
                if watch:
                    watch.failed(error)
                yield self._refusal(call, error)

    async def sample(self, ask: Ask) -> Answered:
        """Answer a trainer with the active version: ids in, ids out.

        Raises RequestError for what cannot be answered, EngineError when the engine fails.
        """
        async with self._versions.sleeper.call():
            return await answered(self._engine, ask, self._versions.pick(None)[0])

    def _refusal(self, call: Call, error: RequestError | EngineError) -> Refusal:
        if isinstance(error, RequestError):
            return Refusal.of(error)
        log.error("request %s: %s", call.request_id, error)
        return Refusal(
            "the model's engine failed while it held this request; it is being rebuilt, try "
            "again in some seconds",
            502,
            "engine_failed",
            retry_after_s=5,
        )

    async def check_health(self) -> None:
        """Raise EngineError when the engine cannot produce a token within ``HEALTH_S``."""
        try:
            if self._versions.sleeper.ready:  # else there is no engine, or it is coming
                async with asyncio.timeout(HEALTH_S):
                    await self._engine.check_health()
            self._versions.check()
            self._adapters.check()
        except Exception as error:
            if self._healthy:
                log.error("unhealthy: %s: %s", type(error).__name__, error)
            self._healthy = False
            await self._versions.withdraw()
            raise EngineError(f"no token within {HEALTH_S:g} s: {error}") from error
        self._healthy = True

    async def stop(self) -> None:
        """Tell the others, finish what runs within ``drain_s``, end the engine's processes."""
        await self._adapters.stop()
        await self._versions.stop()
        await self._engine.stop(self._config.drain_s)
        if self._measuring and self._meter:
            self._measuring.cancel()
            await asyncio.gather(self._measuring, return_exceptions=True)
            self._meter.flush()

    async def _events(self, call: Call) -> AsyncGenerator[Event, None]:
        async with (
            self._versions.sleeper.call(),
            self._adapters.using(call.version) as added,
            aclosing(self._events_of(call, added)) as events,
        ):
            async for event in events:
                yield event

    async def _events_of(
        self, call: Call, added: tuple[str, str] | None
    ) -> AsyncGenerator[Event, None]:
        version, text, plan = await self._admit(call, added[1] if added else call.version)
        if added:
            version = added[0]  # the adapter's own: text and tokens are its base's
        streams: list[Stream] = []
        chunked = 0 if call.interval_s is None else call.answers
        self._streaming += chunked
        try:
            # no await since the last look at the version: it cannot be released in between
            for request in plan.requests(call):
                streams.append(self._engine.generate(request, version))
            answers = [
                self._answer(index, stream, call, plan, text)
                for index, stream in enumerate(streams)
            ]
            async with aclosing(answers[0] if len(answers) == 1 else merge(answers)) as events:
                async for event in events:
                    yield event
        finally:
            self._streaming -= chunked
            for stream in streams:
                await stream.aclose()

    def _answer(
        self, index: int, stream: Stream, call: Call, plan: Plan, text: ChatText
    ) -> AsyncGenerator[Event, None]:
        number, choice = divmod(index, call.n)
        prompt = plan.prompts[number]
        shown = plan.form.special if call.tools and call.tools.choice == "auto" else ()
        scorer = None
        if call.sampling.logprobs is not None:
            scorer = Scorer(text, prompt.ids if call.echo else ())
        reading = Reading(
            text.stream(shown), call.stop, _call_reader(call, plan), scorer, prompt.echo
        )
        # a prompt is counted once, with the first of its answers
        billed = 0 if choice else len(prompt.ids)
        return answer(index, stream, reading, billed, lambda: self._interval(call))

    def _interval(self, call: Call) -> float | None:
        """Return how long a chunk waits for others now: longer while many answers stream."""
        budget = self._budget if call.chunks_per_s is None else call.chunks_per_s
        if call.interval_s is None or not budget:
            return call.interval_s
        return max(call.interval_s, self._streaming / budget)

    async def _admit(self, call: Call, wanted: str | None) -> tuple[str, ChatText, Plan]:
        """Pick the version and turn the call into ids with that version's tokenizer."""
        for _ in range(TRIES):
            version, text = self._versions.pick(wanted)
            plan = await prepare(call, text, self._config, self._engine.info.max_model_len)
            if self._versions.holds(version):
                return version, text, plan
        raise RequestError("versions change too fast; try again", 503, "unavailable", None, 1)


def _call_reader(call: Call, plan: Plan) -> CallReader | None:
    tools = call.tools
    if tools is None:
        return None
    names = [function["name"] for function in tools.functions]
    if tools.choice == "auto":
        return FreeCalls(plan.form, names, tools.parallel)
    return ForcedCalls(plan.form, names, tools.name)
