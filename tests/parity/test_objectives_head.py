"""The output layer asked block by block says what its whole logits say, and learns the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.engine_fixtures import VOCAB, save_tiny
from train_jobs.objectives import head as heads
from train_jobs.objectives.head import Head, can_be_asked, nll, nll_and_hits
from train_jobs.objectives.packed import load_decoder

pytestmark = pytest.mark.parity

K = 11


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "BLOCK", 3 * VOCAB)  # four blocks, the last one short


@pytest.fixture(scope="module", params=["plain", "tied", "biased", "frozen"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tied = request.param == "tied"
    folder = save_tiny(tmp_path_factory.mktemp("head"), tie_word_embeddings=tied)
    made = load_decoder(folder, torch.float32)
    if request.param == "biased":
        made.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB))
    if request.param == "frozen":
        made.lm_head.weight.requires_grad_(False)
    return made


def inputs() -> dict[str, Any]:
    ids = torch.arange(2, 2 + 2 * K)[None] * 7 % VOCAB
    return {"input_ids": ids, "logits_to_keep": torch.arange(1, 2 * K, 2), "use_cache": False}


def targets() -> torch.Tensor:
    return torch.arange(K) * 5 % VOCAB


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    found, expected = gradients(ours), gradients(theirs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance * scale, msg=name
        )


def test_a_sum_and_its_gradient_are_those_of_whole_logits(model: Any) -> None:
    asked, plain = copy.deepcopy(model), copy.deepcopy(model)
    values = Head(asked).total(asked, inputs(), nll_and_hits, targets())
    (values[0] * 0.37).backward()
    logits = plain(**inputs()).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, targets(), reduction="sum")
    (loss * 0.37).backward()
    torch.testing.assert_close(values[0].detach(), loss.detach())
    assert int(values[1]) == int((logits.argmax(1) == targets()).sum())
    assert_same_gradients(asked, plain)


def curved(values_KF: torch.Tensor, weights_K: torch.Tensor) -> torch.Tensor:
    """Something that no sum of places is."""
    return (
        torch.nn.functional.logsigmoid((values_KF[:, 0] * weights_K).sum())
        + (values_KF[:, 1] ** 2).mean()
    )


def two_columns(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
    return torch.stack([nll(logits_CV, targets_C), logits_CV.logsumexp(1)], dim=1)


def test_rows_let_any_gradient_through(model: Any) -> None:
    asked, plain = copy.deepcopy(model), copy.deepcopy(model)
    weights = torch.linspace(-0.3, 0.2, K)
    rows = Head(asked).rows(asked, inputs(), two_columns, targets())
    curved(rows, weights).backward()
    expected = two_columns(plain(**inputs()).logits[0], targets())
    curved(expected, weights).backward()
    torch.testing.assert_close(rows.detach(), expected.detach())
    assert_same_gradients(asked, plain)


def test_without_gradients_nothing_is_computed_for_them(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = copy.deepcopy(model)
    head = Head(asked)
    expected = head.total(asked, inputs(), nll, targets())[0].detach()
    monkeypatch.setattr(heads._Gradients, "add", None)
    with torch.no_grad():
        found = head.total(asked, inputs(), nll, targets())[0]
        rows = head.rows(asked, inputs(), nll, targets())
    torch.testing.assert_close(found, expected)
    assert rows.shape == (K, 1)


def test_bfloat16_gradients_are_summed_in_float32(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    asked, plain = (load_decoder(folder, torch.bfloat16) for _ in range(2))
    exact = load_decoder(folder, torch.float32)
    values = Head(asked).total(asked, inputs(), nll, targets())
    assert values.dtype == torch.float32
    values[0].backward()
    for model in (plain, exact):
        logits = model(**inputs()).logits[0].float()
        torch.nn.functional.cross_entropy(logits, targets(), reduction="sum").backward()
    wanted = exact.lm_head.weight.grad
    ours, theirs = ((m.lm_head.weight.grad.float() - wanted).norm() for m in (asked, plain))
    assert asked.lm_head.weight.grad.dtype == torch.bfloat16
    assert float(ours) <= 1.05 * float(theirs)


@pytest.mark.parametrize(
    ("kind", "changes", "asked"),
    [
        ("llama", {}, True),
        ("gemma2", {"final_logit_softcapping": 2.0}, False),
        ("gemma2", {"final_logit_softcapping": None}, True),
        ("cohere", {"logit_scale": 0.25}, False),
        ("granite", {"logits_scaling": 4.0}, False),
    ],
)
def test_logits_changed_behind_the_layer_are_taken_whole(
    tmp_path: Path, kind: str, changes: dict[str, Any], asked: bool
) -> None:
    folder = save_tiny(tmp_path, kind, **changes)
    model, plain = (load_decoder(folder, torch.float32) for _ in range(2))
    assert can_be_asked(model) == asked
    head = Head(model)
    total = head.total(model, inputs(), nll, targets())
    loss = torch.nn.functional.cross_entropy(
        plain(**inputs()).logits[0], targets(), reduction="sum"
    )
    torch.testing.assert_close(total[0].detach(), loss.detach())
    total[0].backward()
    loss.backward()
    assert_same_gradients(model, plain)
    assert head.rows(model, inputs(), nll, targets()).shape == (K, 1)


def test_the_layer_still_answers_those_who_want_logits(model: Any) -> None:
    asked = copy.deepcopy(model)
    Head(asked)
    with torch.no_grad():
        assert torch.equal(asked(**inputs()).logits, model(**inputs()).logits)
