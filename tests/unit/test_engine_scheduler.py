"""The scheduler's promises under random traffic: accounting, order, budget, no starvation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_apps.engine.interface import Logprob, Sampling
from serve_apps.engine.plan import BLOCK, blocks_for
from serve_apps.engine.scheduler import MAX_SCORED, Running, Scheduler, Step, Work
from serve_apps.engine.wire import Told

STOP = 999


@dataclass(frozen=True)
class Choice:
    token: int = 1
    logprob: Logprob | None = None
    finished: bool = False
    error: str | None = None


def request(
    name: str, prompt: int | Sequence[int], answer: int, version: str = "m@1", **more: Any
) -> Running:
    """By default no two prompts begin alike, so that nothing is shared."""
    if isinstance(prompt, int):
        prompt = [sum(name.encode()) * 1000 + i for i in range(prompt)]
    sampling = more.pop("sampling", Sampling())
    return Running(name, version, list(prompt), answer, sampling, 0, frozenset({STOP}), **more)


def compute(scheduler: Scheduler, step: Step, token: int = 1) -> list[Told]:
    scores = [[Logprob(t, -1.0) for t in w.targets] for w in step.scoring]
    told = scheduler.complete(step, [Choice(token)] * len(step.sampling), scores)
    scheduler.check()
    return told


def run(scheduler: Scheduler, steps: int = 10_000) -> list[Step]:
    """Compute until nothing is left, at most so many steps."""
    done = list[Step]()
    while len(done) < steps and (step := scheduler.next_step()):
        compute(scheduler, step)
        done.append(step)
    return done


def shape(work: Sequence[Work]) -> list[tuple[str, int, int]]:
    return [(w.request.request_id, w.start, w.count) for w in work]


def check_step(scheduler: Scheduler, step: Step) -> None:
    work = step.work
    assert work
    assert 0 < sum(w.count for w in work) <= scheduler.max_batch_tokens
    assert {w.request.version for w in work} == {step.version}
    assert len({id(w.request) for w in work}) == len(work)
    mine = [r for r in scheduler.running if r.version == step.version]
    decoding = [r for r in mine if r.decodes]
    prompts = len(decoding) < len(mine)
    if scheduler.max_batch_tokens > 1:
        assert len(step.decode) == min(len(decoding), scheduler.max_batch_tokens - prompts)
        assert step.prefill or not prompts, "an old prompt always moves"
    written = [b for w in work for b in w.blocks[w.start // BLOCK :]]
    assert len(set(written)) == len(written), "what is written is nobody else's"
    for w in work:
        assert w.start == w.request.cached
        assert w.samples == (w.start + w.count == len(w.request.ids))
        assert blocks_for(w.start + w.count) <= len(w.blocks)
    started = [r for r in mine if not r.decodes]
    assert [w.request for w in step.prefill] == started[: len(step.prefill)], "oldest prompt first"
    assert all(w.samples for w in step.prefill[:-1]), "only the last chunk may be cut"


@settings(max_examples=200, deadline=None)
@given(
    blocks=st.integers(4, 14),
    running=st.integers(1, 6),
    budget=st.integers(1, 40),
    prefix_cache=st.booleans(),
    arrivals=st.lists(
        st.tuples(
            st.integers(1, 40),
            st.integers(1, 25),
            st.sampled_from(["m@1", "m@2"]),
            st.integers(-1, 1),
            st.booleans(),
        ),
        min_size=1,
        max_size=14,
    ),
    seed=st.integers(0, 2**32),
)
def test_any_traffic_is_served_to_the_end_sc06(
    blocks: int,
    running: int,
    budget: int,
    prefix_cache: bool,
    arrivals: list[tuple[int, int, str, int, bool]],
    seed: int,
) -> None:
    """Every request gets its tokens, each once and under its own seed's position, or is aborted."""
    chance, scheduler = random.Random(seed), Scheduler(blocks, budget, running, prefix_cache)
    todo = [
        # a text that many share, and one of its own
        request(
            f"r{i}",
            list(range(prompt)) if shared else prompt,
            answer,
            version,
            priority=rank,
        )
        for i, (prompt, answer, version, rank, shared) in enumerate(arrivals)
    ]
    todo = [r for r in todo if blocks_for(len(r.ids) + r.max_tokens) <= blocks]
    wanted = {r.request_id: r.max_tokens for r in todo}
    got: dict[str, list[int]] = {r.request_id: [] for r in todo}
    ends: dict[str, str | None] = {}
    aborted, steps = set[str](), 0
    bound = 200 + 4 * sum(len(r.ids) + r.max_tokens for r in todo) * (1 + len(todo))
    while todo or scheduler.running or scheduler.waiting:
        while todo and chance.random() < 0.5:
            scheduler.add(todo.pop(0))
            scheduler.check()
        if (step := scheduler.next_step()) is None:
            assert not scheduler.waiting
            continue
        scheduler.check()
        steps += 1
        assert steps <= bound
        check_step(scheduler, step)
        positions = {r.request_id: r.answered for r in step.sampling}
        if chance.random() < 0.1:  # while the step is computed
            victim = chance.choice(scheduler.running + scheduler.waiting).request_id
            assert scheduler.abort(victim)
            assert not scheduler.abort(victim)
            aborted.add(victim)
            scheduler.check()
        for told in compute(scheduler, step, token=STOP if chance.random() < 0.02 else 1):
            assert told.request_id not in aborted
            assert positions[told.request_id] == len(got[told.request_id]), "no token twice"
            got[told.request_id] += told.token_ids
            if told.finish:
                ends[told.request_id] = told.finish
    assert ends.keys() | aborted == wanted.keys()
    assert all(len(got[i]) == wanted[i] for i, end in ends.items() if end == "length")
    assert scheduler.held_tokens == 0
    assert scheduler.paging.pool.available == blocks
    assert (scheduler.finished, scheduler.aborted) == (len(ends), len(aborted))


