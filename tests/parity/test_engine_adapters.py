"""Adapters in one batch with their base: each answers what peft's own model answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import EngineError, RequestError
from serve_apps.engine import attention, paging
from serve_apps.engine.blocks import root
from serve_apps.engine.kv_cache import KVCache
from serve_apps.engine.model import LoadedModel, load_model
from serve_apps.engine.plan import BLOCK, Row, StepPlan
from serve_apps.engine.sharded import ShardedEngine
from tests.parity.adapter_fixtures import ALL, continued, plain, save_adapter, with_adapter
from tests.parity.engine_fixtures import (
    LocalRank,
    compare,
    greedy,
    local_model,
    opened,
    prompts,
    save_tiny,
    tiny_config,
)
from tests.unit.engine_contract import LoopThread, answer

pytestmark = pytest.mark.parity
GPT2 = ["c_attn", "c_proj", "c_fc"]
ARCHITECTURES: list[tuple[str, dict[str, Any], list[str], bool]] = [
    ("llama", {"head_dim": 16}, ALL, True),
    ("qwen3", {"head_dim": 32, "hidden_size": 72}, ALL, True),
    ("gemma2", {"head_dim": 16, "tie_word_embeddings": False}, ALL, False),
    ("gpt2", {"num_key_value_heads": 4}, GPT2, False),
]
NAMES = ["", "a@1", "b@1", "c@1"]
"""The base, and three adapters of it."""


def three(base: Path, directory: Path, targets: list[str] = ALL) -> dict[str, Path | None]:
    """Three adapters that differ in rank, layers, scale and number format; and none."""
    a = save_adapter(base, directory / "a", 1, r=4, target_modules=targets)
    b = save_adapter(base, directory / "b", 2, r=24, target_modules=targets[1:], use_rslora=True)
    c = save_adapter(
        base,
        directory / "c",
        3,
        target_modules=targets,
        rank_pattern={targets[0]: 3},
        alpha_pattern={targets[-1]: 5},
        layers_to_transform=[0, 2],
    )
    stored = load_file(c / "adapter_model.safetensors")
    narrow = {name: tensor.bfloat16() for name, tensor in stored.items()}
    save_file(narrow, c / "adapter_model.safetensors")
    return {"": None, "a@1": a, "b@1": b, "c@1": c}


def adapted_model(base: Path, adapters: dict[str, Path | None]) -> LoadedModel:
    model = local_model(base)
    for name, directory in adapters.items():
        if directory is not None:
            assert model.adapters.read(name, directory, 64, model.native) > 0
    return model


@pytest.mark.parametrize(
    ("model_type", "changes", "targets", "native"),
    ARCHITECTURES,
    ids=[one[0] for one in ARCHITECTURES],
)
def test_three_adapters_and_their_base_in_one_batch_equal_peft_sc11(
    model_type: str, changes: dict[str, Any], targets: list[str], native: bool, tmp_path: Path
) -> None:
    base = save_tiny(tmp_path / "base", model_type, **changes)
    adapters = three(base, tmp_path, targets)
    model = adapted_model(base, adapters)
    assert (model.native is not None) == native, "both ways are tested here"
    rank = LocalRank(model, blocks=200, budget=48)
    texts = prompts(4)
    for name in NAMES:
        for i, text in enumerate(texts):
            rank.add(greedy(text, 16, f"{name}/{i}"), adapter=name)
    rank.run()
    said = {}
    for name in NAMES:
        said[name] = [rank.answers[f"{name}/{i}"].ids for i in range(len(texts))]
        compare(said[name], continued(with_adapter(base, adapters[name]), texts, 16))
    assert len({str(ids) for ids in said.values()}) == len(NAMES), "they do say different things"


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_logits_are_pefts_and_the_batch_changes_no_bit_of_them_sc11_sc07(
    quantization: Any, tmp_path: Path
) -> None:
    base = save_tiny(tmp_path / "base", head_dim=16)
    adapters = three(base, tmp_path)
    model = load_model(str(base), torch.device("cpu"), torch.float32, quantization)
    for name, directory in adapters.items():
        if directory is not None:
            model.adapters.read(name, directory, 64, model.native)
    texts = prompts(8, seed=5)
    rows = [
        Row(range(4 * i, 4 * i + 4), 0, text, len(text), NAMES[i % 4])
        for i, text in enumerate(texts)
    ]
    together = torch.split(step(model, rows), [len(text) for text in texts])
    for row, logits in zip(rows, together, strict=True):
        assert torch.equal(step(model, [row]), logits), row.adapter
        if quantization == "none":
            peft = with_adapter(base, adapters[row.adapter])
            with torch.inference_mode():
                theirs = peft(input_ids=torch.tensor([row.ids])).logits[0]
            assert torch.allclose(logits, theirs, rtol=1e-4, atol=1e-4)


def step(model: LoadedModel, rows: list[Row]) -> torch.Tensor:
    cache = KVCache(model.geometry, 64, torch.device("cpu"))
    plan = StepPlan(1, "", tuple(rows))
    return model.forward(plan, attention.plan(plan, cache))


def test_a_prefix_is_never_shared_between_adapters_and_a_swap_clears_its_own_sc11(
    tiny: Path, tmp_path: Path
) -> None:
    adapters = three(tiny, tmp_path)
    rank = LocalRank(adapted_model(tiny, adapters), blocks=64)
    text = prompts(1, seed=7)[0] * 40
    cached = len(text) // BLOCK * BLOCK

    def hits(name: str, tag: str) -> int:
        (told,) = rank.run([greedy(text, 1, f"{name}-{tag}")], adapter=name)
        assert told.prompt is not None
        return told.prompt.cached_tokens

    assert [hits(name, "new") for name in NAMES] == [0, 0, 0, 0]
    assert [hits(name, "again") for name in NAMES] == [cached] * 4
    rank.scheduler.forget("", "b@1")
    rank.scheduler.check()
    assert [hits(name, "after") for name in NAMES] == [cached, cached, 0, cached]
    rank.scheduler.forget("")
    assert [hits(name, "base gone") for name in NAMES] == [0, 0, 0, 0]


@pytest.mark.parametrize("apart", [True, False])
def test_keys_without_the_adapter_would_answer_wrongly_sc11(
    apart: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: prefixes that are shared give wrong answers."""
    if not apart:
        monkeypatch.setattr(paging, "root", lambda version, _, salt: root(version, "", salt))
    adapters = three(tiny, tmp_path)
    rank = LocalRank(adapted_model(tiny, adapters), blocks=64)
    texts = [text + [5] * 33 for text in prompts(3, seed=8)]
    rank.run([greedy(text, 12, f"base{i}") for i, text in enumerate(texts)])
    told = rank.run([greedy(text, 12, f"a{i}") for i, text in enumerate(texts)], adapter="a@1")
    theirs = continued(with_adapter(tiny, adapters["a@1"]), texts, 12)
    if apart:
        compare([one.ids for one in told], theirs)
    else:
        with pytest.raises(AssertionError):
            compare([one.ids for one in told], theirs)


