"""Ranks, stages and accumulation are only bookkeeping: the curve is that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity import training_work as work
from tests.parity.engine_fixtures import VOCAB
from tests.parity.training_fixtures import (
    Failed,
    Ranks,
    base,
    dataset,
    documents,
    one,
    two,
)
from train_jobs.config import Optim
from train_jobs.data.dataset import Dataset, Document
from train_jobs.schedule import lr_at

pytestmark = pytest.mark.parity
__all__ = ["base", "one", "two"]


@pytest.fixture(scope="module")
def data() -> Dataset:
    made = dataset(documents(40, prefix=10))
    assert len(made.rows) > 12
    return made


@pytest.fixture(scope="module")
def reference(one: Ranks, base: Path, data: Dataset) -> dict[str, Any]:
    """One process, ZeRO 0, the whole batch in one forward pass."""
    fields = work.settings(zero=0, batch={"micro": 4})
    [outcome] = one.run(work.curve, base, fields, data)
    assert len(set(outcome["loss"])) == 12  # it moves
    return outcome


def assert_same_curve(found: dict[str, Any], expected: dict[str, Any]) -> None:
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(found["norm"], expected["norm"], rtol=1e-4)
    for name, value in expected["parameters"].items():
        np.testing.assert_allclose(found["parameters"][name], value, atol=2e-4, err_msg=name)


@pytest.mark.parametrize(("zero", "micro"), [(0, 1), (1, 1), (2, 1), (2, 2), (3, 1), (3, 2)])
def test_tc02_tc04_two_ranks_give_the_curve_of_one_process(
    two: Ranks, base: Path, data: Dataset, reference: dict[str, Any], zero: int, micro: int
) -> None:
    fields = work.settings(zero=zero, batch={"micro": micro})
    outcomes = two.run(work.curve, base, fields, data)
    assert_same_curve(outcomes[0], reference)
    assert outcomes[0]["digest"] == outcomes[1]["digest"]  # the ranks agree to the bit
    record = outcomes[0]["record"]  # TC-01
    assert record["engine"] == "DeepSpeedEngine"
    assert (record["zero_stage"], record["world"]) == (zero, 2)
    assert (record["optimizer"], record["clip"], record["dtype"]) == ("AdamW", 1.0, "float32")


def test_tc05_accumulation_is_only_bookkeeping(
    one: Ranks, base: Path, data: Dataset, reference: dict[str, Any]
) -> None:
    [outcome] = one.run(work.curve, base, work.settings(zero=2, batch={"micro": 1}), data)
    assert_same_curve(outcome, reference)
    # TC-27: the rate moves once an optimiser step, not once a micro-batch
    optim = Optim(lr=1e-2, warmup_ratio=0.1)
    assert outcome["lr"] == [pytest.approx(lr_at(step, 12, optim)) for step in range(12)]


def test_the_last_step_may_be_short(two: Ranks, one: Ranks, base: Path) -> None:
    few = dataset(documents(11))
    assert len(few.rows) % 4
    fields = work.settings(run={"steps": None, "epochs": 1})
    found = two.run(work.curve, base, fields, few)[0]
    [expected] = one.run(work.curve, base, fields, few)
    assert_same_curve(found, expected)


def test_a_checkpoint_reloads_to_the_same_losses(
    two: Ranks, base: Path, data: Dataset, tmp_path: Path
) -> None:
    fields = work.settings(run={"steps": 8, "save_every": 4})
    outcome = two.run(work.interrupted, base, fields, data, tmp_path, 4)[0]
    assert outcome["newest"] == "step-00000008"
    assert outcome["again"]["loss"] == outcome["whole"]["loss"][4:]  # to the bit
    assert outcome["again"]["digest"] == outcome["whole"]["digest"]


@pytest.mark.parametrize("zero", [0, 2])
def test_tc13_the_export_computes_what_the_live_model_does(
    two: Ranks, base: Path, data: Dataset, tmp_path: Path, zero: int
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    fields = work.settings(zero=zero, run={"steps": 3})
    live = two.run(work.exported, base, fields, data, tmp_path / "out")[0]["logits"]
    ids = torch.arange(3, 19)[None]

    def logits(directory: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits.numpy()

    np.testing.assert_allclose(logits(tmp_path / "out"), live, rtol=1e-5, atol=1e-5)
    assert np.abs(logits(base) - live).max() > 0.1  # the base would not have passed
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_tc30_evaluation_changes_nothing(two: Ranks, one: Ranks, base: Path, data: Dataset) -> None:
    fields = work.settings()
    pair = two.run(work.evaluated, base, fields, data)
    [alone] = one.run(work.evaluated, base, fields, data)
    for outcome in (*pair, alone):
        assert outcome["same"]
        assert outcome["gradients"] == 0
        assert outcome["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_tc25_eight_examples_are_learnt_by_heart(two: Ranks, base: Path) -> None:
    few = dataset(documents(8, seed=5))
    fields = work.settings(
        optim={"lr": 2e-2, "weight_decay": 0.0}, batch={"total": 2}, run={"steps": 120}
    )
    assert two.run(work.curve, base, fields, few)[0]["loss"][-1] < 0.05


def test_tc28_a_loss_that_is_no_number_names_rank_step_and_rows(two: Ranks, base: Path) -> None:
    token = VOCAB - 1
    made = [
        Document(d.where, tuple(min(i, token - 1) for i in d.ids), d.trained) for d in documents(16)
    ]
    bad = made[11]
    made[11] = Document(bad.where, (token, *bad.ids[1:]), bad.trained)
    with pytest.raises(Failed) as failed:
        two.run(work.poisoned, base, work.settings(run={"steps": 8}), dataset(made), token)
    assert failed.value.kinds == ["JobError"] * 2
    first, second = failed.value.words
    assert first == second
    assert bad.where + "," in first + "," or bad.where + ";" in first
    assert "step " in first
    assert "on rank " in first


def test_tc26_another_number_format_than_asked_is_refused(one: Ranks, base: Path) -> None:
    with pytest.raises(Failed) as failed:
        one.run(work.wrong_dtype, base, work.settings(), dataset(documents(8)))
    assert failed.value.kinds == ["JobError"]
    assert "'dtype': 'float32'" in failed.value.words[0]
