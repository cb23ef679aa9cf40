"""Preference objectives: the same curve however the work is divided, and what they learn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity import objectives_work as work
from tests.parity.objective_data import in_rows, judged, pairs
from tests.parity.training_fixtures import Ranks, base, one, two
from tests.parity.training_work import settings
from train_jobs.data.dataset import Dataset

pytestmark = pytest.mark.parity
__all__ = ["base", "one", "two"]

PAIRED = ("dpo", "orpo", "simpo")
ADAPTER = {"kind": "lora", "r": 4, "alpha": 8.0, "dropout": 0.1}


def fields(kind: str, **changes: Any) -> dict[str, Any]:
    options = changes.pop("options", {})
    changes.setdefault("run", {"steps": 5})
    return settings(objective={"kind": kind, **options}, **changes)


def data_for(kind: str) -> Dataset:
    return in_rows(judged(48) if kind == "kto" else pairs(40))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(found["norm"], expected["norm"], rtol=2e-4)
    for name, value in expected["parameters"].items():
        np.testing.assert_allclose(found["parameters"][name], value, atol=3e-4, err_msg=name)
    for ours, theirs in zip(found["steps"], expected["steps"], strict=True):
        figures = [name for name in theirs if "/" in name or name == "kl"]
        assert figures
        for name in figures:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    for name, value in expected["after"].items():
        assert found["after"][name] == pytest.approx(value, rel=1e-3, abs=2e-3), name


@pytest.mark.parametrize(
    "kind",
    ["dpo", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("orpo", "simpo")), "kto"],
)
def test_tc02_tc05_ranks_stages_and_micro_batches_are_only_bookkeeping(
    one: Ranks, two: Ranks, base: Path, tmp_path: Path, kind: str
) -> None:
    """KTO's baseline included: it is that of the global batch, not of what is in hand at once."""
    data = data_for(kind)
    assert len(data.rows) > 6
    [expected] = one.run(
        work.trained, base, fields(kind, zero=0, batch={"micro": 4}), data, made(tmp_path / "one")
    )
    assert len(set(expected["loss"])) == 5
    for zero in (0, 2, 3):
        folder = made(tmp_path / f"two-{zero}")
        found = two.run(work.trained, base, fields(kind, zero=zero), data, folder)
        assert_same(found[0], expected)
        assert found[0]["digest"] == found[1]["digest"]
    [alone] = one.run(work.trained, base, fields(kind, zero=3), data, made(tmp_path / "alone"))
    assert_same(alone, expected)


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_tc23_the_policy_begins_as_the_reference(
    one: Ranks, base: Path, tmp_path: Path, adapter: Any
) -> None:
    heldout = in_rows(pairs(6, seed=9))
    some = fields("dpo", adapter=adapter, run={"steps": 2}, optim={"lr": 1e-6})
    [found] = one.run(work.trained, base, some, in_rows(pairs(12)), tmp_path, heldout)
    assert found["before"] == {"loss": pytest.approx(math.log(2)), "accuracy": 0.5, "margin": 0.0}
    if not adapter:  # with dropout the policy differs a little while it trains
        assert found["loss"][0] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "adapter", "zero"), [("dpo", None, 2), ("dpo", ADAPTER, 0), ("kto", ADAPTER, 2)]
)
def test_tc08_a_resumed_run_keeps_its_reference(
    two: Ranks, base: Path, tmp_path: Path, kind: str, adapter: Any, zero: int
) -> None:
    """It is read from the run's folder, and is that of the base, not of the checkpoint."""
    some = fields(kind, adapter=adapter, zero=zero, run={"steps": 4, "save_every": 2})
    found = two.run(work.resumed, base, some, data_for(kind), tmp_path, 2)[0]
    assert found["again"]["loss"] == found["whole"]["loss"][2:]
    assert found["again"]["digest"] == found["whole"]["digest"]


def test_tc14_an_adapter_leaves_the_base_as_it_is(one: Ranks, base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    some = fields("dpo", adapter={**ADAPTER, "dropout": 0.0}, optim={"lr": 3e-2}, run={"steps": 8})
    [found] = one.run(work.trained, base, some, in_rows(pairs(12)), tmp_path)
    stored = load_file(base / "model.safetensors")
    prefix, seen = "base_model.model.", 0
    for name, value in found["parameters"].items():
        plain = name.removeprefix(prefix).replace(".base_layer", "")
        if plain in stored:
            seen += 1
            assert np.array_equal(value, stored[plain].numpy()), name
    assert seen == len(stored)
    assert found["loss"][-1] < found["loss"][0]


@pytest.mark.parametrize("kind", [*PAIRED, "kto"])
def test_tc25_eight_examples_are_learnt(one: Ranks, base: Path, tmp_path: Path, kind: str) -> None:
    eight = in_rows(judged(8) if kind == "kto" else pairs(8))
    some = fields(kind, batch={"total": 2}, run={"steps": 40}, optim={"lr": 5e-3})
    [found] = one.run(work.trained, base, some, eight, tmp_path)
    assert found["before"]["loss"] > found["after"]["loss"]
    assert found["after"]["accuracy"] == 1.0
    assert found["after"]["margin"] > 0.1


def test_a_pair_costs_its_prompt_once(base: Path) -> None:
    from train_jobs.objectives.packed import pack_documents

    [pair] = pairs(1)
    batch = pack_documents(list(pair.documents))
    prompt = pair.documents[0].trained.index(True)
    assert batch.layout.prefix >= prompt
    assert batch.layout.tokens == pair.tokens - batch.layout.prefix
    assert torch.equal(batch.by_document(torch.ones(len(batch.targets_K))).long(), counts(pair))


def counts(pair: Any) -> torch.Tensor:
    return torch.tensor([document.trained_tokens for document in pair.documents])