def test_first_come_first_served_and_decode_is_never_held_up() -> None:
    scheduler = Scheduler(blocks=20, max_batch_tokens=4, max_running=2)
    for name, prompt in (("a", 2), ("b", 9), ("c", 1)):
        scheduler.add(request(name, prompt, 5))
    first = scheduler.next_step()
    assert first
    assert shape(first.work) == [("a", 0, 2), ("b", 0, 2)]
    assert [w.samples for w in first.work] == [True, False]
    compute(scheduler, first)
    second = scheduler.next_step()
    assert second
    assert shape(second.work) == [("a", 2, 1), ("b", 2, 3)]
    assert [r.request_id for r in scheduler.waiting] == ["c"]


def test_a_long_prompt_holds_no_answer_up() -> None:
    scheduler = Scheduler(blocks=400, max_batch_tokens=64, max_running=9)
    for i in range(4):
        scheduler.add(request(f"r{i}", 3, 90))
    run(scheduler, 1)
    scheduler.add(request("long", 4000, 1))
    for step in run(scheduler, 60):
        assert len(step.decode) == 4
        assert sum(w.count for w in step.work) == 64


def test_a_stream_of_answers_holds_no_prompt_up() -> None:
    """Requests keep coming and answering; the one with the long prompt gets its share."""
    scheduler = Scheduler(blocks=200, max_batch_tokens=4, max_running=8)
    for i in range(7):
        scheduler.add(request(f"r{i}", 1, 12))
    run(scheduler, 3)
    long = request("long", 60, 3)
    scheduler.add(long)
    for i in range(400):
        if not i % 4:
            scheduler.add(request(f"n{i}", 1, 12))
        if not (step := scheduler.next_step()) or long.ended:
            break
        compute(scheduler, step)
    assert long.ended


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_the_smallest_budgets_starve_nobody(budget: int) -> None:
    scheduler = Scheduler(blocks=60, max_batch_tokens=budget, max_running=4)
    answering, prompt = request("a", 1, 300), request("p", 200, 1)
    scheduler.add(answering)
    run(scheduler, 2)
    scheduler.add(prompt)
    run(scheduler, 100)
    assert answering.answered >= 50
    assert prompt.counted >= 49


def test_versions_take_turns() -> None:
    scheduler = Scheduler(blocks=40, max_batch_tokens=8, max_running=4)
    for i in range(4):
        scheduler.add(request(f"r{i}", 2, 10, f"m@{1 + i % 2}"))
    assert [s.version for s in run(scheduler, 8)] == ["m@1", "m@2"] * 4


def test_more_decoding_requests_than_the_budget_share_it_evenly() -> None:
    scheduler = Scheduler(blocks=60, max_batch_tokens=2, max_running=6)
    requests = [request(f"r{i}", 1, 50) for i in range(6)]
    for r in requests:
        scheduler.add(r)
    run(scheduler, 6 + 30)
    answered = [r.answered for r in requests]
    assert max(answered) - min(answered) <= 6, "one head start for each prompt before the last"
    assert min(answered) >= 8