async def ids_of(engine: ShardedEngine, version: str, texts: list[list[int]]) -> list[list[int]]:
    asked = (answer(engine, greedy(t, 12, f"{version}-{i}"), version) for i, t in enumerate(texts))
    return list(await asyncio.gather(*asked))


@pytest.mark.parametrize("ranks", [1, 2])
def test_adapters_come_are_replaced_and_go_while_the_base_answers_sc11(
    ranks: int, loop: LoopThread, tiny: Path, tmp_path: Path
) -> None:
    adapters = {name: path for name, path in three(tiny, tmp_path).items() if path}
    texts = prompts(3, seed=9)
    theirs = {
        name: continued(with_adapter(tiny, path), texts, 12) for name, path in adapters.items()
    }
    config = tiny_config(tensor_parallel=ranks, max_concurrent=12, max_queued=12, max_adapters=2)

    async def run() -> None:
        engine = await opened(config, m1=tiny)
        try:
            for name in ("a@1", "b@1"):
                await engine.load_adapter(name, "m@1", str(adapters[name]))
            with pytest.raises(EngineError, match="2 adapters are held already"):
                await engine.load_adapter("c@1", "m@1", str(adapters["c@1"]))
            asked = [ids_of(engine, name, texts) for name in ("m@1", "a@1", "b@1")]
            base, a, b = await asyncio.gather(*asked)
            compare(base, continued(plain(tiny), texts, 12))
            compare(a, theirs["a@1"])
            compare(b, theirs["b@1"])
            going = asyncio.create_task(answer(engine, greedy(texts[1], 300, "long"), "m@1"))
            await engine.release_adapter("a@1", 5.0)
            with pytest.raises(RequestError, match="a@1 is not loaded"):
                await ids_of(engine, "a@1", texts)
            await engine.load_adapter("c@1", "m@1", str(adapters["c@1"]))
            compare(await ids_of(engine, "c@1", texts), theirs["c@1"])
            compare(await ids_of(engine, "b@1", texts), theirs["b@1"])
            assert len(await going) == 300, "the base went on meanwhile"
            told = await engine.stats()
            assert (told.versions, told.adapters) == (("m@1",), ("b@1", "c@1"))
            await engine.load("m@2", str(tiny))
            await engine.activate("m@2")
            await engine.release("m@1", 5.0)
            assert (await engine.stats()).adapters == (), "they went with their base"
            with pytest.raises(EngineError, match="m@1 is not loaded"):
                await engine.load_adapter("a@1", "m@1", str(adapters["a@1"]))
        finally:
            await engine.stop()

    loop.run(run(), timeout_s=120)


