"""The memory that `--dry-run` tells, against peaks of resident memory that runs have shown."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.library.manifest import Architecture
from train_jobs.config import FinetuneConfig
from train_jobs.data.dataset import Dataset
from train_jobs.data.example import Document, Example
from train_jobs.estimate import of_rank

GIB = 1 << 30
SMOLLM2 = Architecture(
    model_type="llama", parameters=134_515_008, layers=30, hidden=576, heads=9, kv_heads=3,
    head_dim=64, vocab_size=49152, tied_embeddings=True,
)  # fmt: skip
ROW = tuple(
    Example((Document(f"demo.jsonl:{n}", (0,) * 49, (False,) * 33 + (True,) * 16),))
    for n in range(10)
)
DEMO = Dataset((ROW,) * 35, 512, 0, "0" * 64)
ADDED = 4_884_480


def estimate(added: int | None = None, dtype: str = "float32", **changes: Any) -> dict[str, int]:
    fields: dict[str, Any] = {
        "model": "smollm2@1",
        "data": {"train": "/demo.jsonl"},
        "adapter": {"kind": "lora"} if added else None,
        "batch": {"micro": 1, "total": 4},
        "run": {"workers": 2, "epochs": 1},
    }
    config = FinetuneConfig.model_validate(fields | changes)
    return of_rank(config, SMOLLM2, DEMO, dtype, added)


@pytest.mark.parametrize(
    ("changes", "seen_gib"),
    [
        ({"zero": 0}, 3.9),
        ({"zero": 2}, 4.2),
        ({"zero": 2, "batch": {"micro": 2, "total": 4}}, 4.85),
        ({"zero": 3}, 4.25),
    ],
)
def test_tc32_the_estimate_is_near_what_two_ranks_took(
    changes: dict[str, Any], seen_gib: float
) -> None:
    told = sum(estimate(**changes).values()) / GIB
    assert told == pytest.approx(seen_gib, rel=0.1)


def test_tc32_an_adapter_needs_a_fraction_of_the_optimiser() -> None:
    full, adapter = estimate(), estimate(ADDED)
    assert sum(adapter.values()) / GIB == pytest.approx(2.25, rel=0.1)  # seen
    assert adapter["optimiser"] < 0.05 * full["optimiser"]
    assert adapter["weights"] == full["weights"] + 4 * ADDED
    assert sum(adapter.values()) < 0.7 * sum(full.values())


def test_tc32_stages_and_ranks_divide_what_they_say() -> None:
    run = {"workers": 4, "epochs": 1}
    one, four = estimate(zero=2, run={"workers": 1, "epochs": 1}), estimate(zero=2, run=run)
    assert four["optimiser"] * 4 == pytest.approx(one["optimiser"])
    assert four["weights"] == one["weights"]
    assert estimate(zero=0, run=run)["optimiser"] == 8 * 134_515_008
    assert estimate(zero=1, run=run)["gradients"] < estimate(zero=2, run=run)["gradients"]


def test_tc32_bfloat16_has_a_master_copy_and_half_the_weights() -> None:
    plain, half = estimate(zero=0), estimate(zero=0, dtype="bfloat16")
    assert half["weights"] * 2 == plain["weights"]
    assert half["optimiser"] == plain["optimiser"] + 4 * 134_515_008


def test_a_base_of_unknown_size_is_not_guessed() -> None:
    config = FinetuneConfig.model_validate(
        {"model": "x", "data": {"train": "/x"}, "run": {"epochs": 1}}
    )
    assert of_rank(config, Architecture(model_type="x"), DEMO, "float32") == {}
