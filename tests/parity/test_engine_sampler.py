"""Sampling: the right distribution, one request's rules at a time, nothing global touched."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from serve_apps.engine.draws import choose, draw, kept, probabilities, uniform
from serve_apps.engine.interface import Logprob, Sampling
from serve_apps.engine.sampler import Picker, prompt_logprobs

pytestmark = pytest.mark.parity


def sample(
    logits_BV: torch.Tensor, rules: list[Sampling], seeds: list[int], at: list[int]
) -> list[int]:
    """Pick one token for each row, none of which has a history."""
    picker = Picker(logits_BV.shape[-1], torch.device("cpu"))
    for i, (rule, seed) in enumerate(zip(rules, seeds, strict=True)):
        picker.add(str(i), (), rule, seed)
    rows: list[Any] = [(str(i), position, ()) for i, position in enumerate(at)]
    return [picked.token for picked in picker.pick(logits_BV.clone(), rows)]


def test_uniforms_are_a_pure_function_and_look_uniform() -> None:
    drawn = torch.tensor([uniform(7, i) for i in range(20_000)])
    assert uniform(7, 3) == uniform(7, 3) != uniform(8, 3)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    counts = torch.histc(drawn, 20, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 56.4  # chi-square, 19 d.o.f., p = 1e-5
    lag = torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1]
    assert abs(float(lag)) < 0.04


@pytest.mark.parametrize(
    "rule",
    [
        Sampling(1.0),
        Sampling(0.7),
        Sampling(1.3, top_p=0.8),
        Sampling(1.0, top_k=5),
        Sampling(1.0, min_p=0.3),
    ],
)
def test_draws_follow_the_distribution_sc16(rule: Sampling) -> None:
    logits = torch.linspace(-1.5, 1.5, 10)[torch.randperm(10, generator=_generator())]
    draws = 20_000
    rows = logits.expand(draws, 10)
    got = torch.tensor(sample(rows, [rule] * draws, list(range(draws)), [0] * draws))
    expected = probabilities(logits[None], [rule])[0] * draws
    counts = torch.bincount(got, minlength=10).float()
    assert float(counts[expected == 0].sum()) == 0
    kept = expected > 0
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    # Wilson and Hilferty's approximation of the chi-square quantile at p = 1e-4 (z = 3.719)
    freedom = int(kept.sum()) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound


@pytest.mark.parametrize(
    "rule",
    [
        Sampling(0.6),
        Sampling(1.0, top_k=1),
        Sampling(1.0, top_k=40),
        Sampling(1.0, top_p=0.9),
        Sampling(1.0, top_p=1e-6),
        Sampling(2.5, top_p=0.999),
        Sampling(0.8, top_p=0.7, top_k=30),
        Sampling(1.0, min_p=0.05),
        Sampling(1.4, top_p=0.95, top_k=50, min_p=0.2),
    ],
)
def test_rows_equal_transformers_processors_sc15(rule: Sampling) -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    # rows from peaked to flat: the nucleus is found among few, some, and all of the vocabulary
    logits = torch.randn(5, 9000, generator=_generator()) * torch.tensor(
        [[3], [4], [1], [0.1], [3]]
    )
    wanted = LogitsProcessorList([TemperatureLogitsWarper(rule.temperature)])
    if rule.top_k:
        wanted.append(TopKLogitsWarper(rule.top_k))
    if rule.top_p < 1:
        wanted.append(TopPLogitsWarper(rule.top_p))
    if rule.min_p:
        wanted.append(MinPLogitsWarper(rule.min_p))
    reference = torch.softmax(wanted(torch.zeros(5, 1, dtype=torch.long), logits.clone()), -1)
    # the row stands among others with other rules
    rules = [Sampling(0.9, 0.5, 3), rule, Sampling(1.7), rule, Sampling(1.0, 0.2)]
    ours = probabilities(logits.clone(), rules)
    torch.testing.assert_close(ours[[1, 3]], reference[[1, 3]], rtol=1e-4, atol=1e-7)
    assert torch.equal(ours[[1, 3]] > 0, reference[[1, 3]] > 0)
    for row, wanted_row in zip(logits, reference, strict=True):
        on_host = dense(row, rule)
        torch.testing.assert_close(on_host, wanted_row, rtol=1e-4, atol=1e-7)
        assert torch.equal(on_host > 0, wanted_row > 0)


def dense(row_V: torch.Tensor, rule: Sampling) -> torch.Tensor:
    """Return the distribution that a row in host memory is drawn from."""
    ids, weights = kept(row_V.numpy(), rule)
    probs = torch.zeros(len(row_V))
    probs[slice(None) if ids is None else torch.from_numpy(ids)] = torch.from_numpy(weights)
    return probs / probs.sum()


def test_host_and_device_draw_the_same_tokens() -> None:
    logits = torch.randn(300, 1001, generator=_generator())
    for rule in (Sampling(0.8), Sampling(1.2, 0.9, 50), Sampling(1.0, min_p=0.05)):
        numbers = [uniform(3, i) for i in range(len(logits))]
        probs = probabilities(logits, [rule] * len(logits))
        theirs = draw(probs, torch.tensor(numbers, dtype=torch.float64)).tolist()
        ours = [choose(row.numpy(), rule, u) for row, u in zip(logits, numbers, strict=True)]
        assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 1, "rounding only"


def test_greedy_rows_beside_warm_ones_take_the_best() -> None:
    logits = torch.randn(4, 50, generator=_generator())
    rules = [Sampling(0.0), Sampling(1.0), Sampling(1e-9), Sampling(5.0)]
    picked = sample(logits, rules, [1, 2, 3, 4], [0, 0, 0, 0])
    assert picked[0] == int(logits[0].argmax())
    assert picked[2] == int(logits[2].argmax())


def test_the_last_uniform_still_finds_a_token() -> None:
    probs = torch.softmax(torch.randn(3, 1001, generator=_generator()), -1)
    probs[:, -1] = 0
    numbers = [0.0, 0.5, 1 - 2**-53]
    ends = draw(probs, torch.tensor(numbers, dtype=torch.float64))
    for row, number in zip(probs, numbers, strict=True):
        assert float(row[choose(row.log().numpy(), Sampling(1.0), number)]) > 0
    assert all(0 <= int(i) < 1001 and float(probs[r, i]) > 0 for r, i in enumerate(ends))


VOCAB = 300
STOPS = frozenset({7, 11})
RULES = {
    "bias": Sampling(0.8, logit_bias=((3, 5.0), (250, -100.0), (7, 2.5))),
    "minimum": Sampling(1.0, min_tokens=6),
    "repetition": Sampling(0.9, top_k=40, repetition_penalty=1.3),
    "rewarded": Sampling(1.0, repetition_penalty=0.7),
    "frequency": Sampling(1.0, top_p=0.9, frequency_penalty=0.6),
    "presence": Sampling(1.2, presence_penalty=-0.8),
    "all": Sampling(
        0.7,
        top_p=0.95,
        top_k=80,
        min_p=0.02,
        frequency_penalty=0.4,
        presence_penalty=0.3,
        repetition_penalty=1.2,
        logit_bias=((9, 3.0), (11, 4.0)),
        min_tokens=4,
    ),
    "plain": Sampling(0.9),
    "greedy": Sampling(0.0),
}


def expected(logits_V: torch.Tensor, prompt: list[int], answer: list[int], rule: Sampling) -> Any:
    """Process one row by transformers' own processors, over the whole history."""
    import transformers as hf

    ids = torch.tensor([prompt + answer])
    row = logits_V[None].clone()
    if rule.logit_bias:
        row = hf.SequenceBiasLogitsProcessor({(i,): b for i, b in rule.logit_bias})(ids, row)
    if rule.min_tokens:
        stops = sorted(STOPS)
        row = hf.MinNewTokensLengthLogitsProcessor(len(prompt), rule.min_tokens, stops)(ids, row)
    if rule.repetition_penalty != 1:
        row = hf.RepetitionPenaltyLogitsProcessor(rule.repetition_penalty)(ids, row)
    counts = torch.bincount(torch.tensor(answer, dtype=torch.long), minlength=len(logits_V))
    row = row - rule.frequency_penalty * counts - rule.presence_penalty * (counts > 0)
    if rule.temperature == 0:
        return row[0]
    wanted = hf.LogitsProcessorList([hf.TemperatureLogitsWarper(rule.temperature)])
    if rule.top_k:
        wanted.append(hf.TopKLogitsWarper(rule.top_k))
    if rule.top_p < 1:
        wanted.append(hf.TopPLogitsWarper(rule.top_p))
    if rule.min_p:
        wanted.append(hf.MinPLogitsWarper(rule.min_p))
    return torch.softmax(wanted(ids, row), -1)[0]