def change(**fields: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return apply


def rewrite(tensors: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        stored = load_file(directory / "adapter_model.safetensors")
        tensors(stored)
        save_file(stored, directory / "adapter_model.safetensors")

    return apply


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
REFUSED = {
    "no-config": (lambda d: (d / "adapter_config.json").unlink(), "no adapter_config.json"),
    "kind": (change(peft_type="IA3"), "peft_type is 'IA3'"),
    "dora": (change(use_dora=True), "use_dora=true is not computed here"),
    "bias": (change(bias="all"), 'bias="all" is not computed here'),
    "head": (change(modules_to_save=["lm_head"]), "modules_to_save"),
    "pissa": (change(init_lora_weights="pissa_niter_4"), "changed its base's weights"),
    "rank": (change(r=65), "r=65 is outside 1 to 64 .engine.max_lora_rank."),
    "other-rank": (change(r=7), "rank 8 in lora_A .* says 7"),
    "magnitude": (
        rewrite(lambda t: t.update({FIRST.replace("lora_", "x"): torch.ones(1)})),
        "only lora_A and lora_B",
    ),
    "half": (rewrite(lambda t: t.pop(f"{FIRST}A.weight")), "no pair of matrices"),
    "nan": (rewrite(lambda t: t[f"{FIRST}A.weight"].fill_(float("nan"))), "not finite"),
    "target": (
        rewrite(
            lambda t: t.update(
                {k.replace("q_proj", "qq"): t.pop(k) for k in list(t) if "0.self_attn.q_proj" in k}
            )
        ),
        "adds to model.layers.0.self_attn.qq, which is no linear layer .*down_proj",
    ),
    "head-target": (
        rewrite(
            lambda t: t.update(
                {
                    "base_model.model.lm_head.lora_A.weight": torch.ones(8, 64),
                    "base_model.model.lm_head.lora_B.weight": torch.ones(128, 8),
                }
            )
        ),
        "adds to lm_head, which",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("native", [True, False])
def test_what_does_not_fit_is_refused_with_the_reason_sc11(
    case: str, native: bool, tiny: Path, tmp_path: Path
) -> None:
    spoil, why = REFUSED[case]
    directory = save_adapter(tiny, tmp_path / "adapter", 1)
    spoil(directory)
    model = local_model(tiny)
    with pytest.raises(EngineError, match=f"adapter a@1 cannot be served: .*{why}"):
        model.adapters.read("a@1", directory, 64, model.native if native else None)
    assert model.adapters.for_native(StepPlan(1, "", (Row([0], 0, [1], 1),))) is None


def test_an_adapter_of_another_base_is_refused_by_its_shape_sc11(
    tiny: Path, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", intermediate_size=160)
    directory = save_adapter(other, tmp_path / "adapter", 1)
    model = local_model(tiny)
    with pytest.raises(EngineError, match="160 in it and 64 x 128 in the base"):
        model.adapters.read("a@1", directory, 64, model.native)
