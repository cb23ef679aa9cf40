"""The memory that `--dry-run` tells, against peaks of resident memory that runs have shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.library.manifest import Architecture
from train_jobs.config import FinetuneConfig
from train_jobs.data.dataset import Dataset
from train_jobs.data.example import Document, Example
from train_jobs.estimate import Beside, dtype_of, of_rank
from train_jobs.remedies import Fits, remedies, said, ways
from train_jobs.shape import Shape

GIB = 1 << 30
MB = 1_000_000
SMOLLM2 = Shape("decoder", 30, 576, 1536, 576, 192, 9, 49152, True, False, False)
MINILM = Shape("encoder", 6, 384, 1536, 384, 384, 12, 30522, False, True, True)
PARAMETERS = {"smollm2": 134_515_008, "minilm": 22_713_728}
ADDED = {"smollm2": 4_884_480, "minilm": 663_552}


def rows(tokens: int, trained: int, count: int = 1) -> Dataset:
    told = (False,) * (tokens - trained) + (True,) * trained
    example = Example((Document("demo.jsonl:1", (0,) * tokens, told),))
    return Dataset(((example,) * count,) * 200, 512, 0, "0" * 64)


DEMO = rows(49, 16, count=10)
TWO = {"workers": 2, "epochs": 1, "dtype": "float32"}


def config(**changes: Any) -> FinetuneConfig:
    fields: dict[str, Any] = {
        "model": "m@1",
        "data": {"train": "/demo.jsonl"},
        "batch": {"micro": 1, "total": 4},
        "run": {"workers": 2, "epochs": 1},
    }
    return FinetuneConfig.model_validate(fields | changes)


def estimate(lora: bool = False, dtype: str = "float32", **changes: Any) -> dict[str, int]:
    adapter = {"adapter": {"kind": "lora"}} if lora else {}
    learnt = ADDED["smollm2"] if lora else None
    made = config(**(adapter | changes))
    return of_rank(made, SMOLLM2, PARAMETERS["smollm2"], DEMO, dtype, learnt)


def minilm(zero: int, workers: int, micro: int, lora: bool = False) -> int:
    made = config(
        objective={"kind": "sequence_classification"},
        zero=zero,
        batch={"micro": micro, "total": micro * workers},
        run={"workers": workers, "epochs": 1},
        adapter={"kind": "lora"} if lora else None,
    )
    learnt = ADDED["minilm"] if lora else None
    found = of_rank(made, MINILM, PARAMETERS["minilm"], rows(128, 0), "float32", learnt)
    return sum(found.values())


@pytest.mark.parametrize(
    ("changes", "seen_mb"),
    [
        ({"zero": 0}, 3767),
        ({"zero": 2}, 4090),
        ({"zero": 2, "batch": {"micro": 2, "total": 4}}, 4787),
        ({"zero": 3}, 4143),
        ({"zero": 2, "lora": True}, 1996),
    ],
)
def test_tc32_the_estimate_is_near_what_two_ranks_of_smollm2_took(
    changes: dict[str, Any], seen_mb: float
) -> None:
    assert sum(estimate(**changes).values()) / MB == pytest.approx(seen_mb, rel=0.15)


@pytest.mark.parametrize(
    ("case", "seen_mb"),
    [
        ((0, 1, 8), 1023),
        ((0, 1, 32), 3297),
        ((3, 2, 8), 1487),
        ((2, 1, 8), 1239),
        ((2, 2, 8), 1336),
        ((0, 1, 8, True), 988),
    ],
)
def test_tc32_the_estimate_is_near_what_a_rank_of_minilm_took(
    case: tuple[int, int, int], seen_mb: float
) -> None:
    assert minilm(*case) / MB == pytest.approx(seen_mb, rel=0.15)


def test_tc32_the_estimate_is_near_what_one_rank_of_smollm2_took_on_full_rows() -> None:
    made = config(zero=0, batch={"micro": 1, "total": 1}, run={"workers": 1, "epochs": 1})
    found = of_rank(made, SMOLLM2, PARAMETERS["smollm2"], rows(510, 260), "float32")
    assert sum(found.values()) / MB == pytest.approx(3817, rel=0.15)


def test_tc32_an_adapter_needs_a_fraction_of_the_optimiser() -> None:
    full, adapter = estimate(zero=0), estimate(lora=True, zero=0)
    assert adapter["optimiser"] < 0.05 * full["optimiser"]
    assert adapter["weights"] == full["weights"] + 4 * ADDED["smollm2"]
    assert sum(adapter.values()) < 0.7 * sum(full.values())


def test_tc32_stages_and_ranks_divide_what_they_say() -> None:
    run = {"workers": 4, "epochs": 1}
    four = estimate(zero=2, run=run)
    whole = estimate(zero=0, run=run)
    assert four["weights"] == whole["weights"]
    assert whole["optimiser"] == 8 * PARAMETERS["smollm2"]
    assert four["optimiser"] < whole["optimiser"] / 2
    three = estimate(zero=3, run=run, dtype="bfloat16")
    assert three["weights"] * 4 == pytest.approx(5 * 2 * PARAMETERS["smollm2"])


def test_tc32_bfloat16_has_a_master_copy_and_half_the_weights() -> None:
    plain, half = estimate(zero=0), estimate(zero=0, dtype="bfloat16")
    assert half["weights"] * 2 == plain["weights"]
    assert half["optimiser"] == plain["optimiser"] + 4 * PARAMETERS["smollm2"]


def test_tc32_what_is_computed_again_is_not_kept() -> None:
    none, some, full = (
        estimate(gradient_checkpointing=how)["activations"] for how in ("none", "selective", "full")
    )
    assert full < some < none
    assert full < none / 5


def test_tc32_logits_exist_in_blocks_however_many_are_trained() -> None:
    few = of_rank(config(), SMOLLM2, PARAMETERS["smollm2"], rows(500, 400), "float32")
    many = of_rank(config(), SMOLLM2, PARAMETERS["smollm2"], rows(9000, 8000), "float32")
    assert few["logits"] == many["logits"]


TINY = Shape("decoder", 2, 8, 16, 8, 4, 2, 100, True, False, False)
"""144 elements of a token in a layer, 312 in all of it: 2 * 144, and 3 * 8 at its ends."""
WIDE = replace(TINY, vocabulary=1 << 20)
TEN = rows(10, 4)


def parts(
    kind: str,
    data: Dataset = TEN,
    shape: Shape = TINY,
    micro: int = 1,
    others: dict[str, Beside] | None = None,
    checkpointing: str = "none",
    **objective: Any,
) -> dict[str, int]:
    """What a rank holds at the end of a forward pass of a model so small that this is the most."""
    made = config(
        objective={"kind": kind, **objective},
        zero=0,
        batch={"micro": micro, "total": micro},
        run={"workers": 1, "epochs": 1},
        gradient_checkpointing=checkpointing,
    )
    return of_rank(made, shape, 10, data, "float32", None, others)


def test_tc32_a_next_tokens_logits_by_hand() -> None:
    found = parts("sft")
    assert found["weights"] == 10 * 4
    assert found["activations"] == 10 * 312 * 4
    # four places of 100 entries, four times: logits, log-probabilities, the gradients of both
    assert found["logits"] == 4 * 100 * 4 * 4 + 100 * 8 * 4
    assert parts("sft", micro=2)["logits"] == 8 * 100 * 4 * 4 + 100 * 8 * 4


@pytest.mark.parametrize(
    ("options", "copies"), [({}, 8), ({"beta": 1.0}, 9), ({"beta": 0.5}, 16), ({"top_k": 5}, 6)]
)
def test_tc32_a_teacher_is_a_part_of_its_own_and_its_logits_are_there_too(
    options: dict[str, Any], copies: int
) -> None:
    teacher = Beside(parameters=1000, hidden=6)
    found = parts("distillation", others={"teacher": teacher}, teacher="big@1", **options)
    assert found["teacher"] == 1000 * 4 + 4 * 6 * 4  # and what it says of four places
    assert found["logits"] == 4 * 100 * 4 * copies + 100 * 8 * 4
    assert found["activations"] == parts("sft")["activations"]


def test_tc32_a_reference_is_asked_before_and_costs_nothing_then() -> None:
    for kind in ("dpo", "kto"):
        assert parts(kind) == parts("simpo")


def test_tc32_answers_are_what_a_policy_learns_from_not_its_prompts() -> None:
    prompts = rows(10, 0)
    options = {"rewards": ["a.b:c"], "num_generations": 4, "max_completion_length": 5}
    one = parts("grpo", prompts, **options)
    assert one["activations"] == (10 + 4 * 5) * 312 * 4  # four answers share their prompt
    assert one["logits"] == 4 * 5 * 100 * 4 * 4 + 100 * 8 * 4
    assert one["generation"] == 0  # its memory is used again
    two = parts("grpo", prompts, micro=2, **options)
    assert two["activations"] == 2 * 4 * (10 + 5) * 312 * 4
    assert "generation" not in parts("grpo", prompts, app="elsewhere", **options)


def test_tc32_keys_and_values_of_all_answers_can_be_the_most() -> None:
    options = {"rewards": ["a.b:c"], "num_generations": 4, "max_completion_length": 5}
    keys = replace(TINY, keys=4000)
    found = parts("grpo", rows(10, 0), keys, checkpointing="full", **options)
    assert found["generation"] == 4 * (10 + 5) * 2 * 2 * 4000 * 4
    assert found["activations"] == found["logits"] == found["gradients"] == 0


def test_tc32_a_masked_models_logits_are_of_hidden_tokens_alone() -> None:
    encoder = replace(TINY, family="encoder")
    found = parts("masked_lm", rows(20, 20), encoder, micro=2)
    assert found["logits"] == 2 * 3 * 100 * 4 * 4 + 100 * 8 * 4  # 15 % of 20, twice
    many, wide = rows(400, 400), replace(WIDE, family="encoder")
    blocks = parts("masked_lm", many, wide)["logits"]
    assert blocks == 16 * (1 << 20) * 4 * 4 + (1 << 20) * 8 * 4  # 2^24 logits at a time
    whole = parts("masked_lm", many, wide, next_sentence=True)["logits"]
    assert whole == 60 * (1 << 20) * 4 * 4 + (1 << 20) * 8 * 4  # its head is asked as it is


def test_tc32_a_targets_logits_are_in_blocks_unless_the_model_adds_to_them() -> None:
    source = Document("a:1", (0,) * 7, (False,) * 7)
    target = Document("a:1", (0,) * 41, (False, *(True,) * 40))
    data = Dataset(((Example((source, target), "x"),),) * 3, 512, 0, "0" * 64)
    both = replace(WIDE, family="seq2seq")
    assert parts("seq2seq", data, both)["logits"] == 16 * (1 << 20) * 16 + (1 << 20) * 32
    bart = replace(both, blocks=False)
    assert parts("seq2seq", data, bart)["logits"] == 40 * (1 << 20) * 16 + (1 << 20) * 32


@pytest.mark.parametrize("kind", ["sequence_classification", "token_classification", "reward"])
def test_tc32_a_head_of_its_own_has_no_logits_over_the_vocabulary(kind: str) -> None:
    found = parts(kind, micro=3)
    assert found["logits"] == 0
    assert found["activations"] == 3 * 10 * 312 * 4


@pytest.mark.parametrize(
    ("facts", "blocks"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "t5"}, True),
        ({"model_type": "bart"}, False),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, False),
        ({"model_type": "granite", "logits_scaling": 8.0}, False),
    ],
)
def test_what_changes_logits_behind_the_layer_is_read_from_the_configuration(
    tmp_path: Path, facts: dict[str, Any], blocks: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(facts))
    known = Architecture(model_type=facts["model_type"], layers=2, hidden=8, heads=2)
    shape = Shape.of(tmp_path, known)
    assert shape is not None
    assert shape.blocks is blocks


def test_widths_are_read_from_the_models_own_configuration(tmp_path: Path) -> None:
    told = {
        "model_type": "bert",
        "intermediate_size": 1536,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "type_vocab_size": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(told))
    known = Architecture(
        model_type="bert", layers=6, hidden=384, heads=12, head_dim=32, vocab_size=30522
    )
    assert Shape.of(tmp_path, known) == MINILM
    assert Shape.of(tmp_path, Architecture(model_type="bert")) is None  # it is not guessed


def guess(other: FinetuneConfig) -> int:
    learnt = ADDED["smollm2"] if other.adapter else None
    known = PARAMETERS["smollm2"], DEMO, dtype_of(other), learnt
    return sum(of_rank(other, SMOLLM2, *known).values())


def within(size: int) -> Fits:
    return lambda other, need: need <= size


def test_ways_out_are_tried_by_the_estimate_itself() -> None:
    full = config(zero=0, batch={"micro": 2, "total": 4}, run=TWO)
    tried = [said(way) for way, _ in ways(full)]
    assert tried[0] == "--set batch.micro=1"
    assert "--set adapter.kind=lora  --set zero=0" in tried
    assert "--set gradient_checkpointing=full" in tried
    assert "--set sequence_parallel=2" in tried
    assert not any("offload" in one for one in tried)  # it has no GPU
    need = guess(full)
    for way, other in ways(full):
        assert guess(other) != need, said(way)  # the estimate knows what it changes
    for helps in ({"run.dtype": "bfloat16"}, {"data.max_len": 256, "data.truncate": "end"}):
        assert guess(dict((said(way), other) for way, other in ways(full))[said(helps)]) < need
    assert remedies(full, guess, within(need - 1))[0].startswith("--set batch.micro=1: ")
    assert [way.partition(":")[0] for way in remedies(full, guess, within(5 * GIB // 2))] == [
        "--set gradient_checkpointing=full"
    ]
    less = full.model_copy(update={"gradient_checkpointing": "full"})
    assert [way.partition(":")[0] for way in remedies(less, guess, within(2 * GIB))] == [
        "--set adapter.kind=lora  --set zero=0"
    ]


def test_tc36_what_no_change_does_alone_several_do_together() -> None:
    full = config(zero=0, batch={"micro": 2, "total": 4}, run=TWO)
    [several] = remedies(full, guess, within(GIB))
    assert "adapter.kind=lora" in several
    assert several.count("--set") > 2
    assert "--set run.workers" not in several  # as few changes as do
    assert float(several.rpartition(": ")[2].removesuffix(" GiB")) <= 1
    [nothing] = remedies(full, guess, within(GIB // 8))
    assert nothing.endswith("which is not enough by itself")


def test_tc36_a_gpu_run_may_offload_what_its_machine_can_hold() -> None:
    gpu = config(zero=2, run={**TWO, "num_gpus": 1, "dtype": "auto"})
    tried = {said(way): guess(other) for way, other in ways(gpu)}
    assert tried["--set offload.optimizer=true  --set zero=2"] < guess(gpu) - 4 * 67_000_000
    assert not any("run.dtype" in one for one in tried)  # auto is bfloat16 there


LLAMA_8B = Shape("decoder", 32, 4096, 14336, 4096, 1024, 32, 128256, True, False, False)


@pytest.mark.parametrize(
    ("gib", "way"),
    [
        (80, "--set offload.optimizer=true  --set zero=2"),
        (24, "--set adapter.kind=lora  --set zero=2"),
    ],
)
def test_tc36_an_8b_full_fine_tune_on_two_gpus_is_told_what_would_do(gib: int, way: str) -> None:
    full = config(zero=2, run={"workers": 2, "epochs": 1, "num_gpus": 1})

    def need(other: FinetuneConfig) -> int:
        learnt = 41_943_040 if other.adapter else None
        known = LLAMA_8B, 8_030_261_248, DEMO, dtype_of(other), learnt
        return sum(of_rank(other, *known).values())

    assert need(full) > 80 * GIB
    told = remedies(full, need, within(gib * GIB))
    assert way in [one.partition(":")[0] for one in told], told
