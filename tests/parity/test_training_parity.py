"""Ranks, stages and accumulation are only bookkeeping: the curve is that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.parity import training_work as work
from tests.parity.engine_fixtures import VOCAB, save_tiny
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
from train_jobs.data.dataset import Dataset
from train_jobs.data.example import Document, Example, trained_in
from train_jobs.data.order import Order
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


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_tc02_tc05_stages_and_accumulation_are_only_bookkeeping(
    one: Ranks, base: Path, data: Dataset, reference: dict[str, Any], zero: int
) -> None:
    """In one process, too."""
    [outcome] = one.run(work.curve, base, work.settings(zero=zero, batch={"micro": 1}), data)
    assert_same_curve(outcome, reference)
    # TC-27: the rate moves once an optimiser step, not once a micro-batch
    optim = Optim(lr=1e-2, warmup_ratio=0.1)
    assert outcome["lr"] == [pytest.approx(lr_at(step, 12, optim)) for step in range(12)]


def test_tc05_eight_rows_at_once_are_eight_times_one_with_unequal_tokens(
    one: Ranks, base: Path
) -> None:
    rows = tuple((Example((document,)),) for document in documents(24, seed=9))
    made = Dataset(rows, 64, 0, "0" * 64)
    counts = [trained_in(row) for row in made.rows]
    assert max(counts) > 5 * min(counts)
    batch, run = {"total": 8}, {"steps": 6}
    fields = [work.settings(batch={**batch, "micro": micro}, run=run) for micro in (8, 1)]
    [at_once], [one_by_one] = (one.run(work.curve, base, some, made) for some in fields)
    assert_same_curve(one_by_one, at_once)
    # control: the same rows, averaged by micro-batch as DeepSpeed would by itself
    [naive] = one.run(work.mean_of_means, base, fields[1], made)
    apart = np.abs(np.array(naive["loss"]) / np.array(at_once["loss"]) - 1)
    assert apart.max() >= 0.01


def test_the_last_step_may_be_short(two: Ranks, one: Ranks, base: Path) -> None:
    few = dataset(documents(11))
    assert len(few.rows) % 4
    fields = work.settings(run={"steps": None, "epochs": 1})
    found = two.run(work.curve, base, fields, few)[0]
    [expected] = one.run(work.curve, base, fields, few)
    assert_same_curve(found, expected)


ADAPTER = {"kind": "lora", "r": 4, "alpha": 8.0, "dropout": 0.1}


@pytest.mark.parametrize(
    ("zero", "adapter"), [(0, None), (1, None), (2, None), (3, None), (2, ADAPTER), (0, ADAPTER)]
)
def test_tc07_tc08_what_goes_on_ends_where_it_would_have(
    two: Ranks, base: Path, data: Dataset, tmp_path: Path, zero: int, adapter: Any
) -> None:
    """Bitwise, in mid-epoch, with accumulation, and with dropout where there is an adapter."""
    fields = work.settings(
        zero=zero, adapter=adapter, run={"steps": 6, "save_every": 3}, batch={"total": 6}
    )
    outcomes = two.run(work.interrupted, base, fields, data, tmp_path, 3)
    outcome = outcomes[0]
    assert outcome["newest"] == "step-00000006"
    assert outcome["again"]["loss"] == outcome["whole"]["loss"][3:]
    assert outcome["again"]["digest"] == outcome["whole"]["digest"]
    assert outcome["counted"][0] == outcome["counted"][1]  # tokens of both halves
    assert outcomes[1]["again"]["digest"] == outcome["again"]["digest"]
    if adapter:  # TC-14: the base is not in it
        assert outcome["tensors"]
        assert all("lora_" in name for name in outcome["tensors"])


def test_tc14_an_adapters_checkpoint_of_zero_0_loads_at_any_world_size(
    two: Ranks, one: Ranks, base: Path, data: Dataset, tmp_path: Path
) -> None:
    fields = work.settings(zero=0, adapter=ADAPTER, run={"steps": 3, "save_every": 3})
    there = two.run(work.interrupted, base, fields, data, tmp_path, 3)[0]["whole"]["digest"]
    elsewhere = work.settings(zero=0, adapter=ADAPTER, run={"steps": 3, "save_every": 3})
    [here] = one.run(work.loaded_elsewhere, base, elsewhere, data, tmp_path / "step-00000003", 2)
    assert here == there


def test_tc09_divided_state_at_another_world_size_is_refused(
    two: Ranks, one: Ranks, base: Path, data: Dataset, tmp_path: Path
) -> None:
    fields = work.settings(run={"steps": 3, "save_every": 3})
    two.run(work.interrupted, base, fields, data, tmp_path, 3)
    with pytest.raises(Failed) as failed:
        one.run(work.loaded_elsewhere, base, fields, data, tmp_path / "step-00000003", 2)
    assert "written by 2 ranks with ZeRO 2, this run has 1" in failed.value.words[0]


def logits(directory: Path) -> Any:
    """Return what transformers computes from a directory."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits.numpy()


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_tc13_the_export_computes_what_the_live_model_does(
    two: Ranks, base: Path, data: Dataset, tmp_path: Path, zero: int
) -> None:
    fields = work.settings(zero=zero, run={"steps": 3})
    live = two.run(work.exported, base, fields, data, tmp_path / "out")[0]["logits"]
    assert_exported(base, tmp_path / "out", live)


