from __future__ import annotations

import math

import pytest

from train_jobs.config import Optim
from train_jobs.schedule import lr_at

OPTIM = Optim(lr=1.0, min_lr_ratio=0.1, warmup_ratio=0.2)


def test_tc27_warm_up_is_linear_and_never_zero() -> None:
    assert [lr_at(step, 10, OPTIM) for step in range(2)] == [0.5, 1.0]


def test_tc27_the_cosine_passes_its_middle_and_ends_at_the_floor() -> None:
    optim = Optim(lr=1.0, min_lr_ratio=0.1, warmup_ratio=0.0)
    rates = [lr_at(step, 11, optim) for step in range(11)]
    assert rates[0] == 1.0
    assert rates[5] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(0.1)
    assert rates[2] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.2)) / 2)
    assert rates == sorted(rates, reverse=True)


def test_a_run_of_one_step_uses_the_peak() -> None:
    assert lr_at(0, 1, OPTIM) == pytest.approx(1.0)
