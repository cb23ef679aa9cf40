"""Our tokens are the model's own: against transformers, alone and in a batch, in any chunks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import EngineError, NotEnough
from serve_apps.engine import attention
from serve_apps.engine.interface import EngineRequest, Sampling
from serve_apps.engine.kv_cache import Geometry, KVCache, fit_blocks
from serve_apps.engine.model import LoadedModel
from serve_apps.engine.plan import Row, StepPlan
from tests.parity.engine_fixtures import (
    Reference,
    compare,
    greedy,
    local_model,
    prompts,
    reference,
    run_local,
    save_tiny,
)

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def model(tiny: Path) -> LoadedModel:
    return local_model(tiny)


def test_smollm2_answers_like_transformers_sc01(
    smollm2: Path, smollm2_reference: Reference
) -> None:
    texts, theirs = smollm2_reference
    requests = [greedy(p, 64, f"r{i}") for i, p in enumerate(texts)]
    compare(run_local(local_model(smollm2), requests, blocks=200, running=20, budget=128), theirs)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("mistral", {"sliding_window": 9}),
        ("gpt2", {"num_key_value_heads": 4}),
        (
            "gemma3_text",
            {
                "head_dim": 16,
                "sliding_window": 9,
                "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
            },
        ),
    ],
    ids=["llama", "llama-mha-tied", "qwen2", "qwen3", "mistral-window", "gpt2", "gemma3-window"],
)
def test_tiny_models_answer_like_transformers_sc01(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    directory = save_tiny(tmp_path, model_type, **changes)
    texts = prompts(9)
    requests = [greedy(p, 64, f"r{i}") for i, p in enumerate(texts)]
    compare(run_local(local_model(directory), requests, budget=16), reference(directory, texts, 64))


@pytest.mark.parametrize(
    ("model_type", "why"),
    [("bloom", "takes no position_ids"), ("gptj", "called"), ("falcon", "called")],
)
def test_a_model_that_ignores_our_attention_is_refused_by_name(
    model_type: str, why: str, tmp_path: Path
) -> None:
    changes = {"rotary_dim": 8} if model_type == "gptj" else {}
    directory = save_tiny(tmp_path, model_type, **changes)
    with pytest.raises(EngineError, match=f"'{model_type}'.*{why}"):
        local_model(directory)


def test_a_model_that_would_answer_differently_is_refused(tiny: Path, monkeypatch: Any) -> None:
    honest = attention.attend

    def wrong(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return honest(module, query * 1.1, *args, **kwargs)

    monkeypatch.setattr(attention, "attend", wrong)
    monkeypatch.setattr(LoadedModel, "_kernels", lambda self: None)
    try:
        with pytest.raises(EngineError, match="logits differ"):
            local_model(tiny)
    finally:
        monkeypatch.undo()
        attention.register()


def test_a_directory_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"config\.json"):
        local_model(tmp_path)


@pytest.mark.parametrize("budget", [1, 8, 64, 4096])
def test_any_chunking_gives_the_same_ids_sc05(budget: int, model: LoadedModel) -> None:
    texts = prompts(6, seed=5, longest=200)
    requests = [greedy(p, 24, f"r{i}") for i, p in enumerate(texts)]
    assert run_local(model, requests, budget=budget, blocks=99) == [
        run_local(model, [r], budget=4096)[0] for r in requests
    ]


def test_alone_or_among_fifteen_others_sc07(model: LoadedModel) -> None:
    requests = [greedy(p, 48, f"r{i}") for i, p in enumerate(prompts(16, seed=7, longest=90))]
    alone = {r.request_id: run_local(model, [r])[0] for r in requests}
    for order in (1, 2):
        random.Random(order).shuffle(requests)
        together = run_local(model, requests, running=16 // order, blocks=160)
        assert together == [alone[r.request_id] for r in requests]


def test_neighbours_that_come_and_go_leave_no_trace(model: LoadedModel) -> None:
    """Answers of different length empty slots in the middle of a batched run; others move in."""
    lengths = [3, 40, 9, 33, 21, 5, 60, 14, 2, 28]
    requests = [
        greedy(p, n, f"r{i}") for i, (p, n) in enumerate(zip(prompts(10), lengths, strict=True))
    ]
    together = run_local(model, requests, running=5, budget=12)
    assert together == [run_local(model, [r])[0] for r in requests]


def test_seeds_decide_and_the_batch_does_not_sc14(model: LoadedModel) -> None:
    def ask(i: int, seed: int) -> EngineRequest:
        return EngineRequest(f"r{i}", (5, 6, 7), 32, Sampling(1.0, 0.95, 50, seed))

    torch.manual_seed(3)
    state = torch.get_rng_state()
    alone = run_local(model, [ask(0, 11)])[0]
    batch = run_local(model, [ask(i, 11 if i in (2, 9) else 100 + i) for i in range(12)])
    assert batch[2] == batch[9] == alone == run_local(model, [ask(0, 11)])[0]
    assert len({tuple(answer) for answer in batch}) == 11
    assert torch.equal(torch.get_rng_state(), state)


def test_attention_cost_follows_each_requests_own_length() -> None:
    """A short request beside a long one reads its own keys, not the long one's length."""
    cache = KVCache(Geometry(1, 2, 8, torch.float32), 100, torch.device("cpu"))
    long = Row(range(50), 790, [1], 1)
    short = [Row([50 + i], i, [1], 1) for i in range(4)]
    chunk = Row(range(60, 70), 100, [1] * 40, 0)
    plan = attention.plan(StepPlan(1, "", (short[0], long, *short[1:], chunk)), cache)
    laid_out = plan.for_torch
    tokens = [(g.tokens_R.tolist(), g.mask_RK.shape[1]) for g in laid_out.groups(None)]
    assert tokens == [([1], 50 * 16), ([0, 2, 3, 4], 16)]
    assert [g.mask_RK.shape[1] for g in laid_out.groups(32)] == [3 * 16, 16]
    assert len(laid_out.reads(laid_out.alone[0], None)) == 9 * 2, "its own blocks, two heads"
    assert len(laid_out.reads(laid_out.alone[0], 8)) == 4 * 2, "the window's"


def test_a_cache_that_does_not_fit_is_lowered_or_refused_sc33() -> None:
    geometry = Geometry(layers=2, kv_heads=2, head_dim=8, dtype=torch.float32)
    block = geometry.block_bytes
    assert fit_blocks(geometry, 100, 8, None, free=10**9) == 8 * 7
    assert fit_blocks(geometry, 100, 8, 350, free=10**9) == 22
    assert fit_blocks(geometry, 100, 8, 100, free=10**9) == 7
    assert fit_blocks(geometry, 100, 8, None, free=25 * block) == 20
    with pytest.raises(NotEnough, match="max_model_len=100 needs 112 tokens"):
        fit_blocks(geometry, 100, 8, None, free=8 * block)
    with pytest.raises(NotEnough, match="cache_tokens"):
        fit_blocks(geometry, 100, 8, 800, free=50 * block)
