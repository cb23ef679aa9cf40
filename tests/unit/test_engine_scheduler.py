"""The scheduler's promises under random traffic: accounting, order, budget, no starvation."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_apps.engine.interface import Sampling
from serve_apps.engine.scheduler import Running, Scheduler, SlotPool, Step


def request(name: str, prompt: int, answer: int, version: str = "m@1") -> Running:
    return Running(name, version, list(range(prompt)), answer, Sampling(), 0, frozenset({999}))


def compute(scheduler: Scheduler, step: Step, token: int = 1) -> dict[str, str | None]:
    outputs = scheduler.complete(step, [token] * len(step.sampling))
    scheduler.check()
    return {o.request_id: o.finish for o in outputs}


def check_step(scheduler: Scheduler, step: Step) -> None:
    work = step.work
    assert work
    assert 0 < sum(w.count for w in work) <= scheduler.max_batch_tokens
    assert {w.request.version for w in work} == {step.version}
    assert len({w.request.slot for w in work}) == len(work)
    assert [w.request.slot for w in step.decode] == sorted(w.request.slot for w in step.decode)
    mine = [r for r in scheduler.running if r.version == step.version]
    decoding = [r for r in mine if r.answered]
    prompts = len(decoding) < len(mine)
    assert len(step.decode) == min(len(decoding), scheduler.max_batch_tokens - prompts)
    assert step.prefill or not prompts, "an old prompt always moves"
    for w in work:
        assert w.start == w.request.cached
        assert w.samples == (w.start + w.count == len(w.request.ids))
    started = [r for r in mine if not r.answered]
    assert [w.request for w in step.prefill] == started[: len(step.prefill)], "oldest prompt first"
    assert all(w.samples for w in step.prefill[:-1]), "only the last chunk may be cut"


@settings(max_examples=150)
@given(
    slots=st.integers(1, 5),
    budget=st.integers(1, 12),
    arrivals=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 6), st.sampled_from(["m@1", "m@2"])),
        min_size=1,
        max_size=14,
    ),
    seed=st.integers(0, 2**32),
)
def test_any_traffic_is_served_to_the_end(
    slots: int, budget: int, arrivals: list[tuple[int, int, str]], seed: int
) -> None:
    chance, scheduler = random.Random(seed), Scheduler(slots, budget)
    todo = [request(f"r{i}", *shape) for i, shape in enumerate(arrivals)]
    ends: dict[str, str | None] = {}
    aborted, steps = set[str](), 0
    work = sum(len(r.ids) + r.max_tokens for r in todo)
    while todo or scheduler.running or scheduler.waiting:
        while todo and chance.random() < 0.5:
            scheduler.add(todo.pop(0))
        if (step := scheduler.next_step()) is None:
            continue
        steps += 1
        assert steps <= work, "each step computes at least one token that nobody computed before"
        check_step(scheduler, step)
        if chance.random() < 0.15:  # while the step is computed
            victim = chance.choice(scheduler.running + list(scheduler.waiting)).request_id
            assert scheduler.abort(victim)
            assert not scheduler.abort(victim)
            aborted.add(victim)
            scheduler.check()
        got = compute(scheduler, step, token=999 if chance.random() < 0.1 else 1)
        assert aborted.isdisjoint(got)
        ends |= {name: finish for name, finish in got.items() if finish}
    assert set(ends) | aborted == {f"r{i}" for i in range(len(arrivals))}
    assert scheduler.slots.free == slots
    assert scheduler.finished == len(ends)
    assert scheduler.aborted == len(aborted)


def test_first_come_first_served_and_decode_is_never_held_up() -> None:
    scheduler = Scheduler(slots=2, max_batch_tokens=4)
    for name, prompt in (("a", 2), ("b", 9), ("c", 1)):
        scheduler.add(request(name, prompt, 5))
    first = scheduler.next_step()
    assert first
    assert [(w.request.request_id, w.count, w.samples) for w in first.work] == [
        ("a", 2, True),
        ("b", 2, False),
    ]
    compute(scheduler, first)
    second = scheduler.next_step()
    assert second
    assert [(w.request.request_id, w.start, w.count) for w in second.work] == [
        ("a", 2, 1),
        ("b", 2, 3),
    ]
    assert [r.request_id for r in scheduler.waiting] == ["c"]


def test_versions_take_turns() -> None:
    scheduler = Scheduler(slots=4, max_batch_tokens=8)
    for i in range(4):
        scheduler.add(request(f"r{i}", 2, 10, f"m@{1 + i % 2}"))
    turns = []
    for _ in range(8):
        step = scheduler.next_step()
        assert step
        turns.append(step.version)
        compute(scheduler, step)
    assert turns == ["m@1", "m@2"] * 4


def test_more_decoding_requests_than_the_budget_share_it_evenly() -> None:
    scheduler = Scheduler(slots=6, max_batch_tokens=2)
    requests = [request(f"r{i}", 1, 50) for i in range(6)]
    for r in requests:
        scheduler.add(r)
    for _ in range(6 + 30):
        step = scheduler.next_step()
        assert step
        compute(scheduler, step)
    answered = [r.answered for r in requests]
    assert max(answered) - min(answered) <= 6, "one head start for each prompt before the last"
    assert min(answered) >= 8


def test_an_abort_in_the_middle_of_a_step_frees_the_slot_for_the_next() -> None:
    scheduler = Scheduler(slots=1, max_batch_tokens=8)
    scheduler.add(request("gone", 3, 9))
    scheduler.add(request("next", 3, 9))
    step = scheduler.next_step()
    assert step
    assert scheduler.abort("gone")
    assert scheduler.slots.free == 1
    assert compute(scheduler, step) == {}
    following = scheduler.next_step()
    assert following
    assert [w.request.request_id for w in following.work] == ["next"]


def test_a_failed_step_takes_only_its_own_requests() -> None:
    scheduler = Scheduler(slots=2, max_batch_tokens=8)
    scheduler.add(request("a", 2, 3))
    scheduler.add(request("b", 2, 3, "m@2"))
    step = scheduler.next_step()
    assert step
    assert scheduler.fail(step) == ["a"]
    scheduler.check()
    assert [r.request_id for r in scheduler.running] == ["b"]
    assert scheduler.holds("m@2")
    assert not scheduler.holds("m@1")


def test_a_slot_is_held_once() -> None:
    pool = SlotPool(2)
    slot = pool.take()
    pool.give_back(slot)
    with pytest.raises(KeyError):
        pool.give_back(slot)


def test_a_thousand_cancels_leave_every_slot_free_sc13() -> None:
    chance, scheduler = random.Random(13), Scheduler(slots=8, max_batch_tokens=32)
    for i in range(1000):
        scheduler.add(request(f"r{i}", chance.randint(1, 40), 50))
        if step := scheduler.next_step():
            alive = scheduler.running + list(scheduler.waiting)
            scheduler.abort(chance.choice(alive).request_id)
            compute(scheduler, step)
    for r in scheduler.running + list(scheduler.waiting):
        scheduler.abort(r.request_id)
    scheduler.check()
    assert scheduler.slots.free == 8
    assert scheduler.aborted + scheduler.finished == 1000
