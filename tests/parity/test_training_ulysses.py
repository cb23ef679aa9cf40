"""Ranks that share a sequence compute what one process does with the whole of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity import objectives_work, training_work, ulysses_work
from tests.parity.engine_fixtures import save_tiny
from tests.parity.objective_data import in_rows, pairs
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
from train_jobs.data.dataset import Dataset
from train_jobs.objectives.packed import pack_documents, probe
from train_jobs.ulysses import Heads, Team, divide

pytestmark = pytest.mark.parity
__all__ = ["base", "one", "two"]

LORA = {"kind": "lora", "r": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["q_proj", "down_proj"]}


def fields(shared: int = 1, **changes: Any) -> dict[str, Any]:
    changes.setdefault("run", {"steps": 5})
    return training_work.settings(sequence_parallel=shared, **changes)


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Rows of several documents, of odd and even lengths."""
    made = dataset(documents(30))
    assert min(map(len, made.rows)) > 1
    assert {length % 2 for length in made.row_lengths} == {0, 1}
    return made


@pytest.fixture(scope="module")
def reference(one: Ranks, base: Path, data: Dataset) -> dict[str, Any]:
    [outcome] = one.run(ulysses_work.curve, base, fields(zero=0), data)
    assert len(set(outcome["loss"])) == 5
    return outcome


@pytest.mark.parametrize(
    ("zero", "micro", "how"),
    [(0, 1, "none"), (2, 2, "none"), (2, 1, "selective"), (3, 1, "none"), (3, 2, "full")],
)
def test_tc02_two_slices_give_the_curve_of_one_process(
    two: Ranks, base: Path, data: Dataset, reference: dict[str, Any], zero: int, micro: int,
    how: str,
) -> None:  # fmt: skip
    """Held-out figures and counted tokens, too: both ranks have them, and nothing counts twice."""
    some = fields(2, zero=zero, batch={"micro": micro}, gradient_checkpointing=how)
    first, second = two.run(ulysses_work.curve, base, some, data)
    assert_same_curve(first, reference, norm=1e-5)
    assert first["digest"] == second["digest"]
    for found in (first, second):
        assert found["counted"] == reference["counted"]
        assert found["heldout"] == pytest.approx(reference["heldout"], rel=1e-5)


@pytest.mark.parametrize("zero", [0, 2])
def test_tc14_an_adapter_learns_the_same_from_slices(
    two: Ranks, one: Ranks, base: Path, zero: int
) -> None:
    """With a common beginning, which only the first slice holds."""
    made = dataset(documents(24, prefix=11))
    [expected] = one.run(ulysses_work.curve, base, fields(zero=zero, adapter=LORA), made)
    found = two.run(ulysses_work.curve, base, fields(2, zero=zero, adapter=LORA), made)
    assert_same_curve(found[0], expected, norm=1e-5)


@pytest.mark.parametrize(("heads", "keys"), [(9, 3), (3, 1)])
def test_heads_that_do_not_divide(
    two: Ranks, one: Ranks, data: Dataset, tmp_path: Path, heads: int, keys: int
) -> None:
    odd = save_tiny(
        tmp_path / "odd",
        hidden_size=8 * heads,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        initializer_range=0.05,
    )
    [expected] = one.run(ulysses_work.curve, odd, fields(), data)
    assert_same_curve(two.run(ulysses_work.curve, odd, fields(2), data)[0], expected, norm=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "orpo", "simpo"])
