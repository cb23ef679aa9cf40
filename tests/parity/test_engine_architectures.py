"""Each architecture of the table answers like transformers, to the token and the logarithm."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import EngineError
from serve_apps.engine.interface import EngineRequest, Logprob, Sampling
from serve_apps.engine.sharded import ShardedEngine
from tests.parity.architectures import EXPERTS, GATHERED, NO_PLAN, REFUSED, SERVED, Architecture
from tests.parity.engine_fixtures import (
    Answered,
    LocalRank,
    compare,
    greedy,
    local_model,
    opened,
    prompts,
    reference,
    save_tiny,
    tiny_config,
)
from tests.unit.engine_contract import LoopThread, answer

pytestmark = pytest.mark.parity
TOP = 5
REASONS = {
    NO_PLAN: "has no tensor-parallel plan",
    GATHERED: "the tensor-parallel plan cuts .*(rowwise_split_input|projections)",
    EXPERTS: "the tensor-parallel plan cuts .*experts",
}
SCORED = Sampling(temperature=0.0, logprobs=TOP, prompt_logprobs=TOP)


@pytest.mark.parametrize("kind", SERVED, ids=lambda kind: kind.model_type)
def test_tokens_and_logprobs_are_those_of_transformers_sc01_sc17(
    kind: Architecture, tmp_path: Path
) -> None:
    directory = save_tiny(tmp_path, kind.model_type, **kind.changes)
    texts = prompts(4)
    requests = [EngineRequest(f"r{i}", tuple(p), 64, SCORED) for i, p in enumerate(texts)]
    answers = LocalRank(local_model(directory), budget=16).run(requests)
    compare([a.ids for a in answers], reference(directory, texts, 64))
    check_logprobs(directory, texts, answers)


def check_logprobs(
    directory: Path, texts: Sequence[Sequence[int]], answers: Sequence[Answered]
) -> None:
    """Hold all that was reported to a plain forward pass over prompt and answer."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation="eager",
    ).eval()
    for prompt, got in zip(texts, answers, strict=True):
        ids = [*prompt, *got.ids]
        with torch.inference_mode():
            logits = module(torch.tensor([ids]), use_cache=False).logits[0]
        logs_TV = torch.log_softmax(logits, -1)
        assert got.prompt is not None
        reported: list[Logprob] = [*got.prompt.logprobs, *got.logprobs]
        assert [one.token_id for one in reported] == ids[1:]
        chosen = logs_TV[range(len(ids) - 1), ids[1:]]
        best = logs_TV[:-1].topk(TOP).values
        torch.testing.assert_close(
            torch.tensor([one.logprob for one in reported]), chosen, atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            torch.tensor([[value for _, value in one.top] for one in reported]),
            best,
            atol=1e-4,
            rtol=0,
        )


@pytest.mark.parametrize(
    ("model_type", "why", "changes"),
    [(kind, why, changes) for kind, _, why, changes in REFUSED],
    ids=[row[0] for row in REFUSED],
)
def test_what_would_answer_wrongly_is_refused_with_the_reason(
    model_type: str, why: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    directory = save_tiny(tmp_path, model_type, **changes)
    with pytest.raises(EngineError) as caught:
        local_model(directory)
    assert f"model type '{model_type}'" in str(caught.value)
    assert why in str(caught.value)


@pytest.mark.parametrize("kind", SERVED, ids=lambda kind: kind.model_type)
def test_the_table_says_what_each_plan_allows(kind: Architecture) -> None:
    from transformers import AutoConfig

    plan = AutoConfig.for_model(kind.model_type).base_model_tp_plan
    styles = set((plan or {}).values())
    if not plan:
        why = NO_PLAN
    elif "moe_tp_experts" in styles:
        why = EXPERTS
    else:
        why = GATHERED if "rowwise_split_input" in styles else ""
    assert kind.one_rank == why


def test_two_ranks_answer_like_one_or_refuse_as_the_table_says_sc02(
    loop: LoopThread, tmp_path: Path
) -> None:
    texts = prompts(3)
    found = dict[str, str]()

    async def one(engine: ShardedEngine, kind: Architecture) -> None:
        place = tmp_path / kind.model_type
        save_tiny(place, kind.model_type, **kind.changes)
        version = f"{kind.model_type}@1"
        if kind.one_rank:
            with pytest.raises(EngineError, match=REASONS[kind.one_rank]):
                await engine.load(version, str(place))
            return
        await engine.load(version, str(place))
        requests = [greedy(p, 24, f"{version}{i}") for i, p in enumerate(texts)]
        ours = list(await asyncio.gather(*(answer(engine, r, version) for r in requests)))
        compare(ours, reference(place, texts, 24))
        await engine.release(version, 1.0)

    async def run() -> None:
        engine = await opened(tiny_config(tensor_parallel=2))
        try:
            for kind in SERVED:
                try:
                    await one(engine, kind)
                except (AssertionError, EngineError, pytest.fail.Exception) as error:
                    found[kind.model_type] = str(error)
        finally:
            await engine.stop()

    loop.run(run(), timeout_s=240)
    assert not found, "\n".join(f"{kind}: {why}" for kind, why in found.items())


def test_longrope_is_served_up_to_where_it_would_turn_all_rows(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    }
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 96}
    directory = save_tiny(tmp_path, "phi3", **changes)
    model = local_model(directory)
    assert model.context == 96
    texts = prompts(3)
    answers = LocalRank(model).run([greedy(p, 64, f"r{i}") for i, p in enumerate(texts)])
    compare([a.ids for a in answers], reference(directory, texts, 64))
