"""TC-23 for GRPO: advantages and loss in closed form, rewards checked, answers put together."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError, JobError
from cluster.generation import Answered, Ask, Sample
from train_jobs.data.example import Document
from train_jobs.objectives import rewards
from train_jobs.objectives.grpo import grpo_loss
from train_jobs.objectives.refresh import Refresh
from train_jobs.objectives.rollout import (
    answer_document,
    build,
    group_advantages,
    sampled_logprobs,
)
from train_jobs.objectives.settings import GRPO


def settings(**changes: object) -> GRPO:
    return GRPO.model_validate({"kind": "grpo", "rewards": ["toy:one"], **changes})


def test_TC23_advantages_are_those_of_the_group() -> None:
    given = [1.0, 0.0, 0.5, 3.0]
    expected = (np.array(given) - np.mean(given)) / (np.std(given, ddof=1) + 1e-4)
    assert group_advantages(given, scaled=True) == pytest.approx(list(expected), rel=1e-9)
    plain = group_advantages(given, scaled=False)
    assert plain == pytest.approx(list(np.array(given) - np.mean(given)))
    assert group_advantages([2.0, 2.0], scaled=True) == [0.0, 0.0]


def test_TC23_grpo_is_clipped_where_it_would_go_too_far() -> None:
    logps = np.array([-1.0, -1.0, -2.0, -0.5, -0.5])
    sampled = np.array([-1.5, -1.5, -1.9, -0.45, -1.5])
    advantages = np.array([2.0, -2.0, 1.0, 0.0, 0.5])
    values = torch.tensor(logps, requires_grad=True)
    terms, clipped, kl = grpo_loss(
        values, torch.tensor(sampled), torch.tensor(advantages), None, settings(epsilon=0.2)
    )
    ratio = np.exp(logps - sampled)
    expected = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    np.testing.assert_allclose(terms.detach(), expected, rtol=1e-6)
    assert kl is None
    assert clipped.tolist() == [1, 0, 0, 0, 1]
    terms.sum().backward()
    assert values.grad is not None
    # cut off where the ratio is above its bound and would still grow; a bad token goes on falling
    assert values.grad[0] == values.grad[4] == 0
    assert values.grad[1] > 0
    assert values.grad[2] < 0


def test_TC23_grpo_with_a_reference() -> None:
    logps, reference = np.array([-1.0, -2.0]), np.array([-1.5, -1.25])
    terms, _, kl = grpo_loss(
        torch.tensor(logps),
        torch.tensor(logps),
        torch.tensor([1.0, -1.0], dtype=torch.float64),
        torch.tensor(reference),
        settings(beta=0.3),
    )
    apart = reference - logps
    expected = np.exp(apart) - apart - 1
    assert kl is not None
    np.testing.assert_allclose(kl, expected, rtol=1e-6)
    np.testing.assert_allclose(terms, np.array([-1.0, 1.0]) + 0.3 * expected, rtol=1e-6)


def test_what_the_policy_itself_sampled_has_the_ratio_one() -> None:
    logps = torch.tensor([-1.0, -3.0], requires_grad=True)
    terms, _, _ = grpo_loss(
        logps, torch.full((2,), math.nan), torch.tensor([0.5, -2.0]), None, settings()
    )
    assert terms.tolist() == [-0.5, 2.0]
    terms.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [-0.5, 2.0]  # the policy gradient: up where it was good


PROMPT = Document("toy.jsonl:1", (1, 2, 3), (False,) * 3)


def test_the_token_that_ended_an_answer_is_trained_without_a_sampled_probability() -> None:
    ended, cut = Sample((7, 8), (-0.1, -0.2), True), Sample((9,), (-0.3,), False)
    documents = [answer_document(PROMPT, sample, end=5) for sample in (ended, cut)]
    assert documents[0].ids == (1, 2, 3, 7, 8, 5)
    assert documents[1].ids == (1, 2, 3, 9)
    sampled = [sampled_logprobs(s, d) for s, d in zip((ended, cut), documents, strict=True)]
    assert sampled[0][:2] == [-0.1, -0.2]
    assert math.isnan(sampled[0][2])
    by_token = build(documents, sampled, [1.0, -1.0], True, {}, "cpu")
    assert by_token.weight == 4.0
    assert by_token.advantages_K.tolist() == [1, 1, 1, -1]
    by_answer = build(documents, sampled, [1.0, -1.0], False, {}, "cpu")
    assert by_answer.weight == 2.0
    assert by_answer.shares_K.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "toy_rewards.py").write_text(
        "def length(prompts, completions, want, **_):\n"
        "    return [-abs(len(c) - w) for c, w in zip(completions, want)]\n"
        "def short(prompts, completions, **_):\n    return [0.0]\n"
        "def broken(prompts, completions, **_):\n    raise KeyError('answer')\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_rewards", raising=False)
    return "toy_rewards"


def test_a_reward_sees_the_columns_of_the_row(toy: str) -> None:
    name = f"{toy}:length"
    found = rewards.scores(name, rewards.find(name), ["p", "p"], ["abc", "a"], {"want": [2, 2]})
    assert found == [-1.0, -1.0]


@pytest.mark.parametrize("function", ["short", "broken"])
def test_a_reward_that_fails_is_named(toy: str, function: str) -> None:
    name = f"{toy}:{function}"
    with pytest.raises(JobError, match=f"reward function {name}"):
        rewards.scores(name, rewards.find(name), ["p", "p"], ["a", "b"], {"want": [1, 1]})


@pytest.mark.parametrize("name", ["missing_module:f", "toy_rewards:number", "toy_rewards:nothing"])
def test_a_reward_that_is_not_there_is_named(toy: str, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        rewards.find(name)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rewards": ["toy"]}, "not of the form package.module:name"),
        ({"reward_weights": [1.0, 2.0]}, "2 numbers for 1 rewards"),
        (
            {"rewards": ["toy:one", "toy:one"], "reward_weights": [1.0, 2.0]},
            "'toy:one' is named twice",
        ),
        ({"app": "policy", "temperature": 0.7}, "temperature=0.7 with app"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"zero": 3}, "zero=3 with objective grpo"),
        ({"objective": {"beta": 0.1}}, "objective.beta=0.1 without an adapter"),
        (
            {"zero": 3, "objective": {"kind": "distillation", "teacher": "t", "lmbda": 0.5}},
            "zero=3 with objective distillation",
        ),
        ({"objective": {"kind": "distillation", "teacher": "serve:t"}}, "set top_k to 1 ... 100"),
    ],
)
def test_a_run_that_cannot_generate_is_refused(changes: dict[str, object], told: str) -> None:
    from train_jobs.config import FinetuneConfig

    objective = {"kind": "grpo", "rewards": ["toy:one"], **(changes.pop("objective", {}))}  # type: ignore[dict-item]
    if objective["kind"] != "grpo":
        del objective["rewards"]
    fields = {"model": "m", "data": {"train": "/t.jsonl"}, "run": {"steps": 1}, **changes}
    with pytest.raises(ValueError, match=told):
        FinetuneConfig.model_validate({**fields, "objective": objective})


class Late:
    """A sampler one of whose replicas has not heard yet."""

    def __init__(self, *said: str) -> None:
        self.said, self.asked = list(said), list[int]()

    def ask(self, asks: Sequence[Ask]) -> list[Answered]:
        self.asked.append(len(asks))
        return [Answered(self.said.pop(0) if self.said else "policy@1") for _ in asks]


def refresh(sampler: Late, monkeypatch: pytest.MonkeyPatch) -> Refresh:
    monkeypatch.setattr("train_jobs.objectives.refresh.time.sleep", lambda seconds: None)
    made = Refresh("policy", SimpleNamespace(ref="policy@1"), 2, sampler)  # type: ignore[arg-type]
    made._made, made._steps = {"policy@2": 0, "policy@3": 2}, 4
    return made


def test_what_a_late_replica_answered_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Late("policy@3", "policy@1", "policy@2", "policy@1", "policy@3")
    policy = refresh(sampler, monkeypatch)
    found = policy.ask([Ask((1,), 1)] * 3)
    assert [one.version for one in found] == ["policy@3", "policy@3", "policy@2"]
    assert [policy.age(one.version) for one in found] == [1, 1, 3]
    assert sampler.asked == [3, 1, 1]


def test_an_app_that_somebody_else_changes_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 9000, 100))
    with pytest.raises(JobError, match=r"policy answers with policy@1, which this run did not"):
        refresh(Late(), monkeypatch).ask([Ask((1,), 1)], clock=lambda: next(now))


def test_the_rewards_that_come_with_it_compare_with_a_column() -> None:
    columns = {"answer": ["4", "4", " Paris\n"], "topic": ["sums", "sums", "towns"]}
    said = ["4 \n", "it is 4", "paris"]
    give = lambda name: rewards.scores(name, rewards.find(name), [[]] * 3, said, columns)  # noqa: E731
    assert give("train_jobs.rewards:exact") == [1.0, 0.0, 0.0]
    assert give("train_jobs.rewards:contains") == [1.0, 1.0, 0.0]
    with pytest.raises(JobError, match="called with prompts, completions and topic"):
        rewards.scores("x", rewards.find("train_jobs.rewards:exact"), [[]], ["a"], {"topic": ["b"]})
