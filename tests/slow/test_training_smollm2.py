"""What holds for tiny models holds for SmolLM2: stages, ranks, resuming, export, learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.text.chat import ChatText
from tests.parity import training_work as work
from tests.parity.training_fixtures import Ranks
from tests.slow import work as slow
from tests.slow.conftest import ANSWER_S
from train_jobs.data.dataset import Dataset, load_datasets
from train_jobs.data.settings import Data
from train_jobs.objectives.settings import ChatSFT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
DEMO = Path(__file__).resolve().parents[2] / "train_jobs/data/demo/train.jsonl"
STEPS = 4


@pytest.fixture(scope="module")
def data(smollm2: Path) -> Dataset:
    """The demo's dialogues, in short rows."""
    assert ChatText.load(smollm2).has_template
    settings = Data.model_validate({"train": str(DEMO), "max_len": 128})
    return load_datasets(settings, ChatSFT(), smollm2)[0]


def settings(**changes: Any) -> dict[str, Any]:
    usual = {"optim": {"lr": 1e-4}, "batch": {"micro": 1, "total": 2}, "run": {"steps": STEPS}}
    fields = {key: value | changes.pop(key, {}) for key, value in usual.items()}
    return work.settings(data={"max_len": 128}, **fields, **changes)


@pytest.fixture(scope="module")
def reference(smollm2: Path, data: Dataset) -> dict[str, Any]:
    """One process, no stage; it ends before the others begin."""
    one = Ranks(1, ANSWER_S)
    try:
        [outcome] = one.run(slow.losses, smollm2, settings(zero=0), data)
    finally:
        one.close()
    return outcome


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_tc02_tc04_every_stage_on_two_ranks_learns_what_one_process_learns(
    two: Ranks, smollm2: Path, data: Dataset, reference: dict[str, Any], zero: int
) -> None:
    outcome = two.run(slow.losses, smollm2, settings(zero=zero), data)[0]
    np.testing.assert_allclose(outcome["loss"], reference["loss"], rtol=1e-5)
    np.testing.assert_allclose(outcome["norm"], reference["norm"], rtol=1e-4)


@pytest.mark.parametrize("adapter", [None, {"kind": "lora", "r": 8, "dropout": 0.1}])
def test_tc07_a_run_that_goes_on_ends_with_the_same_weights_to_the_bit(
    two: Ranks, smollm2: Path, data: Dataset, tmp_path: Path, adapter: Any
) -> None:
    fields = settings(adapter=adapter, run={"save_every": 2})
    outcome = two.run(slow.resumed, smollm2, fields, data, tmp_path, 2)[0]
    assert outcome["again"] == outcome["whole"]


@pytest.mark.parametrize("how", ["selective", "full"])
def test_activations_computed_again_give_the_same_losses(
    two: Ranks, smollm2: Path, data: Dataset, reference: dict[str, Any], how: str
) -> None:
    fields = settings(gradient_checkpointing=how)
    outcome = two.run(slow.losses, smollm2, fields, data)[0]
    np.testing.assert_allclose(outcome["loss"], reference["loss"], rtol=1e-5)


def test_tc25_eight_dialogues_are_learnt_by_heart(two: Ranks, smollm2: Path, data: Dataset) -> None:
    few = Dataset(tuple(data.rows[n] for n in range(4)), 128, 0, "0" * 64)
    fields = settings(batch={"micro": 1, "total": 4}, optim={"lr": 3e-4}, run={"steps": 20})
    assert two.run(slow.losses, smollm2, fields, few)[0]["loss"][-1] < 0.2