@pytest.mark.parametrize("tied", [False, True])
def test_tc14_tc15_a_merged_adapter_computes_what_the_adapter_did(
    two: Ranks, base: Path, data: Dataset, tmp_path: Path, tied: bool
) -> None:
    if tied:
        base = save_tiny(tmp_path / "tied", initializer_range=0.05, tie_word_embeddings=True)
    fields = work.settings(zero=2, adapter={**ADAPTER, "targets": ["q_proj", "down_proj"]})
    outcome = two.run(work.exported, base, fields, data, tmp_path / "out")[0]
    assert_exported(base, tmp_path / "out", outcome["logits"])
    record = outcome["record"]
    assert 0 < record["trainable"] < 0.2 * record["parameters"]
    old = {}
    for file in base.glob("*.safetensors"):
        old |= load_file(file)
    kept = {name.replace("base_model.model.", "").replace(".base_layer", ""): tensor
            for name, tensor in outcome["frozen"].items()}  # fmt: skip
    for name, tensor in old.items():  # what the optimiser never saw is the same to the bit
        assert torch.equal(kept[name], tensor), name
    new = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name.split(".")[-2] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"q_proj", "down_proj"}


def assert_exported(base: Path, out: Path, live: Any) -> None:
    np.testing.assert_allclose(logits(out), live, rtol=1e-5, atol=1e-5)
    assert np.abs(logits(base) - live).max() > 0.1  # the base would not have passed
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("zero", [2, 3])
def test_tc30_evaluation_changes_nothing(
    two: Ranks, one: Ranks, base: Path, data: Dataset, zero: int
) -> None:
    assert len(data.rows) % 2  # one rank has a row more
    fields = work.settings(zero=zero)
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


def test_tc28_a_loss_that_is_no_number_names_rank_step_and_rows_and_saves_nothing(
    two: Ranks, base: Path, tmp_path: Path
) -> None:
    token = VOCAB - 1
    made = [
        Document(d.where, tuple(min(i, token - 1) for i in d.ids), d.trained) for d in documents(40)
    ]
    rows = dataset(made).rows
    third = Order(len(rows), total=4, seed=0, max_steps=8).step(2)[0]
    assert third is not None
    [bad] = rows[third.row][0].documents
    made[made.index(bad)] = Document(bad.where, (token, *bad.ids[1:]), bad.trained)
    fields = work.settings(run={"steps": 8, "save_every": 1, "keep": 9})
    with pytest.raises(Failed) as failed:
        two.run(work.poisoned, base, fields, dataset(made), token, tmp_path)
    assert failed.value.kinds == ["JobError"] * 2
    first, second = failed.value.words
    assert first == second
    assert bad.where + "," in first + "," or bad.where + ";" in first
    assert "on rank " in first
    assert first.startswith("step 3: ")
    saved = sorted(path.name for path in tmp_path.iterdir())
    assert saved == ["step-00000001", "step-00000002"]  # what was fine, and nothing after it


def test_tc26_another_number_format_than_asked_is_refused(one: Ranks, base: Path) -> None:
    with pytest.raises(Failed) as failed:
        one.run(work.wrong_dtype, base, work.settings(), dataset(documents(8)))
    assert failed.value.kinds == ["JobError"]
    assert "'dtype': 'float32'" in failed.value.words[0]