def test_pairs_are_compared_over_all_slices(
    two: Ranks, one: Ranks, base: Path, tmp_path: Path, kind: str
) -> None:
    rows = in_rows(pairs(24))
    found = []
    for ranks, shared in ((one, 1), (two, 2)):
        some = fields(shared, objective={"kind": kind})
        folder = tmp_path / str(shared)
        folder.mkdir()
        found.append(ranks.run(objectives_work.trained, base, some, rows, folder)[0])
    expected, shared_out = found
    np.testing.assert_allclose(shared_out["loss"], expected["loss"], rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(shared_out["norm"], expected["norm"], rtol=2e-4)
    for ours, theirs in zip(shared_out["steps"], expected["steps"], strict=True):
        for name in [name for name in theirs if "/" in name]:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    for name, value in expected["after"].items():
        assert shared_out["after"][name] == pytest.approx(value, rel=1e-3, abs=2e-3), name


@pytest.mark.slow
def test_two_teams_of_two_with_a_short_last_step(one: Ranks, base: Path) -> None:
    few = dataset(documents(11))
    assert len(few.rows) % 4
    epoch = {"steps": None, "epochs": 1}
    [expected] = one.run(ulysses_work.curve, base, fields(run=epoch), few)
    four = Ranks(4)
    try:
        found = four.run(ulysses_work.curve, base, fields(2, run=epoch), few)
    finally:
        four.close()
    assert_same_curve(found[0], expected, norm=1e-5)
    assert len({outcome["digest"] for outcome in found}) == 1
    assert all(o["heldout"] == pytest.approx(expected["heldout"], rel=1e-5) for o in found)


def test_control_without_the_exchange_documents_lack_what_is_in_other_slices(
    two: Ranks, base: Path, data: Dataset, reference: dict[str, Any]
) -> None:
    found = two.run(ulysses_work.without_exchange, base, fields(2, zero=0), data)[0]
    apart = np.abs(np.array(found["loss"]) / np.array(reference["loss"]) - 1)
    assert apart.min() > 1e-4
    # and it would not have come so far: what a model makes of slices is proved when it is loaded
    with pytest.raises(Failed) as failed:
        two.run(ulysses_work.never_exchanging, base, fields(2), data)
    assert failed.value.kinds == ["ConfigError"] * 2
    assert "computes something else from slices" in failed.value.words[0]


def test_a_model_with_fewer_heads_than_ranks_is_refused(
    two: Ranks, data: Dataset, tmp_path: Path
) -> None:
    narrow = save_tiny(tmp_path / "narrow", num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(Failed) as failed:
        two.run(ulysses_work.curve, narrow, fields(2), data)
    assert failed.value.kinds == ["ConfigError"] * 2
    assert "this model has 1; use sequence_parallel: 1 or less" in failed.value.words[0]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("tokens", [2, 3, 4, 21])
def test_slices_are_equal_and_hold_every_token_and_target_once(size: int, tokens: int) -> None:
    made = documents(1, seed=tokens)[0]
    cut = type(made)(made.where, made.ids[:tokens], (True,) * len(made.ids[:tokens]))
    whole = pack_documents([cut])
    parts = [whole.slice_of(Team(rank, size, None)) for rank in range(size)]
    assert len({part.ids_1T.shape for part in parts}) == 1
    ids, positions = (
        torch.cat([getattr(part, name) for part in parts], dim=1)
        for name in ("ids_1T", "positions_1T")
    )
    length = whole.layout.tokens
    assert ids.shape[1] == parts[0].layout.tokens < length + size
    assert torch.equal(ids[:, :length], whole.ids_1T)
    assert torch.equal(positions[:, :length], whole.positions_1T)
    assert sum(part.weight for part in parts) == whole.weight
    told = [
        (int(part.ids_1T[0, at]), int(target))
        for part in parts
        for at, target in zip(part.predicts_K, part.targets_K, strict=True)
    ]
    assert told == list(zip(cut.ids, cut.ids[1:], strict=False))


def test_each_rank_gets_its_heads_and_the_keys_that_they_read() -> None:
    assert divide(4, 2, 2) == (
        Heads(slice(0, 2), slice(0, 1), None),
        Heads(slice(2, 4), slice(1, 2), None),
    )
    # SmolLM2's 9 heads over 3 keys: the second key goes to both ranks
    assert divide(9, 3, 2) == (
        Heads(slice(0, 4), slice(0, 2), (0, 0, 0, 1)),
        Heads(slice(4, 9), slice(1, 3), (0, 0, 1, 1, 1)),
    )
    assert divide(4, 1, 4)[3] == Heads(slice(3, 4), slice(0, 1), None)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8, 16, 64])
def test_the_proof_at_load_looks_at_every_slice(ranks: int) -> None:
    whole = pack_documents(probe(ranks, 400))
    slices = [whole.slice_of(Team(rank, ranks, None)) for rank in range(ranks)]
    assert all(len(part.targets_K) for part in slices)
    assert sum(part.ids_1T.shape[1] for part in slices) == whole.layout.tokens + 1
