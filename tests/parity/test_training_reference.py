"""Fifty steps beside a loop of plain torch and transformers that packs, divides and shares nothing.

It runs one document at a time, with its own words for the losses; what the two have in common is
which rows come when, and the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.parity import objectives_work as work
from tests.parity.objective_data import in_rows, pairs
from tests.parity.training_fixtures import Ranks, base, dataset, documents, two
from tests.parity.training_work import curve, settings
from train_jobs.config import FinetuneConfig
from train_jobs.data.dataset import Dataset
from train_jobs.data.example import Document, Example
from train_jobs.data.order import Order
from train_jobs.schedule import lr_at

pytestmark = pytest.mark.parity
__all__ = ["base", "two"]
STEPS, BETA = 50, 0.1
CLIP = 1.3
"""Some steps are clipped, and some are not."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A document of twenty tokens is nothing to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fields(**changes: Any) -> dict[str, Any]:
    return settings(optim={"lr": 3e-3, "clip": CLIP}, run={"steps": STEPS}, **changes)


def scores(model: Any, document: Document) -> torch.Tensor:
    """Return the log-probability of each trained token."""
    ids = torch.tensor(document.ids)
    told = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    trained = torch.tensor(document.trained[1:])
    return told.gather(1, ids[1:, None])[:, 0][trained]


def plain(
    model: Any,
    data: Dataset,
    some: dict[str, Any],
    terms: Callable[[Iterable[Example]], tuple[torch.Tensor, int]],
) -> tuple[list[float], list[float]]:
    """Train ``model``; ``terms`` gives a step's sum of losses and by what it is divided."""
    config = FinetuneConfig.model_validate(some)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=optim.betas, weight_decay=optim.weight_decay
    )
    losses, norms = [], []
    order = Order(len(data.rows), config.batch.total, config.run.seed, None, STEPS)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, STEPS, optim)
        total, count = terms(
            example for seat in order.step(step) if seat for example in data.rows[seat.row]
        )
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def assert_close(
    found: dict[str, Any], losses: list[float], norms: list[float], model: Any
) -> None:
    """Within a tolerance at each step, and a hundredth of it on average: no drift to one side."""
    apart = np.array(found["loss"]) / np.array(losses) - 1
    assert len(apart) == STEPS
    assert np.abs(apart).max() < 1e-4
    assert abs(apart.mean()) < 2e-5
    np.testing.assert_allclose(found["norm"], norms, rtol=1e-3)
    assert max(norms) > CLIP > min(norms), norms
    for name, value in model.state_dict().items():
        if name in found["parameters"]:
            np.testing.assert_allclose(
                found["parameters"][name], value.numpy(), atol=5e-4, err_msg=name
            )


def test_tc31_fifty_steps_of_dialogues(two: Ranks, base: Path) -> None:
    data, model = dataset(documents(40, prefix=10)), load(base)

    def terms(examples: Iterable[Example]) -> tuple[torch.Tensor, int]:
        told = [scores(model, document) for one in examples for document in one.documents]
        return -torch.cat(told).sum(), sum(map(len, told))

    losses, norms = plain(model, data, fields(), terms)
    assert losses[-1] < 0.8 * losses[0]
    assert_close(two.run(curve, base, fields(zero=2), data)[0], losses, norms, model)


def test_tc31_fifty_steps_of_preferences(two: Ranks, base: Path, tmp_path: Path) -> None:
    """Sigmoid loss of the margin against the base's, arXiv:2305.18290."""
    data, model, reference = in_rows(pairs(24), max_len=64), load(base), load(base)

    def margin(model: Any, example: Example) -> torch.Tensor:
        chosen, rejected = (scores(model, document).sum() for document in example.documents)
        return chosen - rejected

    with torch.no_grad():
        theirs = {id(one): margin(reference, one) for row in data.rows for one in row}

    def terms(examples: Iterable[Example]) -> tuple[torch.Tensor, int]:
        margins = [BETA * (margin(model, one) - theirs[id(one)]) for one in examples]
        return -F.logsigmoid(torch.stack(margins)).sum(), len(margins)

    losses, norms = plain(model, data, fields(), terms)
    assert losses[-1] < 0.8 * losses[0]
    some = fields(zero=2, objective={"kind": "dpo", "beta": BETA})
    assert_close(two.run(work.trained, base, some, data, tmp_path)[0], losses, norms, model)