def test_lower_priority_numbers_start_earlier() -> None:
    scheduler = Scheduler(blocks=40, max_batch_tokens=8, max_running=1)
    for name, priority in (("a", 0), ("late", 5), ("b", 0), ("first", -3)):
        scheduler.add(request(name, 2, 2, priority=priority))
    order = list(dict.fromkeys(w.request.request_id for s in run(scheduler) for w in s.work))
    assert order == ["first", "a", "b", "late"]


def test_a_request_past_its_deadline_never_starts_sc12() -> None:
    scheduler = Scheduler(blocks=40, max_batch_tokens=8, max_running=1)
    scheduler.add(request("a", 2, 8, deadline=1.0))
    scheduler.add(request("late", 2, 4, deadline=5.0))
    scheduler.add(request("b", 2, 4, deadline=100.0))
    seen = set[str]()
    for now in range(16):
        if step := scheduler.next_step(float(now)):
            seen |= {w.request.request_id for w in step.work}
            compute(scheduler, step)
        if now == 4:
            assert scheduler.expired == []
    assert scheduler.expired == ["late"], "the first one had started before its own"
    assert seen == {"a", "b"}
    assert (scheduler.expiries, scheduler.finished) == (1, 2)


def test_an_expired_request_is_found_when_nothing_else_is_there() -> None:
    scheduler = Scheduler(blocks=40, max_batch_tokens=8, max_running=1)
    scheduler.add(request("late", 2, 4, deadline=5.0))
    assert scheduler.next_step(5.0) is None
    assert scheduler.expired == ["late"]
    scheduler.check()


def test_the_first_output_tells_of_the_prompt_and_no_other() -> None:
    scheduler = Scheduler(blocks=40, max_batch_tokens=16, max_running=4)
    scheduler.add(request("a", 40, 3, added_at=2.0))
    told = []
    for now in (3.5, 4.0, 5.0, 6.0, 7.0):
        if step := scheduler.next_step(now):
            told += compute(scheduler, step)
    assert [bool(t.prompt) for t in told] == [True, False, False]
    assert told[0].prompt
    assert (told[0].prompt.queued_s, told[0].prompt.cached_tokens) == (1.5, 0)


# Sharing


def test_the_prompt_of_four_choices_is_held_once_sc18() -> None:
    scheduler = Scheduler(blocks=40, max_batch_tokens=512, max_running=8)
    prompt = list(range(100))
    for i in range(4):
        scheduler.add(request(f"r{i}", prompt, 20))
    first, second = run(scheduler, 2)
    assert shape(first.work) == [("r0", 0, 100)], "the others wait for what it computes"
    assert shape(second.prefill) == [(f"r{i}", 96, 4) for i in (1, 2, 3)]
    assert scheduler.held_tokens == (6 + 4) * BLOCK
    assert (scheduler.prompt_tokens, scheduler.cached_prompt_tokens) == (400, 288)
    run(scheduler)
    assert scheduler.finished == 4
    assert scheduler.paging.pool.available == 40


def test_whoever_waits_for_anothers_block_lets_others_pass() -> None:
    scheduler = Scheduler(blocks=40, max_batch_tokens=16, max_running=8)
    scheduler.add(request("a", range(100), 20))
    scheduler.add(request("same", range(100), 20))
    scheduler.add(request("other", 5, 20))
    run(scheduler, 1)
    assert [r.request_id for r in scheduler.running] == ["a", "other"]
    assert [r.request_id for r in scheduler.waiting] == ["same"]
    run(scheduler)
    assert scheduler.finished == 3


@pytest.mark.parametrize("end", ["abort", "fail"])
def test_whoever_waits_goes_on_when_the_other_ends(end: str) -> None:
    scheduler = Scheduler(blocks=40, max_batch_tokens=32, max_running=8)
    for name in ("a", "b", "c"):
        scheduler.add(request(name, range(100), 5))
    run(scheduler, 1)
    step = scheduler.next_step()
    assert step
    if end == "abort":
        scheduler.abort("a")
        compute(scheduler, step)
    else:
        assert scheduler.fail(step) == ["a"]
    scheduler.check()
    following = scheduler.next_step()
    assert following
    assert shape(following.work) == [("b", 32, 32)], "two blocks were left by the first"
    compute(scheduler, following)
    run(scheduler)
    assert scheduler.finished == 2


def test_the_last_token_of_a_prompt_is_always_computed_sc04() -> None:
    scheduler = Scheduler(blocks=40, max_batch_tokens=512, max_running=8)
    for name in ("a", "b"):
        scheduler.add(request(name, range(32), 3))
        assert run(scheduler)
    assert scheduler.cached_prompt_tokens == 16
    scheduler.add(request("longer", range(33), 3))
    step = scheduler.next_step()
    assert step
    assert shape(step.work) == [("longer", 32, 1)]


