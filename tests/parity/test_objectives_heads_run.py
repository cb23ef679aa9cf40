"""Heads through the user's own door: import, train as plain processes, and what the library has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cluster.library.importers import import_model
from cluster.library.store import Library
from serve_apps.engine.partition import check_directory
from tests.parity.heads_fixtures import save_bert, save_t5

pytestmark = [pytest.mark.parity, pytest.mark.timeout(200)]
ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, fields: dict[str, Any], ranks: int) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(fields))
    done = subprocess.run(
        [sys.executable, "-m", "train_jobs.finetune", str(path), "--local", str(ranks)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_classifier_is_trained_on_two_ranks_and_published(tmp_path: Path) -> None:
    import_model(Library(), str(save_bert(tmp_path / "tiny")))
    good, bad = ("the film was very good", "good it is"), ("bad film", "it was not good")
    lines = [f"{text}\t{label}" for label, texts in (("up", good), ("down", bad)) for text in texts]
    (tmp_path / "train.tsv").write_text("\n".join(lines * 4) + "\n")
    data = {"path": "train.tsv", "names": ["text", "label"]}
    told = run(
        tmp_path,
        {
            "model": "tiny",
            "data": {"train": data, "heldout": data, "max_len": 32},
            "objective": {"kind": "sequence_classification"},
            "optim": {"lr": 5e-3},
            "batch": {"micro": 2, "total": 8},
            "run": {"workers": 2, "epochs": 10, "threads": 1},
            "publish": {"name": "judge"},
        },
        2,
    )
    assert "accuracy" in told
    version = Library().verify("judge@1")
    config = json.loads((version.path / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "down", "1": "up"}
    assert version.manifest.metrics["heldout_accuracy_after"] == 1
    assert version.manifest.base == "tiny@1"
    from transformers import pipeline

    judge = pipeline("text-classification", model=str(version.path), dtype=torch.float32)
    assert [found["label"] for found in judge(["the film was very good", "bad film"])] == [
        "up",
        "down",
    ]
    with pytest.raises(Exception, match="judge@1 is a BertForSequenceClassification, which the"):
        check_directory(version.path, 1, version.ref)


@pytest.mark.slow
def test_a_t5_is_drawn_from_its_config_and_learns(tmp_path: Path) -> None:
    source = save_t5(tmp_path / "t5-tiny")
    (source / "model.safetensors").unlink()
    library = Library()
    first = import_model(library, str(source), random_weights=7)
    assert (first.new, first.version.ref) == (True, "t5-tiny@1")
    assert first.version.manifest.tokenizer
    assert import_model(library, str(source), random_weights=7).new is False
    rows = [{"source": text, "target": text[::-1]} for text in ("ab", "cd", "hello", "the")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = run(
        tmp_path,
        {
            "model": "t5-tiny@1",
            "data": {"train": "train.jsonl", "heldout": "train.jsonl", "max_len": 32},
            "objective": {"kind": "seq2seq", "max_target_len": 12},
            "optim": {"lr": 2e-2},
            "batch": {"micro": 4, "total": 4},
            "run": {"workers": 1, "steps": 60, "threads": 1},
        },
        1,
    )
    assert "exact match" in told
    version = library.verify("t5-tiny@2")
    metrics = version.manifest.metrics
    assert metrics["heldout_loss_after"] < 0.5 * metrics["heldout_loss_before"]
    assert version.manifest.architecture.architectures == ("T5ForConditionalGeneration",)