def elsewhere(picker: Picker) -> Picker:
    """Let ``picker`` work as on an accelerator."""
    picker._on_host = False
    return picker


def test_each_row_equals_transformers_over_its_whole_history_sc15() -> None:
    made = random.Random(3)
    picker = Picker(VOCAB, torch.device("cpu"))
    prompts = {
        name: [made.randrange(VOCAB) for _ in range(made.randrange(1, 40))] for name in RULES
    }
    answers: dict[str, list[int]] = {name: [] for name in RULES}
    generator = _generator()
    for name, rule in RULES.items():
        picker.add(name, prompts[name], rule, 1, STOPS)
    for step in range(12):
        # some sit a step out, as when preempted; one comes back as if it were new
        names = [name for name in RULES if made.random() < 0.8]
        made.shuffle(names)
        if step == 7:
            picker.forget("all")
            picker.add("all", prompts["all"], RULES["all"], 1, STOPS)
        if step == 9:  # two steps of this one are taken back
            del answers["frequency"][-2:]
        logits = 3 * torch.randn(len(names), VOCAB, generator=generator)
        rows = [(n, len(answers[n]), prompts[n] + answers[n]) for n in names]
        adjusted = logits.clone()
        assert picker.adjust(adjusted, rows) == {}
        for i, name in enumerate(names):
            wanted = expected(logits[i], prompts[name], answers[name], RULES[name])
            if RULES[name].temperature == 0:
                torch.testing.assert_close(adjusted[i], wanted)
            else:
                ours = dense(adjusted[i], RULES[name])
                torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-7)
                assert torch.equal(ours > 0, wanted > 0)
            answers[name].append(made.choice([0, 1, 2, made.randrange(VOCAB)]))


