"""Packed documents do not see each other, and the loss is that of each alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.engine_fixtures import VOCAB, save_tiny
from tests.parity.training_fixtures import base, documents
from train_jobs.attention import NAME, Layout, use_packed_attention
from train_jobs.data.example import Document
from train_jobs.objectives.head import Head, nll
from train_jobs.objectives.packed import Packed, common_prefix, pack_documents

pytestmark = pytest.mark.parity
__all__ = ["base"]


def load(directory: Path, packed: bool = True) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    if packed:
        use_packed_attention(model)
    return model


HEADS: dict[int, Head] = {}


def nll_sum(model: Any, batch: Packed) -> torch.Tensor:
    head = HEADS.get(id(model)) or HEADS.setdefault(id(model), Head(model))
    return head.total(model, batch.inputs, nll, batch.targets_K)[0]


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return load(base)


def logits(model: Any, made: Sequence[Document], layout: Layout | None = None) -> torch.Tensor:
    batch = pack_documents(made, share=False)
    with torch.no_grad():
        found = model(
            input_ids=batch.ids_1T,
            position_ids=batch.positions_1T,
            layout=layout or batch.layout,
            use_cache=False,
        )
    return found.logits[0]


def test_tc16_changing_one_document_moves_no_logit_of_another(model: Any) -> None:
    first, second, third = documents(3)
    other = Document(first.where, tuple((i + 1) % VOCAB for i in first.ids), first.trained)
    before, after = logits(model, [first, second, third]), logits(model, [other, second, third])
    edge = len(first.ids)
    assert torch.equal(before[edge:], after[edge:])
    assert not torch.allclose(before[:edge], after[:edge], atol=1e-2)


def test_tc16_control_plain_concatenation_contaminates(model: Any) -> None:
    first, second = documents(2)
    edge = len(first.ids)
    whole = Layout(0, (edge + len(second.ids),))
    packed, plain = logits(model, [first, second]), logits(model, [first, second], whole)
    assert (packed[edge:] - plain[edge:]).abs().max() > 1e-2


@pytest.mark.parametrize("prefix", [0, 12])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral"])
def test_tc16_the_packed_loss_and_gradient_are_those_of_each_document_alone(
    tmp_path: Path, model_type: str, prefix: int
) -> None:
    """With a common beginning computed once, too; the reference is the library's own attention."""
    save_tiny(tmp_path / model_type, model_type)
    made = documents(5, seed=3, prefix=prefix)
    packed, plain = load(tmp_path / model_type), load(tmp_path / model_type, packed=False)
    batch = pack_documents(made)
    assert batch.layout.prefix == prefix
    loss = nll_sum(packed, batch)
    loss.backward()
    expected = torch.zeros(())
    for document in made:
        ids = torch.tensor([document.ids])
        labels = torch.where(torch.tensor([document.trained]), ids, -100)
        found = plain(input_ids=ids, use_cache=False).logits[0, :-1]
        one = torch.nn.functional.cross_entropy(found, labels[0, 1:], reduction="sum")
        one.backward()
        expected += one.detach()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-4)
    for (name, ours), theirs in zip(packed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-3, atol=2e-4, msg=lambda told, n=name: f"{n}: {told}"
        )


def test_tc05_control_a_mean_of_means_is_another_loss(model: Any) -> None:
    made = documents(6)
    with torch.no_grad():
        sums = [float(nll_sum(model, pack_documents([document]))) for document in made]
    counts = [document.trained_tokens for document in made]
    token_mean = sum(sums) / sum(counts)
    mean_of_means = sum(s / n for s, n in zip(sums, counts, strict=True)) / len(made)
    with torch.no_grad():
        packed = float(nll_sum(model, pack_documents(made)))
    assert packed / sum(counts) == pytest.approx(token_mean, rel=1e-5)
    assert abs(mean_of_means / token_mean - 1) > 0.001


def test_what_is_not_trained_is_not_a_target(model: Any) -> None:
    ids = (5, 6, 7, 8, 9, 10)
    mask = (False, False, True, True, False, False)
    loss = nll_sum(model, pack_documents([Document("a:1", ids, mask)])).detach()
    # the tokens behind the last trained one cannot matter, neither as input nor as target
    longer = pack_documents([Document("a:1", (*ids[:4], 50, 60), mask)])
    other = nll_sum(model, longer).detach()
    assert float(loss) == pytest.approx(float(other), rel=1e-6)
    every = pack_documents([Document("a:1", ids, (False,) + (True,) * 5)])
    trained = nll_sum(model, every).detach()
    assert float(trained) > float(loss)


def test_a_batch_without_targets_has_no_loss_and_no_gradient(model: Any) -> None:
    loss = nll_sum(model, pack_documents([Document("a:1", (5, 6), (False, False))]))
    model.zero_grad()
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(float(p.grad.abs().sum()) == 0.0 for p in model.parameters() if p.grad is not None)


def test_the_common_beginning_never_swallows_a_document() -> None:
    assert common_prefix([tuple(range(20)), tuple(range(20))]) == 19
    assert common_prefix([tuple(range(20)), (*range(10), 99)]) == 10
    assert common_prefix([tuple(range(20)), (*range(5), 99)]) == 0  # too short to pay
    assert common_prefix([tuple(range(20))]) == 0


def test_a_model_whose_attention_cannot_be_replaced_is_refused(base: Path) -> None:
    from cluster.errors import ConfigError

    model = load(base, packed=False)
    model.set_attn_implementation = lambda name: None  # says yes, does nothing
    with pytest.raises(ConfigError, match="lets packed documents see each other"):
        use_packed_attention(model)
    assert NAME  # the name a model that takes part runs under
