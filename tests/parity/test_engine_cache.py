"""Shared, evicted, recomputed or stale: what the cache does never shows in an answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_apps.engine import attention, paging
from serve_apps.engine.interface import EngineRequest, Logprob, Sampling
from serve_apps.engine.model import LoadedModel
from serve_apps.engine.plan import BLOCK, Row, StepPlan
from tests.parity.engine_fixtures import (
    Answered,
    LocalRank,
    greedy,
    local_model,
    prompts,
    run_local,
)

pytestmark = pytest.mark.parity
SCORED = Sampling(temperature=0.0, logprobs=3, prompt_logprobs=2)


@pytest.fixture(scope="module", params=["native", "torch"])
def pair(request: Any, tiny: Path, tiny2: Path) -> list[LoadedModel]:
    """Two versions of one shape, by the kernels that a CPU has and by torch's operators."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(LoadedModel, "_kernels", lambda self: None)
        models = [local_model(tiny), local_model(tiny2)]
    assert all((m.native is None) == (request.param == "torch") for m in models)
    return models


@pytest.fixture(scope="module")
def model(pair: list[LoadedModel]) -> LoadedModel:
    return pair[0]


@pytest.fixture(scope="module")
def other(pair: list[LoadedModel]) -> LoadedModel:
    return pair[1]


def same(ours: Sequence[Logprob], theirs: Sequence[Logprob]) -> None:
    """Compare as far as rounding lets: what stands lower may change places."""
    assert [o.token_id for o in ours] == [t.token_id for t in theirs]
    for one, two in zip(ours, theirs, strict=True):
        assert one.logprob == pytest.approx(two.logprob, abs=1e-4)
        assert [p for _, p in one.top] == pytest.approx([p for _, p in two.top], abs=1e-4)


def same_answers(ours: Sequence[Answered], theirs: Sequence[Answered]) -> None:
    for one, two in zip(ours, theirs, strict=True):
        assert (one.ids, one.finish) == (two.ids, two.finish)
        same(one.logprobs, two.logprobs)
        assert one.prompt
        assert two.prompt
        same(one.prompt.logprobs, two.prompt.logprobs)