def test_an_answer_is_found_by_the_next_turn() -> None:
    scheduler = Scheduler(blocks=40, max_batch_tokens=512, max_running=8)
    scheduler.add(request("turn", range(20), 30))
    run(scheduler)
    scheduler.add(request("next", [*range(20), *[1] * 30, 7], 3))
    run(scheduler)
    assert scheduler.cached_prompt_tokens == 48


@pytest.mark.parametrize(
    "changes", [{"salt": "other"}, {"adapter": "a@1"}, {"version": "m@2"}], ids=str
)
def test_nothing_is_shared_across_salts_adapters_versions_sc08(changes: dict[str, str]) -> None:
    scheduler = Scheduler(blocks=40, max_batch_tokens=512, max_running=8)
    scheduler.add(request("a", range(64), 3))
    run(scheduler)
    scheduler.add(request("b", range(64), 3, **changes))
    run(scheduler)
    assert scheduler.cached_prompt_tokens == 0
    scheduler.add(request("c", range(64), 3))
    run(scheduler)
    assert scheduler.cached_prompt_tokens == 48


def test_a_released_version_leaves_nothing_sc08() -> None:
    scheduler = Scheduler(blocks=40, max_batch_tokens=512, max_running=8)
    for _ in range(2):
        scheduler.add(request("a", range(64), 3))
        run(scheduler)
        assert scheduler.cached_prompt_tokens == 0
        scheduler.forget("m@1")
        scheduler.check()
        assert scheduler.paging.pool.cached == 0


def test_without_the_prefix_cache_nothing_is_kept_sc04() -> None:
    scheduler = Scheduler(blocks=40, max_batch_tokens=512, max_running=8, prefix_cache=False)
    for name in ("a", "b"):
        scheduler.add(request(name, range(64), 3))
    assert shape(run(scheduler)[0].work) == [("a", 0, 64), ("b", 0, 64)]
    assert scheduler.cached_prompt_tokens == 0
    assert scheduler.paging.pool.cached == 0


# Memory


def test_a_request_starts_when_its_prompt_fits_beside_the_others() -> None:
    scheduler = Scheduler(blocks=8, max_batch_tokens=512, max_running=8)
    scheduler.add(request("a", 60, 4))
    scheduler.add(request("large", 60, 4))
    scheduler.add(request("small", 4, 4))
    run(scheduler, 1)
    assert [r.request_id for r in scheduler.running] == ["a"], "the large one is next, not last"
    run(scheduler)
    assert scheduler.preemptions == 0
    assert scheduler.finished == 3


def test_the_least_important_gives_way_and_loses_no_token_sc06() -> None:
    scheduler = Scheduler(blocks=8, max_batch_tokens=512, max_running=8)
    for name, priority in (("keeps", 0), ("second", 0), ("guest", 1)):
        scheduler.add(request(name, 20, 60, priority=priority))
    order = []
    while step := scheduler.next_step():
        order += [t.request_id for t in compute(scheduler, step) if t.finish]
    assert scheduler.preemptions >= 2
    assert order == ["keeps", "second", "guest"]
    assert scheduler.generated == 180
    assert scheduler.prompt_tokens == 60, "counted once, however often it is computed"


def test_a_request_that_just_fits_alone_is_served_alone_sc06() -> None:
    scheduler = Scheduler(blocks=4, max_batch_tokens=8, max_running=4)
    for name in ("a", "b"):
        scheduler.add(request(name, 40, 25))  # 64 positions: the last token is never read
    run(scheduler)
    assert scheduler.finished == 2
    with pytest.raises(AssertionError, match="checked at admission"):
        scheduler.add(request("more", 40, 26))


def test_an_abort_in_the_middle_of_a_step_frees_the_blocks_for_the_next_sc12() -> None:
    scheduler = Scheduler(blocks=2, max_batch_tokens=40, max_running=4)
    scheduler.add(request("gone", 30, 2))
    scheduler.add(request("next", 30, 2))
    step = scheduler.next_step()
    assert step
    assert scheduler.abort("gone")
    assert scheduler.paging.pool.available == 2
    assert len(step.plan().rows[0].blocks) == 2, "the ranks still need the old table"
    assert compute(scheduler, step) == []
    following = scheduler.next_step()
    assert following
    assert [w.request.request_id for w in following.work] == ["next"]


def test_a_failed_step_takes_only_its_own_requests() -> None:
    scheduler = Scheduler(blocks=20, max_batch_tokens=8, max_running=4)
    scheduler.add(request("a", 2, 3))
    scheduler.add(request("b", 2, 3, "m@2"))
    step = scheduler.next_step()
    assert step
    assert scheduler.fail(step) == ["a"]
    scheduler.check()
    assert [r.request_id for r in scheduler.running] == ["b"]
    assert scheduler.holds("m@2")
    assert not scheduler.holds("m@1")


