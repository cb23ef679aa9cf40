"""The model card: from the run's facts alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cluster.library.evaluations import Figure
from cluster.library.manifest import Facts, Lineage
from cluster.library.store import Library
from tests.unit.data_fixtures import jsonl, said
from tests.unit.library_fixtures import model
from tests.unit.text_fixtures import write_tokenizer
from train_jobs.card import render
from train_jobs.config import FinetuneConfig
from train_jobs.data.settings import Source
from train_jobs.task import Task


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setenv("ROUNDHOUSE_HOME", str(tmp_path / "home"))
    source = model(tmp_path / "base")
    (source / "tokenizer.json").unlink()
    write_tokenizer(source)
    Library().publish("m", source, Facts(licence="apache-2.0"))
    rows = [said(f"engine {n}", "in stall") for n in range(12)]
    fields = {
        "model": "m@1",
        "data": {
            "train": str(jsonl(tmp_path / "train.jsonl", rows)),
            "heldout": str(jsonl(tmp_path / "heldout.jsonl", rows[:3])),
        },
        "adapter": {"kind": "lora", "r": 4},
        "batch": {"total": 1},
        "run": {"epochs": 1},
    }
    return Task.load(FinetuneConfig.model_validate(fields))


def test_a_card_says_data_config_figures_and_limits(task: Task, tmp_path: Path) -> None:
    facts = Facts(
        base="m@1",
        licence="apache-2.0",
        lineage=Lineage(run_id="r-1", config_hash="c" * 64, data_hashes={"train.jsonl": "a" * 64}),
        metrics={"heldout_loss_before": 3.0, "heldout_loss_after": 2.0},
    )
    card = render(task, "mine", facts, {"loss": Figure(value=2.0, low=1.5, high=2.5)})
    head = yaml.safe_load(card.split("---")[1])
    assert head == {
        "library_name": "transformers",
        "base_model": "m@1",
        "license": "apache-2.0",
        "tags": ["roundhouse", "sft"],
    }
    assert "\n# mine\n" in card
    assert "`sft`: trained in part, 1 steps of 1 rows" in card
    assert "| trained on | 12 |" in card
    assert "| held out | 3 |" in card
    assert f"`train.jsonl`: SHA-256 `{'a' * 64}`" in card
    assert "| loss | 3.0000 | 2.0000 [1.5000, 2.5000] |" in card
    assert "Only 3 examples were held out" in card
    assert str(tmp_path) not in card  # no folder of this machine
    settings = yaml.safe_load(card.split("```")[1].removeprefix("yaml"))
    assert settings["adapter"] == {"kind": "lora", "r": 4}


def test_a_card_without_held_out_rows_claims_nothing(task: Task) -> None:
    card = render(replace(task, heldout=None), "mine", Facts(base="m@1"), {})
    assert "nothing was measured" in card
    assert "Of the base: unknown" in card


def test_a_card_names_a_hubs_data_set_whole(task: Task) -> None:
    hub = "hub:openai/gsm8k:train"
    data = task.config.data.model_copy(update={"train": (Source(path=Path(hub), config="main"),)})
    told = replace(task, config=task.config.model_copy(update={"data": data}))
    lineage = Lineage(run_id="r-1", config_hash="c" * 64, data_hashes={hub: "a" * 64})
    card = render(told, "mine", Facts(base="m@1", lineage=lineage), {})
    settings = yaml.safe_load(card.split("```")[1].removeprefix("yaml"))
    assert settings["data"]["train"] == [{"path": hub, "config": "main"}]
    assert f"- `{hub}`: SHA-256" in card


def test_a_card_is_kept_with_the_version_and_is_not_its_identity(tmp_path: Path) -> None:
    library = Library(tmp_path / "library")
    source = model(tmp_path / "m")
    (source / "README.md").write_text("# one")
    one = library.publish("m", source, Facts())
    (source / "README.md").write_text("# another")
    two = library.publish("m", source, Facts())
    assert (one.path / "README.md").read_text() == "# one"
    assert one.manifest.files["README.md"] != two.manifest.files["README.md"]
    assert one.manifest.digest == two.manifest.digest
    assert library.verify("m@1")
