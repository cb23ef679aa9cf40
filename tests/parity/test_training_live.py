"""Weights of a running job: what lies on the shelf is what an export would write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity import live_work
from tests.parity import training_work as work
from tests.parity.training_fixtures import Ranks, base, dataset, documents, two
from train_jobs.live import run_word

pytestmark = pytest.mark.parity
__all__ = ["base", "two"]
TOY = dataset(documents(12))
LORA = {"kind": "lora", "r": 4, "dropout": 0.0}


def settings(**changes: Any) -> dict[str, Any]:
    return work.settings(run={"steps": 2}, publish={"every": 2}, **changes)


@pytest.mark.parametrize(
    ("zero", "adapter"),
    [(0, None), (2, None), (3, None), (2, LORA), (3, LORA), (2, LORA | {"dora": True})],
    ids=["zero-0", "zero-2", "zero-3", "lora", "lora-zero-3", "dora"],
)
def test_the_shelf_has_what_an_export_would_write_each_rank_its_part(
    two: Ranks, base: Path, tmp_path: Path, zero: int, adapter: Any
) -> None:
    fields = settings(zero=zero, adapter=adapter)
    if zero == 3 and adapter:
        fields["publish"] |= {"merge": False, "name": "tiny-lora"}
    first, second = two.run(live_work.put_live, base, fields, TOY, tmp_path)
    assert first["ref"] == "tiny@run.demo-run-1.2"
    assert (first["base"], first["update"]) == ("tiny@1", "recompute")
    assert ("config.json" in first["files"]) == (adapter is None or "dora" in adapter)
    assert first["apart"] <= (1e-6 if adapter else 0.0)
    assert sorted(first["mine"] + second["mine"]) == first["names"], "each tensor once"
    assert abs(len(first["mine"]) - len(second["mine"])) <= 1, "and each rank half of them"


@pytest.mark.parametrize("zero", [2, 3])
def test_a_shelf_that_is_full_on_one_node_stops_nobody(
    two: Ranks, base: Path, tmp_path: Path, zero: int
) -> None:
    said = two.run(live_work.put_too_much, base, settings(zero=zero), TOY, tmp_path)
    assert len(set(said)) == 1, "every rank has the same reason"
    assert said[0].endswith("could not be put on the shelf: node-1 is full")
    assert not (tmp_path / "bundle").exists()
    assert len(list(tmp_path.glob("abandoned-*"))) == 2


def test_a_run_has_a_word_that_a_reference_may_contain() -> None:
    assert run_word("demo_SFT-20261122-0101-ab12") == "demo-sft-20261122-0101-ab12"
    assert run_word("x" * 60 + "-20261122") == ("x" * 60 + "-20261122")[-48:]
