"""``roundhouse eval --local`` on tiny models: ranks agree, and two versions are told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.library.manifest import Facts
from cluster.library.store import Library
from tests.parity.engine_fixtures import save_tiny
from tests.unit.data_fixtures import jsonl, said
from tests.unit.text_fixtures import write_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.timeout(300)]
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
