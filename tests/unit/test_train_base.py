"""What a base model allows, read from its headers; and the preview of what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from safetensors.numpy import save_file
from typer.testing import CliRunner

from cluster.config import dump, load
from cluster.errors import ConfigError, UnknownModel
from cluster.library.cli import models
from cluster.library.manifest import Facts
from cluster.library.store import Library
from tests.unit.library_fixtures import model
from tests.unit.text_fixtures import write_tokenizer
from train_jobs.adaptation import LoRA
from train_jobs.adapters import added_parameters, check_targets, linear_layers, note
from train_jobs.card import render
from train_jobs.cli import register
from train_jobs.config import FinetuneConfig
from train_jobs.data.example import Document
from train_jobs.data.preview import marked, pieces
from train_jobs.objectives.settings import Distillation
from train_jobs.plan import resolve
from train_jobs.task import Task, lineage

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"hello {number}"},
            {"role": "assistant", "content": "hello there"},
        ]
    }
    for number in range(3)
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two blocks with attention and a feed-forward layer, norms and embeddings."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (16, 8),
        "lm_head.weight": (16, 8),
    }
    for block in range(2):
        at = f"model.layers.{block}"
        shapes |= {f"{at}.self_attn.q_proj.weight": (8, 8), f"{at}.mlp.down_proj.weight": (8, 24)}
        shapes |= {f"{at}.input_layernorm.weight": (8,), f"{at}.self_attn.q_proj.bias": (8,)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_the_linear_layers_of_the_blocks_are_what_an_adapter_can_go_to(base: Path) -> None:
    assert linear_layers(base) == ("down_proj", "q_proj")


def test_an_unknown_target_is_refused_with_those_there_are(base: Path) -> None:
    check_targets(LoRA(kind="lora"), base)
    check_targets(LoRA(kind="lora", targets=("q_proj",)), base)
    with pytest.raises(ConfigError, match=r"'q_prj'; did you mean 'q_proj'\? .*down_proj, q_proj"):
        check_targets(LoRA(kind="lora", targets=("down_proj", "q_prj")), base)
    with pytest.raises(ConfigError, match="'lm_head'"):
        check_targets(LoRA(kind="lora", targets=("lm_head",)), base)


def test_the_size_of_an_adapter_is_counted_from_shapes(base: Path) -> None:
    assert added_parameters(LoRA(kind="lora", r=2), base) == 2 * 2 * ((8 + 8) + (8 + 24))
    assert added_parameters(LoRA(kind="lora", r=2, targets=("q_proj",)), base) == 2 * 2 * 16


def test_a_manifest_says_what_was_merged() -> None:
    lora = LoRA(kind="lora", r=8, alpha=16, targets=("q_proj", "v_proj"))
    assert note(lora) == "LoRA merged: r=8, alpha=16, targets=q_proj, v_proj"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    source = model(tmp_path / "tiny")
    write_tokenizer(source)
    facts = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(facts | {"num_local_experts": 8}))
    Library().publish("tiny", source, Facts())
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "my.yaml"
    fields: dict[str, Any] = {"model": "tiny", "data": {"train": "train.jsonl", "max_len": 64}}
    path.write_text(yaml.safe_dump(fields | {"run": {"epochs": 1}}))
    return path


def test_tc36_experts_under_zero_3_are_refused_before_anything_waits(config: Path) -> None:
    Task.load(resolve(config))
    with pytest.raises(ConfigError, match=r"zero: 3 with tiny@1: .*num_local_experts=8.*zero: 2"):
        Task.load(resolve(config, ["zero=3"]))


def distilling(config: Path) -> Path:
    told = yaml.safe_load(config.read_text())
    objective = {"kind": "distillation", "teacher": "tiny@best"}
    config.write_text(yaml.safe_dump(told | {"objective": objective}))
    return config


def test_a_runs_teacher_is_the_version_that_the_alias_meant_when_it_was_made(
    config: Path, tmp_path: Path
) -> None:
    library = Library()
    library.publish("tiny", tmp_path / "tiny", Facts())
    library.move_alias("tiny", "best", 1, None, "a test")
    made = resolve(distilling(config))
    assert isinstance(made.objective, Distillation)
    assert made.objective.teacher == "tiny@1"
    stored = tmp_path / "config.json"
    stored.write_text(dump(made))
    library.move_alias("tiny", "best", 2, 1, "a test")
    again = load(stored, FinetuneConfig)  # what a resume reads
    assert again == made
    assert resolve(config).objective.others == {"teacher": "tiny@2"}

    facts = lineage(Task.load(made), "r-1", {}, None, made.objective.others)
    assert facts.lineage is not None
    assert facts.lineage.models == {"teacher": "tiny@1"}
    version = library.publish("tiny", tmp_path / "tiny", facts)
    assert library.verify(version.ref).manifest.lineage == facts.lineage
    shown = CliRunner().invoke(models, ["show", version.ref]).output
    assert "  teacher      tiny@1\n" in shown
    assert "\nIts teacher was `tiny@1`.\n" in render(Task.load(made), "tiny", facts, {})


def test_a_teacher_that_is_not_there_or_that_is_served(config: Path) -> None:
    sets = ["objective.teacher=serve:tiny", "objective.top_k=4"]
    served = resolve(distilling(config), sets).objective
    assert served.others == {}  # its answers say which version it is
    assert isinstance(served, Distillation)
    assert served.teacher == "serve:tiny"
    with pytest.raises(UnknownModel, match="nobody"):
        resolve(config, ["objective.teacher=nobody"])


def test_pieces_follow_the_mask_and_nothing_predicts_the_first_token() -> None:
    document = Document("a:1", (1, 2, 3, 4, 5), (True, False, True, True, False))
    parts = list(pieces(document, lambda ids: "".join(map(str, ids))))
    assert [(part.text, part.trained, part.tokens) for part in parts] == [
        ("12", False, 2),
        ("34", True, 2),
        ("5", False, 1),
    ]
    assert marked(parts) == "12[[34]]5"
    assert sum(part.trained * part.tokens for part in parts) == document.trained_tokens


def run(*words: str) -> str:
    app = typer.Typer()
    register(app)
    ran = CliRunner().invoke(app, list(words))
    if ran.exception and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    assert ran.exit_code == 0, ran.output
    return ran.stdout


def test_tc20_preview_marks_what_is_trained(config: Path) -> None:
    told = run("data", "preview", str(config), "-n", "2")
    assert f"{config.parent / 'train.jsonl'}:1  " in told
    assert "<|im_start|>assistant\n[[hello there<|im_end|>]]" in told
    assert told.count("[[") == 2
    assert "3 examples (0 left out) packed into " in told
    assert f"{config.parent / 'train.jsonl'}: messages, 3 rows\n" in told
    assert "lengths: 25 to 25 tokens, median 25, 95 % up to 25  " in told


def test_tc20_preview_in_json_has_the_pieces(config: Path) -> None:
    told = json.loads(run("data", "preview", str(config), "-n", "1", "--json"))
    [shown] = told["shown"]
    [document] = shown["documents"]
    pieces = document["pieces"]
    assert "".join(p["text"] for p in pieces).startswith("<|im_start|>user\nhello 0")
    assert sum(p["tokens"] for p in pieces if p["trained"]) == shown["trained_tokens"]
    assert told["sources"] == [
        {"path": str(config.parent / "train.jsonl"), "form": "messages", "rows": 3, "bad": 0,
         "weight": 1.0}
    ]  # fmt: skip
    assert sum(told["lengths"]["histogram"]) == 3
    assert told["trained_tokens"] == 3 * shown["trained_tokens"]


def test_preview_of_what_is_not_held_out_says_so(config: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is held out"):
        run("data", "preview", str(config), "--heldout")


def test_preview_tells_what_became_of_every_row(config: Path) -> None:
    rows = [*ROWS, ROWS[0], {"messages": [ROWS[0]["messages"][0]]}, {"text": "x"}]
    rows.append({"messages": [{"role": "user", "content": "call +49 30 90182000 "}] * 9})
    (config.parent / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = ["on_bad_row=skip", "max_bad_share=0.5", "max_empty_share=0.5", "truncate=drop"]
    sets += ["deduplicate=exact", "scrub=true"]
    words = [word for one in sets for word in ("--set", f"data.{one}")]
    told = run("data", "preview", str(config), *words)
    assert (
        "1 without a trained token, left out; 1 too long, left out; 1 duplicates, left out" in told
    )
    assert (
        f"1 bad rows, left out:\n  {config.parent / 'train.jsonl'}:6: messages: is required" in told
    )
    assert "scrubbed: 9 phone" in told
    assert "3 examples (1 left out) packed" in told
    told = json.loads(run("data", "preview", str(config), *words, "--json"))
    assert (told["too_long"], told["removed"], told["scrubbed"]) == (1, 1, {"phone": 9})
    assert told["sources"][0]["bad"] == 1


@pytest.mark.parametrize(
    ("objective", "row", "shown"),
    [
        ("dpo", {"prompt": "hello", "chosen": "there", "rejected": "again"},
         "-- chosen\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n[[there<|im_"),
        ("kto", {"prompt": "hello", "completion": "there", "label": False}, "label False\n<|im_"),
        ("causal_lm", {"text": "hello there"}, "hello[[ there<|im_end|>]]"),
    ],
)  # fmt: skip
def test_preview_shows_what_an_objective_learns(
    config: Path, objective: str, row: dict[str, Any], shown: str
) -> None:
    (config.parent / "train.jsonl").write_text(json.dumps(row) + "\n")
    assert shown in run("data", "preview", str(config), "--set", f"objective.kind={objective}")


def test_held_out_rows_can_be_a_share_of_the_others(config: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "x"}]}
        for n in range(50)
    ]
    (config.parent / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Task.load(resolve(config, ["data.split=0.2"]))
    assert task.heldout is not None
    assert task.train.examples + task.heldout.examples == 50
    assert "examples" in run("data", "preview", str(config), "--heldout", "--set", "data.split=0.2")
