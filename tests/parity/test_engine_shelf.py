"""Weights that arrive in memory: the same model as from disk, while others load and compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import EngineError
from cluster.weights.files import holds, stored_tensors
from cluster.weights.layout import Piece, Tensor, array_of, hash_of, tensor_of
from serve_apps.engine.lora import read_parts
from serve_apps.engine.lora_files import WEIGHTS
from serve_apps.engine.model import LoadedModel, read_model
from serve_apps.engine.plan import Row, StepPlan
from tests.parity.adapter_fixtures import save_adapter
from tests.parity.engine_fixtures import greedy, prompts, run_local, save_tiny

pytestmark = pytest.mark.parity
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llama", "olmo2"])
def narrow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model stored in bfloat16; the kernels know llama, and not olmo2."""
    return narrowed(tmp_path_factory.mktemp("narrow"), request.param)


def narrowed(folder: Path, kind: str) -> Path:
    changes: dict[str, Any] = {"head_dim": 16} if kind == "llama" else {}
    directory = save_tiny(folder, kind, **changes)
    file = directory / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, {"format": "pt"})
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text(config.replace('"float32"', '"bfloat16"'))
    return directory


def on_shelf(directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors as they come off the shelf: read-only."""
    state = {}
    for name, dtype, array in stored_tensors(directory):
        array.flags.writeable = False
        state[name] = tensor_of(array, dtype)
    return state


def read(directory: Path, state: Any = None, dtype: torch.dtype = torch.float32) -> LoadedModel:
    model = read_model(str(directory), CPU, dtype, state=state)
    model.prepare()
    return model


def answers(model: LoadedModel) -> list[list[int]]:
    asked = [greedy(ids, 12, f"r{n}") for n, ids in enumerate(prompts(4))]
    return run_local(model, asked)


def test_files_give_the_tensors_that_safetensors_gives(narrow: Path) -> None:
    theirs = load_file(narrow / "model.safetensors")
    ours = on_shelf(narrow)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


def test_from_the_shelf_and_from_disk_it_is_the_same_model(narrow: Path) -> None:
    state = on_shelf(narrow)
    before = {name: hash_of(array_of(tensor)) for name, tensor in state.items()}
    assert answers(read(narrow, state)) == answers(read(narrow))
    after = {name: hash_of(array_of(tensor)) for name, tensor in state.items()}
    assert after == before, "what other processes map was written"


def test_weights_that_are_read_narrow_are_computed_with_as_if_they_were_wide(
    narrow: Path, tmp_path: Path
) -> None:
    """The same numbers in float32 files: nothing tells them apart."""
    for path in narrow.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "model.safetensors"
    save_file({k: v.float() for k, v in load_file(file).items()}, file, {"format": "pt"})
    wide = (tmp_path / "config.json").read_text().replace('"bfloat16"', '"float32"')
    (tmp_path / "config.json").write_text(wide)
    model = read(narrow)
    assert model.dtype == model.geometry.dtype == torch.float32
    assert answers(model) == answers(read(tmp_path))


@pytest.fixture
def another_default() -> Iterator[None]:
    """What transformers does to the whole process while it builds a model in bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_steps_go_on_while_another_version_is_read_in_another_dtype(
    narrow: Path, request: pytest.FixtureRequest
) -> None:
    """A buffer in the default dtype would be half as long as what the kernels write into it."""
    model = read(narrow)
    told = answers(model)
    request.getfixturevalue("another_default")
    assert answers(model) == told


def test_what_a_run_publishes_last_is_known_by_its_hashes_and_not_read_again(
    narrow: Path, tmp_path: Path
) -> None:
    contents = {
        name: Tensor(dtype, array.shape, (Piece(hash_of(array), array.nbytes),))
        for name, dtype, array in stored_tensors(narrow)
    }
    assert holds(narrow, contents)
    assert not holds(narrow, contents | {"more": next(iter(contents.values()))})
    for path in narrow.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "model.safetensors"
    save_file({k: -v for k, v in load_file(file).items()}, file, {"format": "pt"})
    assert not holds(tmp_path, contents)


def test_the_same_weights_again_answer_alike_and_have_adapters_of_their_own(
    tmp_path: Path,
) -> None:
    """Only for the kernels: adapters change transformers' own layers, which are read again."""
    llama = narrowed(tmp_path / "llama", "llama")
    model = read(llama)
    twin = model.again()
    assert twin.native is model.native, "no weight is held twice"
    told = answers(model)
    adapter = save_adapter(llama, tmp_path / "a", 1, r=4)
    twin.adapters.read("a@1", adapter, 64, twin.native)
    plan = StepPlan(0, "", (Row([0], 0, [3], 1, "a@1"),))
    assert twin.adapters.for_native(plan) is not None
    twin.adapters.drop("a@1")
    assert answers(twin) == answers(model) == told


@pytest.mark.parametrize("stored", [False, True], ids=["file", "shelf"])
def test_an_adapter_from_the_shelf_is_the_one_from_its_files_sc11(
    narrow: Path, tmp_path: Path, stored: bool
) -> None:
    model, folder = read(narrow), save_adapter(narrow, tmp_path / "a", 1, r=4)
    state = on_shelf(folder) if stored else None
    if stored:  # all that is brought beside the tensors
        (folder / WEIGHTS).unlink()
    parts = read_parts("a@1", folder, 64, state)
    again = read_parts("a@1", save_adapter(narrow, tmp_path / "b", 1, r=4), 64)
    assert parts.keys() == again.keys()
    assert all(torch.equal(parts[n].up, again[n].up) for n in parts)
    assert all(torch.equal(parts[n].down, again[n].down) for n in parts)
    assert model.adapters.read("a@1", folder, 64, model.native, state) > 0


def test_a_proven_shape_is_not_proven_again_but_broken_numbers_are_refused(narrow: Path) -> None:
    state = on_shelf(narrow)
    model = read_model(str(narrow), CPU, torch.float32, state=state)
    model.prepare(proven=True)
    name = next(name for name in state if "norm" in name or "ln_f" in name)
    broken = array_of(state[name]).copy()
    broken[:] = np.asarray(0x7FC0, broken.dtype)  # not a number, in bfloat16
    state[name] = tensor_of(broken, "bfloat16")
    model = read_model(str(narrow), CPU, torch.float32, state=state)
    with pytest.raises(EngineError, match="not finite numbers: these weights are broken"):
        model.prepare(proven=True)
