"""Sampling: the right distribution, one request's rules at a time, nothing global touched."""

from __future__ import annotations

import math

import pytest
import torch

from serve_apps.engine.interface import Sampling
from serve_apps.engine.sampler import draw, probabilities, sample, uniform

pytestmark = pytest.mark.parity


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
    "rule", [Sampling(1.0), Sampling(0.7), Sampling(1.3, top_p=0.8), Sampling(1.0, top_k=5)]
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
    ],
)
def test_rows_equal_transformers_processors_sc15(rule: Sampling) -> None:
    from transformers import (
        LogitsProcessorList,
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
    reference = torch.softmax(wanted(torch.zeros(5, 1, dtype=torch.long), logits.clone()), -1)
    # the row stands among others with other rules
    rules = [Sampling(0.9, 0.5, 3), rule, Sampling(1.7), rule, Sampling(1.0, 0.2)]
    ours = probabilities(logits.clone(), rules)
    torch.testing.assert_close(ours[[1, 3]], reference[[1, 3]], rtol=1e-4, atol=1e-7)
    assert torch.equal(ours[[1, 3]] > 0, reference[[1, 3]] > 0)


def test_greedy_rows_beside_warm_ones_take_the_best() -> None:
    logits = torch.randn(4, 50, generator=_generator())
    rules = [Sampling(0.0), Sampling(1.0), Sampling(1e-9), Sampling(5.0)]
    picked = sample(logits, rules, [1, 2, 3, 4], [0, 0, 0, 0])
    assert picked[0] == int(logits[0].argmax())
    assert picked[2] == int(logits[2].argmax())


def test_the_last_uniform_still_finds_a_token() -> None:
    probs = torch.softmax(torch.randn(3, 1001, generator=_generator()), -1)
    probs[:, -1] = 0
    ends = draw(probs, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64))
    assert all(0 <= int(i) < 1001 and float(probs[r, i]) > 0 for r, i in enumerate(ends))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)
