"""Ranks that share a sequence: what a configuration may ask for, and how rows are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from cluster.errors import ConfigError
from cluster.library.manifest import Facts
from cluster.library.store import Library
from tests.unit.library_fixtures import model
from tests.unit.text_fixtures import write_tokenizer
from train_jobs.config import FinetuneConfig
from train_jobs.data.dataset import Dataset
from train_jobs.data.example import Document, Example
from train_jobs.data.order import Order
from train_jobs.estimate import fullest
from train_jobs.objectives.families import check_heads
from train_jobs.plan import resolve
from train_jobs.task import Task


def config(**changes: Any) -> FinetuneConfig:
    fields: dict[str, Any] = {
        "model": "tiny@1",
        "data": {"train": "/toy.jsonl"},
        "batch": {"total": 12},
        "run": {"workers": 4, "steps": 9},
        "sequence_parallel": 2,
    }
    for key, value in changes.items():
        fields[key] = fields.get(key, {}) | value if isinstance(value, dict) else value
    return FinetuneConfig.model_validate(fields)


def test_rows_are_counted_by_teams() -> None:
    assert [config(sequence_parallel=n).accumulate for n in (1, 2, 4)] == [3, 6, 12]
    assert config().deepspeed("float32", on_gpu=False)["gradient_accumulation_steps"] == 6
    # two teams of two: each sees every second row of a step, and all of them are seen
    order = Order(rows=24, total=12, seed=0, max_steps=2)
    parts = [order.micro_batches(0, team, 2, 1) for team in (0, 1)]
    assert [len(part) for part in parts] == [6, 6]
    assert {seat for part in parts for [seat] in part} == set(order.step(0))
    assert FinetuneConfig.model_validate_json(config().model_dump_json()) == config()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"run": {"workers": 3}}, "run.workers=3 is not a multiple .*=2, .*; use 2 or 4 workers"),
        ({"run": {"workers": 1}}, "run.workers=1 is not a multiple .*=2, .*; use 2 workers"),
        (
            {"run": {"workers": {"min": 2, "max": 4}}},
            "=2 with run.workers from 2 to 4: .*; give one number, a multiple of 2",
        ),
        (
            {"batch": {"total": 5}},
            r"batch.total=5 is not .* sequence_parallel = 1 \* 4 / 2 = 2; use 4 or 6",
        ),
        ({"sequence_parallel": 0}, "sequence_parallel"),
        *(
            ({"objective": {"kind": kind, **more}}, f"=2 with objective {kind}, .*leave sequence_")
            for kind, more in (
                ("kto", {}),
                ("distillation", {"teacher": "big@1"}),
                ("grpo", {"rewards": ["a:b"]}),
                ("reward", {}),
                ("sequence_classification", {}),
                ("token_classification", {}),
                ("seq2seq", {}),
                ("masked_lm", {}),
            )
        ),
    ],
)
def test_what_ranks_cannot_share_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        config(**changes)


@pytest.mark.parametrize("kind", ["causal_lm", "sft", "prompt_completion", "dpo", "orpo", "simpo"])
def test_what_adds_up_can_be_shared(kind: str) -> None:
    for zero in (0, 1, 2, 3):
        assert config(objective={"kind": kind}, zero=zero).accumulate == 6


def test_a_rank_keeps_its_slice_of_the_fullest_row() -> None:
    example = Example((Document("toy.jsonl:1", (0,) * 401, (True,) * 401),))
    data = Dataset(((example,),), 512, 0, "0" * 64)
    whole = fullest(config(sequence_parallel=1), data)
    part = fullest(config(sequence_parallel=4), data)
    assert (whole.tokens, whole.longest) == (401, 401)
    assert (part.tokens, part.longest) == (101, 401)


@pytest.mark.parametrize(
    "facts",
    [{"num_attention_heads": 3}, {"n_head": 3}, {"text_config": {"num_attention_heads": 3}}],
)
def test_each_rank_needs_a_head(facts: dict[str, Any]) -> None:
    check_heads(facts, 3)
    with pytest.raises(ConfigError, match="this model has 3; use sequence_parallel: 3 or less"):
        check_heads(facts, 4)


def test_a_base_with_too_few_heads_is_refused_before_anything_starts(tmp_path: Path) -> None:
    source = model(tmp_path / "tiny")
    write_tokenizer(source)
    facts = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(facts | {"num_attention_heads": 2}))
    Library().publish("tiny", source, Facts())
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    fields = {"model": "tiny", "data": {"train": "train.jsonl"}, "run": {"epochs": 1, "workers": 4}}
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(fields))
    Task.load(resolve(path, ["sequence_parallel=2"]))
    with pytest.raises(ConfigError, match="4 ranks share a sequence.* has 2; use sequence_p"):
        Task.load(resolve(path, ["sequence_parallel=4"]))
