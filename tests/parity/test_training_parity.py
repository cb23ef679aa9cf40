"""Ranks, stages and accumulation are only bookkeeping: the curve is that of one process."""

from __future__ import annotations

import itertools
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
    assert_same_curve,
    base,
    dataset,
    documents,
    one,
    two,
)
from train_jobs.checkpoint import newest
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


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_tc03_every_parameter_gets_the_gradient_of_one_process(
    two: Ranks, one: Ranks, base: Path, data: Dataset, zero: int
) -> None:
    def fields(zero: int, micro: int) -> dict[str, Any]:
        return work.settings(zero=zero, batch={"micro": micro}, run={"steps": 1})

    [expected] = one.run(work.gradients, base, fields(0, 4), data)
    found = two.run(work.gradients, base, fields(zero, 1), data)[0]
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 1e-4, name
        np.testing.assert_allclose(found[name], gradient, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_an_engine_that_is_let_go_leaves_nothing(
    two: Ranks, base: Path, data: Dataset, zero: int
) -> None:
    fields = work.settings(zero=zero, run={"steps": 2})
    left = two.run(work.forgotten, base, fields, data)
    assert max(left) < 0.1, left


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


def test_tc04_rows_dealt_out_by_their_work_give_the_same_curve(
    two: Ranks, one: Ranks, base: Path
) -> None:
    few = dataset(documents(11))
    fields = work.settings(run={"steps": None, "epochs": 2})
    found = two.run(work.by_work, base, fields, few)[0]
    [expected] = one.run(work.curve, base, fields, few)
    assert_same_curve(found, expected)


ADAPTER = {"kind": "lora", "r": 4, "alpha": 8.0, "dropout": 0.1}
PLAIN = {**ADAPTER, "dropout": 0.0}
"""What a rank drops depends on its number."""


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


@pytest.mark.parametrize(
    ("zero", "adapter"), [(0, None), (1, None), (2, None), (3, None), (2, PLAIN), (0, PLAIN)]
)
def test_tc09_tc10_two_ranks_then_one_then_two_give_the_curve_of_two(
    two: Ranks, one: Ranks, base: Path, data: Dataset, tmp_path: Path, zero: int, adapter: Any
) -> None:
    fields = work.settings(zero=zero, adapter=adapter, run={"steps": 6}, batch={"total": 4})
    [whole, _] = two.run(work.curve, base, fields, data)
    args = base, fields, data, tmp_path
    legs = []
    for ranks, until in ((two, 2), (one, 4), (two, 6)):
        legs.append(ranks.run(work.leg, *args, until)[0])
        # what was converted is gone, and every rank has read it
        assert legs[-1]["left"] == ["checkpoints"]
    losses = [loss for found in legs for loss in found["loss"]]
    np.testing.assert_allclose(losses, whole["loss"], rtol=1e-5)
    for name, value in whole["parameters"].items():
        np.testing.assert_allclose(legs[-1]["parameters"][name], value, atol=2e-4, err_msg=name)
    for before, after in itertools.pairwise(legs):  # to the bit, moments too
        assert set(before["ended"]) == set(after["began"])
        assert any(name.endswith("exp_avg_sq") for name in before["ended"])
        for name, value in before["ended"].items():
            np.testing.assert_array_equal(after["began"][name], value, err_msg=name)


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


def test_tc30_looks_at_held_out_rows_during_training_change_nothing(
    two: Ranks, base: Path, data: Dataset, tmp_path: Path
) -> None:
    """And early stopping ends the run at a look, with its best step kept."""
    fields = work.settings(zero=3, run={"steps": 6})
    plain = two.run(work.curve, base, fields, data)[0]
    held = {"train": "/toy.jsonl", "heldout": "/toy.jsonl", "max_len": 64}
    looks = {"steps": 6, "evaluate_every": 2, "best": {"metric": "loss"}}
    looked = two.run(
        work.looked_at, base, work.settings(zero=3, data=held, run=looks), data, tmp_path
    )
    assert looked[0]["digest"] == looked[1]["digest"] == plain["digest"]
    assert looked[0]["loss"] == plain["loss"]
    seen = looked[0]["seen"]
    assert len(set(seen)) == 3
    best = 2 * (1 + seen.index(min(seen)))
    assert looked[0]["standing"].best == ((best, min(seen)),)
    assert best in looked[0]["saved"]
    looks["early_stop"] = {"patience": 1, "min_delta": 1e9}
    stopped = two.run(
        work.looked_at, base, work.settings(zero=3, data=held, run=looks), data, tmp_path
    )
    assert [found["steps"] for found in stopped] == [4, 4]
    assert stopped[0]["saved"][-1] == 4  # so that a resumed run knows it is over


def test_t42_a_rank_without_disk_ends_the_run_and_the_last_checkpoint_is_whole(
    two: Ranks, base: Path, data: Dataset, tmp_path: Path
) -> None:
    fields = work.settings(run={"steps": 6, "save_every": 2})
    with pytest.raises(Failed) as failed:
        two.run(work.disk_full, base, fields, data, tmp_path, 4)
    assert failed.value.kinds == ["JobError"] * 2
    first, second = failed.value.words
    assert first == second  # no rank is left waiting
    assert "the checkpoint of step 4 could not be written (rank 1: " in first
    assert "the one of step 2 is whole: make room, then `roundhouse train --resume " in first
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002"]
    assert newest(folder) == (folder / "step-00000002", [])


def test_t42_a_folder_that_cannot_be_made_ends_the_run_on_every_rank(
    two: Ranks, base: Path, data: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    fields = work.settings(run={"steps": 2, "save_every": 1})
    with pytest.raises(Failed) as failed:
        two.run(work.disk_full, base, fields, data, tmp_path, 9)
    assert failed.value.kinds == ["JobError"] * 2
    first, second = failed.value.words
    assert first == second
    assert "the checkpoint of step 1 could not be written (rank 0: " in first
    assert "Not a directory" in first


def test_checkpoints_are_sealed_while_the_next_step_runs(
    two: Ranks, base: Path, data: Dataset, tmp_path: Path
) -> None:
    fields = work.settings(run={"steps": 5, "save_every": 2})
    args = work.sealed_beside, base, fields, data
    zero, _ = two.run(*args, tmp_path / "whole", False)
    assert [one for one in zero["told"] if one != "checkpoint"] == [1, 2, 3, 4, 5]
    assert zero["told"].count("checkpoint") == 2
    assert zero["left"] == ["step-00000002", "step-00000004"]
    with pytest.raises(Failed) as failed:
        two.run(*args, tmp_path / "full", True)
    first, second = failed.value.words
    assert first == second
    assert "of step 2 could not be written (manifest.json: No space left on device" in first
    assert "there is none before" in first


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