def families(count: int) -> list[EngineRequest]:
    """Requests whose prompts begin alike in threes, over several blocks."""
    starts = prompts(count, seed=4, longest=70)
    ends = prompts(3 * count, seed=5, longest=20)
    return [greedy(starts[i // 3] + end, 16, f"r{i}") for i, end in enumerate(ends)]


def test_prefix_cache_on_is_off_sc04(model: LoadedModel) -> None:
    requests = families(6)
    on, off = (LocalRank(model, blocks=99, prefix_cache=p) for p in (True, False))
    waves = [requests[::2], requests[1::2], requests[:4]]  # the last ones ask again
    got = [
        [
            rank.run([replace(r, request_id=f"{w}{r.request_id}") for r in wave])
            for rank in (on, off)
        ]
        for w, wave in enumerate(waves)
    ]
    for ours, theirs in got:
        assert [a.ids for a in ours] == [a.ids for a in theirs]
    assert on.scheduler.cached_prompt_tokens >= 20 * BLOCK
    assert off.scheduler.cached_prompt_tokens == 0
    told = [a.prompt.cached_tokens for ours, _ in got for a in ours if a.prompt]
    assert sum(told) == on.scheduler.cached_prompt_tokens


@pytest.mark.parametrize("budget", [8, 64, 4096])
def test_any_chunking_gives_the_same_ids_and_logprobs_sc05(budget: int, model: LoadedModel) -> None:
    texts = prompts(4, seed=5, longest=200)
    requests = [EngineRequest(f"r{i}", tuple(t), 12, SCORED) for i, t in enumerate(texts)]
    whole = [LocalRank(model, budget=999).run([r])[0] for r in requests]
    same_answers(LocalRank(model, blocks=99, budget=budget).run(requests), whole)


def test_logprobs_are_those_of_a_plain_forward_sc17(model: LoadedModel) -> None:
    prompt = prompts(1, seed=8, longest=50)[0] + prompts(3, seed=8, longest=50)[2]
    (answer,) = LocalRank(model, budget=16).run([EngineRequest("r", tuple(prompt), 9, SCORED)])
    assert answer.prompt
    ids = prompt + answer.ids
    plan = StepPlan(1, "", (Row(range(9), 0, ids, len(ids)),))
    rank = LocalRank(model)
    logits = model.forward(plan, attention.plan(plan, rank.cache))
    wanted = torch.log_softmax(logits.float(), dim=-1)
    told = [*answer.prompt.logprobs, *answer.logprobs]
    assert len(told) == len(ids) - 1
    for n, one in enumerate(told):
        assert one.token_id == ids[n + 1]
        assert one.logprob == pytest.approx(float(wanted[n, ids[n + 1]]), abs=1e-4)
        assert [p for _, p in one.top] == pytest.approx(
            wanted[n].topk(len(one.top)).values.tolist(), abs=1e-4
        )
    assert [len(one.top) for one in told] == [2] * (len(prompt) - 1) + [3] * 9


def test_a_prompt_is_scored_without_an_answer_sc27(model: LoadedModel) -> None:
    prompt = tuple(prompts(3, seed=8, longest=50)[2])
    rank = LocalRank(model, budget=16)
    alone, with_answer = rank.run(
        [EngineRequest("a", prompt, 0, SCORED), EngineRequest("b", prompt, 4, SCORED)]
    )
    assert (alone.ids, alone.finish) == ([], "length")
    assert alone.prompt
    assert with_answer.prompt
    same(alone.prompt.logprobs, with_answer.prompt.logprobs)
    assert len(alone.prompt.logprobs) == len(prompt) - 1


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_too_few_blocks_change_no_answer_sc06(prefix_cache: bool, model: LoadedModel) -> None:
    chance = random.Random(6)
    requests = [
        EngineRequest(f"r{i}", tuple(p), 44, Sampling(0.0 if i % 2 else 1.0, seed=i))
        for i, p in enumerate(prompts(8, seed=6, longest=40))
    ]
    ample = run_local(model, requests, blocks=99)
    for blocks in (8, 13):
        chance.shuffle(requests)
        scarce = LocalRank(model, blocks=blocks, prefix_cache=prefix_cache)
        got = scarce.run(requests)
        assert [a.ids for a in got] == [ample[int(r.request_id[1:])] for r in requests]
        assert scarce.scheduler.preemptions > 0


def test_scores_of_preempted_prompts_are_the_same_sc06(model: LoadedModel) -> None:
    texts = prompts(5, seed=16, longest=60)
    requests = [EngineRequest(f"r{i}", tuple(t), 50, SCORED) for i, t in enumerate(texts)]
    scarce = LocalRank(model, blocks=10, budget=24)
    same_answers(scarce.run(requests), LocalRank(model, blocks=99).run(requests))
    assert scarce.scheduler.preemptions > 0


@pytest.mark.parametrize("keyed", [True, False], ids=["with the version", "control: without"])
def test_no_key_of_another_version_is_read_sc08(
    keyed: bool, model: LoadedModel, other: LoadedModel, monkeypatch: Any
) -> None:
    if not keyed:
        honest = paging.root
        monkeypatch.setattr(paging, "root", lambda version, *rest: honest("", *rest))
    prompt = prompts(3, seed=9, longest=60)[2]
    fresh = run_local(other, [greedy(prompt, 30)])[0]
    rank = LocalRank(model)
    rank.hold("m@2", other)
    (before,) = rank.run([greedy(prompt, 30, "before")])
    (after,) = rank.run([greedy(prompt, 30, "after")], "m@2")
    assert before.ids == run_local(model, [greedy(prompt, 30)])[0]
    assert (after.ids == fresh) == keyed
    assert (rank.scheduler.cached_prompt_tokens == 0) == keyed


@pytest.mark.parametrize("keyed", [True, False], ids=["with the version", "control: without"])
def test_nor_while_a_request_of_the_old_one_holds_it_sc09(
    keyed: bool, model: LoadedModel, other: LoadedModel, monkeypatch: Any
) -> None:
    if not keyed:
        honest = paging.root
        monkeypatch.setattr(paging, "root", lambda version, *rest: honest("", *rest))
    prompt = prompts(3, seed=9, longest=60)[2]
    rank = LocalRank(model)
    rank.hold("m@2", other)
    rank.add(greedy(prompt, 60, "holder"))
    for _ in range(10):
        assert rank.step()
    (new,) = rank.run([greedy(prompt, 30, "new")], "m@2")
    assert (new.ids == run_local(other, [greedy(prompt, 30)])[0]) == keyed
    assert rank.answers["holder"].ids == run_local(model, [greedy(prompt, 60)])[0]


def test_a_version_that_came_back_with_other_weights_starts_afresh_sc08(
    model: LoadedModel, other: LoadedModel
) -> None:
    prompt = prompts(3, seed=9, longest=60)[2]
    rank = LocalRank(model)
    rank.run([greedy(prompt, 30, "before")])
    rank.scheduler.forget("")
    rank.hold("", other)
    (after,) = rank.run([greedy(prompt, 30, "after")])
    assert after.ids == run_local(other, [greedy(prompt, 30)])[0]
    assert rank.scheduler.cached_prompt_tokens == 0


def test_four_choices_share_their_prompt_and_answer_each_for_itself_sc18(
    model: LoadedModel,
) -> None:
    prompt = tuple(prompts(3, seed=18, longest=60)[2])
    rules = [Sampling(1.0, seed=1), Sampling(1.0, seed=2), Sampling(0.0), Sampling(0.0)]
    requests = [EngineRequest(f"r{i}", prompt, 8, rule) for i, rule in enumerate(rules)]
    rank = LocalRank(model)
    for r in requests:
        rank.add(r)
    rank.step()
    rank.step()
    assert rank.scheduler.held_tokens == (4 + 3) * BLOCK, "three shared blocks of four"
    rank.run()
    got = [rank.answers[r.request_id].ids for r in requests]
    assert got == [run_local(model, [r])[0] for r in requests]
    assert got[0] != got[1] != got[2] == got[3]


def test_what_a_nan_left_behind_reaches_nobody(model: LoadedModel) -> None:
    """A block is handed on as its last owner left it; what is not yet written counts nothing."""
    requests = [greedy(p, 40, f"r{i}") for i, p in enumerate(prompts(6, seed=3))]
    rank = LocalRank(model)
    for key, value in rank.cache.layers:
        key.fill_(float("nan"))
        value.fill_(float("nan"))
    assert [a.ids for a in rank.run(requests)] == run_local(model, requests)


def test_random_traffic_over_one_cache_answers_like_each_alone_sc06(model: LoadedModel) -> None:
    """Arrivals, cancels, shared beginnings, priorities and too few blocks, all at once."""
    chance, rank = random.Random(11), LocalRank(model, blocks=14, budget=24, running=6)
    requests = [
        replace(r, max_tokens=chance.randint(1, 40), priority=chance.randint(0, 1))
        for r in families(8)
    ]
    todo, cancelled = requests[:], set[str]()
    while todo or rank.scheduler.running or rank.scheduler.waiting:
        if todo and chance.random() < 0.4:
            rank.add(todo.pop(0))
        if chance.random() < 0.03 and rank.scheduler.running:
            victim = chance.choice(rank.scheduler.running).request_id
            rank.scheduler.abort(victim)
            cancelled.add(victim)
        rank.step()
    for r in requests:
        alone, got = run_local(model, [r])[0], rank.answers[r.request_id].ids
        assert got == (alone[: len(got)] if r.request_id in cancelled else alone)
    assert rank.scheduler.preemptions > 0
    assert rank.scheduler.cached_prompt_tokens > 0
    assert cancelled
