"""What learns and what is computed again change memory and parameters, never the mathematics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.parity import training_work as work
from tests.parity.training_fixtures import Ranks, base, dataset, documents, one, two
from train_jobs.data.dataset import Dataset

pytestmark = pytest.mark.parity
__all__ = ["base", "one", "two"]
LAST = "model.layers.1.*"


@pytest.fixture(scope="module")
def data() -> Dataset:
    return dataset(documents(30))


@pytest.mark.parametrize(("zero", "how"), [(0, "selective"), (2, "full"), (3, "full")])
def test_activations_that_are_computed_again_give_the_same_curve(
    two: Ranks, base: Path, data: Dataset, zero: int, how: str
) -> None:
    short: dict[str, Any] = {"zero": zero, "run": {"steps": 4}}
    expected = two.run(work.curve, base, work.settings(**short), data)[0]
    fields = work.settings(**short, gradient_checkpointing=how)
    found = two.run(work.curve, base, fields, data)[0]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(found["norm"], expected["norm"], rtol=1e-5)


def test_what_is_computed_again_is_not_kept(base: Path) -> None:
    """Counted in bytes that autograd holds on to, for one forward pass."""
    from tests.parity.test_training_packing import load
    from train_jobs.adapters import recompute
    from train_jobs.objectives.packed import pack_documents

    batch = pack_documents(documents(8))
    held = {}
    for how in ("none", "selective", "full"):
        model = load(base).train()
        recompute(model, how)
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = model(**batch.inputs).logits.sum()
        held[how] = sum(seen.values())
        kept.backward()
    assert held["full"] < 0.7 * held["none"]
    assert held["full"] < held["none"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("zero", [0, 2])
def test_tc14_what_is_frozen_is_the_same_to_the_bit_and_the_rest_learns(
    two: Ranks, base: Path, data: Dataset, tmp_path: Path, zero: int
) -> None:
    adapter = {"kind": "freeze", "trainable": [LAST]}
    fields = work.settings(zero=zero, adapter=adapter, run={"steps": 4})
    outcome = two.run(work.exported, base, fields, data, tmp_path / "out")[0]
    old, new = tensors(base), tensors(tmp_path / "out")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if name.startswith(LAST.rstrip("*"))}
    assert outcome["record"]["trainable"] == sum(old[name].numel() for name in changed)


def test_tc07_a_run_with_frozen_parameters_goes_on_to_the_bit(
    two: Ranks, base: Path, data: Dataset, tmp_path: Path
) -> None:
    adapter = {"kind": "freeze", "trainable": [LAST]}
    fields = work.settings(adapter=adapter, run={"steps": 4, "save_every": 2})
    outcome = two.run(work.interrupted, base, fields, data, tmp_path, 2)[0]
    assert outcome["again"]["digest"] == outcome["whole"]["digest"]
    # the checkpoint holds what learns, and nothing that the library has already
    assert outcome["tensors"]
    assert all(name.startswith(LAST.rstrip("*")) for name in outcome["tensors"])


@pytest.mark.parametrize("more", [{"dora": True}, {"rslora": True}, {"targets": [LAST, "q_proj"]}])
def test_tc15_every_kind_of_addition_merges_into_what_was_live(
    two: Ranks, base: Path, data: Dataset, tmp_path: Path, more: dict[str, Any]
) -> None:
    from tests.parity.test_training_parity import assert_exported

    adapter = {"kind": "lora", "r": 4, "alpha": 8.0, **more}
    fields = work.settings(zero=2, adapter=adapter)
    outcome = two.run(work.exported, base, fields, data, tmp_path / "out")[0]
    assert_exported(base, tmp_path / "out", outcome["logits"])
    if "targets" in more:
        old, new = tensors(base), tensors(tmp_path / "out")
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        assert all("layers.1." in name or "q_proj" in name for name in changed)
        assert any("layers.0.self_attn.q_proj" in name for name in changed)


@pytest.mark.parametrize("zero", [2, 3])
def test_tc15_an_adapter_by_itself_is_served_as_it_was_live(
    two: Ranks, base: Path, data: Dataset, tmp_path: Path, zero: int
) -> None:
    from tests.parity.adapter_fixtures import with_adapter

    adapter = {"kind": "lora", "r": 4, "alpha": 8.0}
    publish = {"name": "mine", "merge": False}
    fields = work.settings(zero=zero, adapter=adapter, publish=publish, run={"steps": 4})
    outcome = two.run(work.exported, base, fields, data, tmp_path / "out")[0]
    told = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "base@1"
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        peft = with_adapter(base, tmp_path / "out")(input_ids=ids).logits.numpy()
    np.testing.assert_allclose(peft, outcome["logits"], atol=1e-5)
    assert any(t.abs().max() > 0 for n, t in tensors(tmp_path / "out").items() if "lora_B" in n)


def test_tc07_an_adapter_over_a_divided_base_goes_on_to_the_bit(
    two: Ranks, base: Path, data: Dataset, tmp_path: Path
) -> None:
    more: dict[str, Any] = {
        "zero": 3,
        "adapter": {"kind": "lora", "r": 4},
        "publish": {"name": "mine", "merge": False},
    }
    fields = work.settings(**more, run={"steps": 4, "save_every": 2})
    outcome = two.run(work.interrupted, base, fields, data, tmp_path, 2)[0]
    assert outcome["again"]["digest"] == outcome["whole"]["digest"]