def test_many_requests_share_the_places_of_those_that_ended() -> None:
    rule = Sampling(0.0, frequency_penalty=1.0)
    picker = Picker(20, torch.device("cpu"))
    for n in range(100):
        picker.add(str(n), [1], rule, 0)
        first = picker.pick(torch.eye(20)[5:6].clone(), [(str(n), 0, [1])])
        again = picker.pick(torch.eye(20)[5:6] * 0.5, [(str(n), 1, [1, 5])])
        assert (first[0].token, again[0].token) == (5, 0)
        picker.forget(str(n))
        picker.forget(str(n))
    assert len(picker._penalties._counts_SU) == 8


def test_what_the_vocabulary_does_not_have_harms_nobody() -> None:
    rule = Sampling(0.0, logit_bias=((999, 5.0), (-1, 5.0), (2, 9.0)), min_tokens=3)
    picker = Picker(10, torch.device("cpu"))
    picker.add("odd", [1], rule, 0, frozenset({2, 10, 4000}))
    picked = picker.pick(torch.zeros(2, 10), [("odd", 0, [1]), ("forgotten", 0, [1])])
    assert [p.token for p in picked] == [0, 0]
    assert picker.pick(torch.zeros(1, 10), [("odd", 3, [1, 0, 0, 0])])[0].token == 2


