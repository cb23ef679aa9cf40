"""TC-23: the loss of each objective is its closed form, computed here a second time with numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from train_jobs.objectives.divergence import divergence, named
from train_jobs.objectives.dpo import DirectPreference, dpo_loss
from train_jobs.objectives.kto import kto_loss
from train_jobs.objectives.orpo import OddsRatio
from train_jobs.objectives.preference import Seen
from train_jobs.objectives.settings import DPO, KTO, ORPO, SimPO
from train_jobs.objectives.simpo import SimplePreference

LOGPS = np.array([[-12.0, -15.5], [-30.25, -20.0], [-7.5, -7.5]])
REFERENCE = np.array([[-13.0, -14.0], [-28.0, -21.5], [-7.5, -7.5]])
TOKENS = np.array([[6.0, 5.0], [11.0, 16.0], [3.0, 3.0]])


def log_sigmoid(x: Any) -> Any:
    return -np.log1p(np.exp(-np.asarray(x)))


def seen(logps: np.ndarray = LOGPS, reference: np.ndarray = REFERENCE) -> Seen:
    values = torch.tensor(logps, requires_grad=True)
    return Seen(values, torch.tensor(TOKENS), torch.tensor(reference))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_TC23_dpo(smoothing: float) -> None:
    found = DirectPreference(DPO(kind="dpo", beta=0.3, label_smoothing=smoothing)).judge(seen())
    ratios = LOGPS - REFERENCE
    logits = 0.3 * (ratios[:, 0] - ratios[:, 1])
    expected = -(1 - smoothing) * log_sigmoid(logits) - smoothing * log_sigmoid(-logits)
    np.testing.assert_allclose(found.losses_P.detach(), expected, rtol=1e-6)
    np.testing.assert_allclose(found.rewards_P2, 0.3 * ratios, rtol=1e-6)


def test_TC23_dpo_hinge_and_ipo() -> None:
    ratios = LOGPS - REFERENCE
    hinge = DirectPreference(DPO(kind="dpo", beta=0.3, loss_type="hinge")).judge(seen())
    expected = np.maximum(0, 1 - 0.3 * (ratios[:, 0] - ratios[:, 1]))
    np.testing.assert_allclose(hinge.losses_P.detach(), expected, rtol=1e-6)
    ipo = DirectPreference(DPO(kind="dpo", beta=0.3, loss_type="ipo")).judge(seen())
    means = ratios / TOKENS
    expected = (means[:, 0] - means[:, 1] - 1 / 0.6) ** 2
    np.testing.assert_allclose(ipo.losses_P.detach(), expected, rtol=1e-6)


def test_TC23_dpo_of_the_reference_itself_is_ln_2_and_raises_what_was_chosen() -> None:
    judged = DirectPreference(DPO(kind="dpo")).judge(same := seen(LOGPS, LOGPS))
    assert judged.losses_P.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-12)
    judged.losses_P.sum().backward()
    slope = same.logps_P2.grad
    assert slope is not None
    assert (slope[:, 0] < 0).all()  # downhill is a higher log-probability of the chosen answer
    assert (slope[:, 1] > 0).all()
    np.testing.assert_allclose(slope[:, 0], -0.1 / 2, rtol=1e-12)


def test_dpo_is_finite_far_from_the_reference() -> None:
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = dpo_loss(far, DPO(kind="dpo", beta=1.0))
    loss.sum().backward()
    assert loss.tolist() == [0.0, 1e4]
    assert far.grad is not None
    assert far.grad.tolist() == [0.0, -1.0]


def test_label_smoothing_belongs_to_the_sigmoid() -> None:
    with pytest.raises(ValueError, match="label_smoothing=0.1 has no meaning with loss_type: ipo"):
        DPO(kind="dpo", loss_type="ipo", label_smoothing=0.1)


def test_TC23_orpo() -> None:
    found = OddsRatio(ORPO(kind="orpo", beta=0.4)).judge(seen())
    means = LOGPS / TOKENS
    odds = np.log(np.exp(means) / (1 - np.exp(means)))
    ratio = log_sigmoid(odds[:, 0] - odds[:, 1])
    np.testing.assert_allclose(found.losses_P.detach(), -means[:, 0] - 0.4 * ratio, rtol=1e-6)
    np.testing.assert_allclose(found.rewards_P2, 0.4 * means, rtol=1e-6)
    np.testing.assert_allclose(found.more["log_odds_ratio"].detach(), ratio, rtol=1e-6)


def test_orpo_of_a_certain_answer_is_finite() -> None:
    judged = OddsRatio(ORPO(kind="orpo")).judge(sure := seen(np.array([[0.0, -5.0]] * 3)))
    judged.losses_P.sum().backward()
    assert torch.isfinite(judged.losses_P).all()
    assert sure.logps_P2.grad is not None
    assert torch.isfinite(sure.logps_P2.grad).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_TC23_simpo(smoothing: float) -> None:
    settings = SimPO(kind="simpo", beta=2.5, gamma=0.7, label_smoothing=smoothing)
    found = SimplePreference(settings).judge(seen())
    means = LOGPS / TOKENS
    logits = 2.5 * (means[:, 0] - means[:, 1]) - 0.7
    expected = -(1 - smoothing) * log_sigmoid(logits) - smoothing * log_sigmoid(-logits)
    np.testing.assert_allclose(found.losses_P.detach(), expected, rtol=1e-6)


def test_TC23_kto() -> None:
    settings = KTO(kind="kto", beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    ratios, good, kl = np.array([1.0, -2.0, 3.0, 0.5]), np.array([1.0, 1.0, 0.0, 0.0]), 0.8
    found = kto_loss(torch.tensor(ratios), torch.tensor(good), kl, settings)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = [
        1.5 * (1 - sigmoid(0.2 * (1.0 - 0.8))),
        1.5 * (1 - sigmoid(0.2 * (-2.0 - 0.8))),
        0.5 * (1 - sigmoid(0.2 * (0.8 - 3.0))),
        0.5 * (1 - sigmoid(0.2 * (0.8 - 0.5))),
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_TC23_kto_of_the_reference_itself_is_a_half_and_moves_both_ways() -> None:
    ratios = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss = kto_loss(ratios, torch.tensor([1.0, 0.0]), 0.0, KTO(kind="kto"))
    loss.sum().backward()
    assert loss.tolist() == [0.5, 0.5]
    assert ratios.grad is not None
    assert ratios.grad.tolist() == pytest.approx([-0.1 / 4, 0.1 / 4])


def distributions(seed: int) -> np.ndarray:
    raw = np.random.default_rng(seed).normal(size=(5, 7)) * 2
    return raw - np.log(np.exp(raw).sum(1, keepdims=True))


def numpy_divergence(student: np.ndarray, teacher: np.ndarray, beta: float) -> np.ndarray:
    p, q = np.exp(teacher), np.exp(student)
    if beta == 0:
        return (p * np.log(p / q)).sum(1)
    if beta == 1:
        return (q * np.log(q / p)).sum(1)
    mean = beta * p + (1 - beta) * q
    return (beta * p * np.log(p / mean) + (1 - beta) * q * np.log(q / mean)).sum(1)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_TC23_distillation(beta: float) -> None:
    student, teacher = distributions(1), distributions(2)
    found = divergence(torch.tensor(student), torch.tensor(teacher), beta)
    np.testing.assert_allclose(found, numpy_divergence(student, teacher, beta), rtol=1e-6)
    same = divergence(torch.tensor(teacher), torch.tensor(teacher), beta)
    np.testing.assert_allclose(same, 0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_TC23_distillation_moves_towards_the_teacher(beta: float) -> None:
    teacher = torch.tensor(distributions(2))
    logits = torch.tensor(distributions(1), requires_grad=True)
    before = divergence(logits.log_softmax(1), teacher, beta).sum()
    before.backward()
    assert logits.grad is not None
    after = divergence((logits - 0.1 * logits.grad).detach().log_softmax(1), teacher, beta).sum()
    assert float(after) < float(before.detach())


def test_TC23_what_the_teacher_does_not_name_counts_as_one() -> None:
    student, teacher = torch.tensor(distributions(1)), torch.tensor(distributions(2))
    ids = teacher.topk(3, dim=1).indices
    p, q = named(teacher, ids), named(student, ids)
    np.testing.assert_allclose(p.exp().sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(q.exp().sum(1), 1, rtol=1e-12)
    coarse, fine = divergence(q, p, 0.0), divergence(student, teacher, 0.0)
    assert (coarse <= fine + 1e-12).all()  # what is put together cannot be told apart
    assert (coarse > 0).all()
    every = teacher.topk(6, dim=1).indices  # only one entry is left: nothing is lost
    same = divergence(named(student, every), named(teacher, every), 0.0)
    np.testing.assert_allclose(same, fine, rtol=1e-9)
