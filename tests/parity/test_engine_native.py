"""The native kernels: the same numbers as torch, and the same bits whatever the batch."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import EngineError
from serve_apps.engine import attention, packing
from serve_apps.engine.kv_cache import KVCache
from serve_apps.engine.model import LoadedModel, load_model
from serve_apps.engine.native import build, layout
from serve_apps.engine.plan import Row, StepPlan
from tests.parity.engine_fixtures import (
    compare,
    greedy,
    local_model,
    prompts,
    reference,
    run_local,
    save_tiny,
)

pytestmark = pytest.mark.parity
CPU = torch.device("cpu")
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"head_dim": 16}),
    ("llama", {"head_dim": 48, "num_key_value_heads": 4, "attention_bias": True}),
    ("llama", {"head_dim": 16, "vocab_size": 121, "hidden_act": "gelu_pytorch_tanh"}),
    ("mistral", {"head_dim": 16, "sliding_window": 9, "num_attention_heads": 6}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 32}),
]
NAMES = ["llama", "llama-bias-48", "llama-gelu-odd-vocab", "mistral-window", "qwen2", "qwen3"]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    built = build.library()
    assert built is not None, "this machine has a compiler; the log above says what it refused"
    return built


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def linear(
    library: ctypes.CDLL, weight: torch.Tensor, x: torch.Tensor, quantization: Any = "none"
) -> torch.Tensor:
    made = torch.nn.Linear(weight.shape[1], weight.shape[0])
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    return packing.NativeLinear(made.requires_grad_(False), library, quantization)(x) - made.bias


def test_python_and_the_kernels_describe_the_same_structures(library: ctypes.CDLL) -> None:
    assert layout.agree(library)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 12, 13, 29, 64])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 1), (17, 33), (200, 64), (31, 100)])
def test_products_equal_torchs(
    library: ctypes.CDLL, threads: int, rows: int, outputs: int, inputs: int
) -> None:
    weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs)
    exact = (x.double() @ weight.double().T).float()
    assert torch.allclose(linear(library, weight, x), exact, rtol=1e-4, atol=1e-4)
    narrow = weight.bfloat16()
    exact = (x.double() @ narrow.double().T).float()
    assert torch.allclose(linear(library, narrow, x), exact, rtol=1e-4, atol=1e-4)
    values, scale = layout.quantized(weight)
    exact = (x.double() @ (values.double() * scale.double()[:, None]).T).float()
    assert torch.allclose(linear(library, weight, x, "int8"), exact, rtol=1e-4, atol=1e-4)


def test_int8_errs_by_half_a_step_at_most() -> None:
    weight = torch.randn(64, 200) * torch.logspace(-3, 3, 64)[:, None]
    values, scale = layout.quantized(weight)
    assert ((values * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    again, _ = layout.quantized(values * scale[:, None])
    assert torch.equal(again, values), "what was rounded once stays as it is"


def test_a_checkpoint_in_bfloat16_is_kept_narrow_and_loses_nothing() -> None:
    weight = torch.randn(32, 32).bfloat16().float()
    assert layout.narrowed(weight).dtype == torch.bfloat16
    assert torch.equal(layout.narrowed(weight).float(), weight)
    weight[3, 3] += 1e-5
    assert layout.narrowed(weight).dtype == torch.float32


@pytest.mark.parametrize(("model_type", "changes"), FAMILIES, ids=NAMES)
def test_families_answer_like_transformers_sc01(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    directory = save_tiny(tmp_path, model_type, **changes)
    model = local_model(directory)
    assert model.native is not None, "this path is what is tested here"
    texts = prompts(9, vocab=120)
    requests = [greedy(p, 64, f"r{i}") for i, p in enumerate(texts)]
    compare(run_local(model, requests, budget=16), reference(directory, texts, 64))


def logits_of(model: LoadedModel, chunks: list[tuple[Row, ...]]) -> list[torch.Tensor]:
    cache = KVCache(model.geometry, 64, CPU)
    for layer in cache.layers:  # what an earlier owner left, at its worst
        for part in layer:
            part.fill_(float("nan"))
    out = []
    for n, rows in enumerate(chunks):
        plan = StepPlan(n, "", rows)
        out.append(model.forward(plan, attention.plan(plan, cache)))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_batch_the_chunks_and_the_threads_change_no_bit_sc07_sc05(
    dtype: torch.dtype, quantization: Any, threads: int, tmp_path: Path
) -> None:
    directory = save_tiny(tmp_path, "mistral", head_dim=16, sliding_window=40)
    model = load_model(str(directory), CPU, dtype, quantization)
    ids = prompts(1, longest=100, seed=3)[0] * 100
    ids = ids[:100] if len(ids) >= 100 else (ids * 100)[:100]
    blocks, other = [5, 9, 2, 30, 31, 8, 7], [40, 41, 42, 43, 44, 45, 46]
    whole = logits_of(model, [(Row(blocks, 0, ids, 100),)])[0]
    cuts = [0, 1, 18, 50, 51, 99, 100]
    parts = logits_of(
        model, [(Row(blocks, a, ids[a:b], b - a),) for a, b in zip(cuts, cuts[1:], strict=False)]
    )
    assert torch.equal(torch.cat(parts), whole)
    beside = logits_of(
        model,
        [
            (Row(other, 0, ids[::-1][:33], 0), Row(blocks, 0, ids[:60], 60)),
            (
                Row(other, 33, [7], 1),
                *(Row([50 + i], 0, [i], 1) for i in range(9)),
                Row(blocks, 60, ids[60:], 40),
            ),
        ],
    )
    assert torch.equal(torch.cat([beside[0], beside[1][10:]]), whole)


def test_what_another_request_left_in_a_block_is_never_read(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "llama", head_dim=16)
    model = local_model(directory)
    (logits,) = logits_of(model, [(Row([3, 1], 0, list(range(3, 20)), 17),)])
    assert torch.isfinite(logits).all()


def test_quantization_needs_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_tiny(tmp_path, "llama")
    monkeypatch.setattr(build, "library", lambda: None)
    assert local_model(directory).native is None
    with pytest.raises(EngineError, match=r"int8.*g\+\+"):
        load_model(str(directory), CPU, torch.float32, "int8")


def test_other_models_are_packed_layer_by_layer(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "phi3", head_dim=16)
    model = load_model(str(directory), CPU, torch.float32, "int8")
    assert model.native is None
    kinds = {type(m) for m in model._module.modules()}
    assert packing.NativeLinear in kinds
    assert torch.nn.Linear not in kinds


def test_without_a_compiler_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.library.__wrapped__() is None
    assert "apt install g++" in caplog.text


def test_a_compiler_that_fails_is_told_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    broken = tmp_path / "cxx"
    broken.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'x: error: of ours' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(broken))
    assert build.library.__wrapped__() is None
    assert "of ours" in caplog.text
    assert {p.name for p in build.cache_directory().iterdir()} == {"lock"}


def test_a_directory_that_others_may_write_to_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = build.cache_directory()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    os.chmod(path, 0o770)
    with pytest.raises(EngineError, match="writable by others"):
        build.cache_directory()