def test_a_thousand_cancels_leave_every_block_free_sc13() -> None:
    chance, scheduler = random.Random(13), Scheduler(16, max_batch_tokens=64, max_running=8)
    for i in range(1000):
        prompt = list(range(40)) if i % 3 else chance.randint(1, 90)
        scheduler.add(request(f"r{i}", prompt, 50, priority=i % 2))
        run(scheduler, 4)
        if step := scheduler.next_step():
            scheduler.check()
            alive = scheduler.running + scheduler.waiting
            if len(alive) > 12:
                scheduler.abort(chance.choice(alive).request_id)
            compute(scheduler, step)
    for r in scheduler.running + scheduler.waiting:
        scheduler.abort(r.request_id)
    scheduler.check()
    assert scheduler.held_tokens == 0
    assert scheduler.paging.pool.available == 16
    assert scheduler.aborted + scheduler.finished == 1000
    assert scheduler.aborted > 500
    assert scheduler.preemptions > 0
    assert not scheduler.paging._computing


# Scores and ends


def test_prompt_scores_come_whole_whatever_the_chunks_and_with_them_no_hits() -> None:
    scheduler = Scheduler(blocks=80, max_batch_tokens=700, max_running=8)
    scored = Sampling(prompt_logprobs=0)
    scheduler.add(request("warm", range(600), 1))
    run(scheduler)
    scheduler.add(request("a", range(600), 2, sampling=scored))
    told, rows = [], []
    while step := scheduler.next_step():
        rows.append([w.logits for w in step.work])
        told += compute(scheduler, step)
    assert told[0].prompt
    assert [p.token_id for p in told[0].prompt.logprobs] == list(range(1, 600))
    assert told[0].prompt.cached_tokens == 0
    assert rows == [[MAX_SCORED], [MAX_SCORED], [600 - 2 * MAX_SCORED], [1]]
    assert [t.token_ids for t in told] == [(1,), (1,)]


@pytest.mark.parametrize("length", [1, 2, 40])
def test_a_prompt_can_be_scored_alone_sc27(length: int) -> None:
    scheduler = Scheduler(blocks=20, max_batch_tokens=16, max_running=8)
    scheduler.add(request("a", range(length), 0, sampling=Sampling(prompt_logprobs=3)))
    told = []
    while step := scheduler.next_step():
        assert not step.sampling
        told += compute(scheduler, step)
    assert [(t.finish, t.token_ids) for t in told] == [("length", ())]
    assert told[0].prompt
    assert [p.token_id for p in told[0].prompt.logprobs] == list(range(1, length))
    assert scheduler.generated == 0


def test_scores_survive_preemption() -> None:
    scheduler = Scheduler(blocks=6, max_batch_tokens=12, max_running=8)
    scheduler.add(request("first", 16, 70))
    run(scheduler, 2)
    scheduler.add(request("scored", range(40), 3, priority=1, sampling=Sampling(prompt_logprobs=0)))
    told = []
    while step := scheduler.next_step():
        told += [t for t in compute(scheduler, step) if t.request_id == "scored" and t.prompt]
        if scheduler.preemptions == 0 and len(scheduler.running) > 1:
            scheduler._preempt(scheduler.running[1])  # in the middle of its prompt
            scheduler.check()
    assert scheduler.preemptions >= 1
    assert told[0].prompt
    assert [p.token_id for p in told[0].prompt.logprobs] == list(range(1, 40))


@pytest.mark.parametrize(
    ("choice", "ids", "finish"),
    [
        (Choice(STOP), (), "stop"),
        (Choice(STOP, finished=True), (), "stop"),
        (Choice(5, finished=True), (5,), "stop"),
        (Choice(5, error="no way on"), (), "error"),
        (Choice(5), (5,), "length"),
    ],
    ids=["stop id", "grammar's end at a stop id", "grammar's end", "error", "length"],
)
def test_how_an_answer_ends_sc25(choice: Choice, ids: tuple[int, ...], finish: str) -> None:
    scheduler = Scheduler(blocks=4, max_batch_tokens=16, max_running=8)
    scheduler.add(request("a", 3, 1))
    step = scheduler.next_step()
    assert step
    (told,) = scheduler.complete(step, [choice])
    assert (told.token_ids, told.finish, told.error) == (ids, finish, choice.error)
    scheduler.check()
    assert scheduler.finished == (finish != "error")
