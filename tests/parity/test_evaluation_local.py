"""``roundhouse eval --local`` on tiny models: ranks agree, and two versions are told apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from cluster.library.manifest import Facts
from cluster.library.store import Library
from tests.parity.engine_fixtures import save_tiny
from tests.parity.training_fixtures import Ranks, two
from tests.unit.data_fixtures import jsonl, said
from tests.unit.text_fixtures import write_tokenizer
from train_jobs import evaluation
from train_jobs.bare import open_bare
from train_jobs.evaluate import outcomes
from train_jobs.evaluation import EvaluationConfig, Measurement
from train_jobs.group import Device, Place
from train_jobs.ports import PlainWorld
from train_jobs.runs import RunDir

pytestmark = [pytest.mark.parity, pytest.mark.timeout(300)]
__all__ = ["two"]
ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = ("--set", "run.threads=1", "--json")


def publish(folder: Path, number: int, wide: float, base: str | None = None) -> None:
    source = save_tiny(folder / f"v{number}", vocab_size=400, initializer_range=wide)
    write_tokenizer(source)
    Library().publish("tiny", source, Facts(base=base))


def run(*verb: str) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *verb, *ONE_THREAD],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told: dict[str, Any] = json.loads(ran.stdout)
    return told


def test_two_ranks_measure_what_one_measures_and_a_worse_version_is_told(tmp_path: Path) -> None:
    publish(tmp_path, 1, 0.02)
    publish(tmp_path, 2, 0.5)  # sure of nonsense
    rows = [said(f"where is engine {n}", f"in stall {n % 3}") for n in range(30)]
    data = str(jsonl(tmp_path / "rows.jsonl", rows))
    one = run("eval", "tiny@1", "--data", data, "--local", "1")
    two = run("eval", "tiny@1", "--data", data, "--local", "2", "--again")
    assert one["id"] == two["id"]
    assert one["examples"] == 30
    for name, figure in one["figures"].items():
        assert two["figures"][name]["value"] == pytest.approx(figure["value"], abs=1e-5)
        assert figure["low"] <= figure["value"] <= figure["high"]
    told = run("eval", "compare", "tiny@1", "tiny@2", "--data", data, "--local", "1")
    loss = next(one for one in told["figures"] if one["figure"] == "loss")
    assert loss["verdict"] == "worse"
    assert loss["difference"] > 0
    assert len(Library().evaluations(Library().get("tiny", 2))) == 1


def test_preferences_are_measured_against_the_base(tmp_path: Path) -> None:
    publish(tmp_path, 1, 0.05)
    publish(tmp_path, 2, 0.06, base="tiny@1")
    rows = [{"prompt": f"engine {n}", "chosen": "in stall", "rejected": "gone"} for n in range(6)]
    data = str(jsonl(tmp_path / "pairs.jsonl", rows))
    itself = run("eval", "tiny@2", "--data", data, "--local", "1", "--reference", "tiny@2")
    assert itself["objective"]["kind"] == "dpo"
    assert itself["figures"]["margin"]["value"] == pytest.approx(0, abs=1e-5)
    found = run("eval", "tiny@2", "--data", data, "--local", "1")
    assert found["reference"] == "tiny@1"
    assert abs(found["figures"]["margin"]["value"]) > 1e-4


def measured(place: Place, home: str, folder: Path, config: dict[str, Any]) -> dict[str, float]:
    """What a rank of an evaluation does between joining the group and leaving it."""
    run = RunDir(folder)
    world = PlainWorld(place.rank, place.size, run)
    with patch.dict(os.environ, ROUNDHOUSE_HOME=home):
        made = Measurement.load(EvaluationConfig.model_validate(config))
        bare, objective = open_bare(made, Device("cpu", "float32"), run, world)
        return objective.score(outcomes(bare, objective, made.data, world))


def test_what_asks_another_model_first_is_measured_too(two: Ranks, tmp_path: Path) -> None:
    """KTO's reference answers before the version does; a teacher beside it."""
    publish(tmp_path, 1, 0.05)
    publish(tmp_path, 2, 0.06, base="tiny@1")
    rows = [{"prompt": f"engine {n}", "completion": "in stall", "label": n < 3} for n in range(6)]
    wanted = jsonl(tmp_path / "wanted.jsonl", rows)
    chats = jsonl(tmp_path / "chats.jsonl", [said(f"engine {n}", "in stall") for n in range(6)])
    asked = {
        "kto": evaluation.resolve("tiny@2", wanted, "kto"),
        "itself": evaluation.resolve("tiny@2", wanted, "kto", "tiny@2"),
        "teacher": evaluation.resolve(
            "tiny@2", chats, "distillation", None, ["objective.teacher=tiny@1"]
        ),
        "own": evaluation.resolve(
            "tiny@2", chats, "distillation", None, ["objective.teacher=tiny@2"]
        ),
    }
    found = {}
    for name, config in asked.items():
        folder = tmp_path / name
        folder.mkdir()
        home = os.environ["ROUNDHOUSE_HOME"]
        one, other = two.run(measured, home, folder, config.model_dump(mode="json"))
        assert one == other
        found[name] = one
    assert found["itself"]["margin"] == pytest.approx(0, abs=1e-5)
    assert found["itself"]["loss"] == pytest.approx(0.5, abs=1e-5)  # nothing has moved
    assert abs(found["kto"]["margin"]) > 1e-4
    assert found["own"]["divergence"] == pytest.approx(0, abs=1e-5)
    assert found["teacher"]["divergence"] > 1e-3