@pytest.mark.parametrize("on_host", [True, False])
def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch_sc14(on_host: bool) -> None:
    rule = Sampling(1.0, top_p=0.98)
    steps = torch.randn(32, VOCAB, generator=_generator())

    def run(seed: int, others: int) -> list[int]:
        made = random.Random(others)
        picker = Picker(VOCAB, torch.device("cpu"))
        picker = picker if on_host else elsewhere(picker)
        picker.add("mine", [1], rule, seed)
        for n in range(others):
            odd = Sampling(1.5, min_p=0.1, presence_penalty=0.5, logprobs=2)
            picker.add(str(n), [1], odd if n % 2 else Sampling(0.0), n)
        answer: list[int] = []
        for logits in steps:
            at = made.randrange(others + 1)
            batch = torch.randn(others + 1, VOCAB)
            batch[at] = logits
            rows: list[Any] = [(str(n), len(answer), [1, *answer]) for n in range(others)]
            rows.insert(at, ("mine", len(answer), [1, *answer]))
            state = torch.get_rng_state()
            answer.append(picker.pick(batch, rows)[at].token)
            assert torch.equal(state, torch.get_rng_state()), "the process's generator was touched"
        return answer

    assert run(5, 0) == run(5, 0) == run(5, 6) == run(5, 15)
    assert run(5, 0) != run(6, 0)


def test_host_and_device_agree_on_every_rule() -> None:
    pickers = [Picker(VOCAB, torch.device("cpu")), elsewhere(Picker(VOCAB, torch.device("cpu")))]
    generator = _generator()
    rows: list[Any] = [(name, 3, [5, 5, 9, 1, 2, 2]) for name in RULES]
    for picker in pickers:
        for n, (name, rule) in enumerate(RULES.items()):
            picker.add(name, [5, 5, 9], replace(rule, logprobs=n % 3), n, STOPS)
    for _ in range(20):
        logits = 2 * torch.randn(len(rows), VOCAB, generator=generator)
        host, device = (picker.pick(logits.clone(), rows) for picker in pickers)
        assert host == device


def test_logprobs_are_those_of_the_raw_logits_sc17() -> None:
    logits = 4 * torch.randn(5, VOCAB, generator=_generator())
    logs = torch.log_softmax(logits.double(), -1)
    banned = tuple((i, -100.0) for i in logs[3].topk(3).indices.tolist())
    rules = [
        Sampling(0.0),
        Sampling(0.0, logprobs=0),
        Sampling(1.0, logprobs=20, top_k=5),
        Sampling(0.0, logprobs=3, logit_bias=banned),
        Sampling(0.0, logprobs=VOCAB + 9),
    ]
    picker = Picker(VOCAB, torch.device("cpu"))
    for n, rule in enumerate(rules):
        picker.add(str(n), [1], rule, 4)
    picked = picker.pick(logits.clone(), [(str(n), 0, [1]) for n in range(5)])
    assert picked[0].logprob is None
    for n, (rule, got) in enumerate(zip(rules, picked, strict=True)):
        if rule.logprobs is None:
            continue
        assert got.logprob is not None
        _check(got.logprob, logs[n], got.token, min(rule.logprobs, VOCAB))
    assert picked[3].token not in dict(banned), "the bias moves the choice, not what is reported"


def test_prompt_logprobs_score_each_token_sc17() -> None:
    logits = torch.randn(6, VOCAB, generator=_generator())
    logs = torch.log_softmax(logits.double(), -1)
    targets = [5, 0, 299, 17, 17, 4]
    for k in (0, 4):
        scored = prompt_logprobs(logits, targets, k)
        assert len(scored) == 6
        for row, token, got in zip(logs, targets, scored, strict=True):
            _check(got, row, token, k)


def _check(got: Logprob, logs_V: torch.Tensor, token: int, k: int) -> None:
    assert got.token_id == token
    assert got.logprob == pytest.approx(float(logs_V[token]), abs=1e-4)
    best = logs_V.topk(k)
    assert [i for i, _ in got.top] == best.indices.tolist()
    assert [v for _, v in got.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)
