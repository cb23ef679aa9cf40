"""What a trainer asks of a replica, and how its client waits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import cluster.generation as generation
from cluster.errors import ClusterError, EngineError, RequestError
from cluster.generation import Answered, Ask, Sample, ServeSampler
from serve_apps.config import REPLICA, Fake, model_app
from serve_apps.engine.fake import FakeEngine, fake_logprob, fake_token
from serve_apps.sampling import answered

VERSION = "tiny@1"


def run(config: Fake, *asks: Ask) -> list[Answered]:
    async def work() -> list[Answered]:
        engine = FakeEngine(config)
        await engine.start()
        await engine.load(VERSION, "nowhere")
        await engine.activate(VERSION)
        found = await asyncio.gather(*(answered(engine, ask, VERSION) for ask in asks))
        assert not engine._held, "nothing is left behind"
        return list(found)

    return asyncio.run(work())


def test_ids_and_log_probabilities_come_back_with_the_version() -> None:
    [found] = run(Fake(kind="fake", token_delay_s=0), Ask((40, 41), max_tokens=3, n=2))
    ids = tuple(fake_token((40, 41), VERSION, k) for k in range(3))
    assert found == Answered(VERSION, (Sample(ids, (-0.25,) * 3, False),) * 2)


def test_an_answer_ends_before_its_stop_token() -> None:
    first, second = (fake_token((40,), VERSION, k) for k in range(2))
    [found] = run(Fake(kind="fake", token_delay_s=0), Ask((40,), 5, stop_ids=(second,)))
    assert found.samples == (Sample((first,), (-0.25,), True),)


def test_a_prompt_is_scored_place_by_place() -> None:
    [found] = run(Fake(kind="fake", token_delay_s=0), Ask((40, 50, 60), max_tokens=0, top=2))
    assert found.prompt == (fake_logprob(50, 2).top, fake_logprob(60, 2).top)
    assert found.samples == ()


def test_more_answers_than_the_engine_holds_come_in_turns() -> None:
    small = Fake(kind="fake", token_delay_s=0, max_concurrent=2, max_queued=1)
    [found] = run(small, Ask((40,), max_tokens=2, n=8))
    assert len(found.samples) == 8


def test_what_fails_on_the_way_is_raised() -> None:
    with pytest.raises(EngineError):
        run(Fake(kind="fake", token_delay_s=0, fail_at_token=2), Ask((40,), 5, n=3))
    with pytest.raises(RequestError, match="tokens"):
        run(Fake(kind="fake", token_delay_s=0, max_model_len=4), Ask((40, 41, 42), 5))


def test_both_sides_know_a_model_by_the_same_name() -> None:
    assert (REPLICA, model_app("x")) == (generation.DEPLOYMENT, "model-x")


class Response:
    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self, timeout_s: float) -> Any:
        if isinstance(self._value, Exception):
            raise self._value
        return self._value


class Handle:
    """A Serve handle that says what it is told to, one thing a call."""

    def __init__(self, *says: Any) -> None:
        self._says, self.asked = list(says), 0
        self.sample = self

    def remote(self, ask: Ask) -> Response:
        self.asked += 1
        return Response(self._says.pop(0))


def sampler(*says: Any) -> tuple[ServeSampler, Handle]:
    made, handle = ServeSampler("tiny", timeout_s=5.0), Handle(*says)
    made._handle = handle
    return made, handle


def test_a_full_model_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PAUSE_S", 0.0)
    full = RequestError("full", 429, "engine_full", None, 1)
    made, handle = sampler(full, full, Answered(VERSION))
    assert made.ask([Ask((1,), 1)]) == [Answered(VERSION)]
    assert handle.asked == 3


def test_other_refusals_and_silence_end_it() -> None:
    with pytest.raises(ClusterError, match="refused a prompt: too long"):
        sampler(RequestError("too long"))[0].ask([Ask((1,), 1)])
    with pytest.raises(ClusterError, match="did not answer within 5 s"):
        sampler(TimeoutError())[0].ask([Ask((1,), 1)])
