"""``roundhouse train`` on a cluster: one real run of a tiny model, and one that cannot begin."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from cluster.library.manifest import Facts
from cluster.library.store import Library
from tests.parity.engine_fixtures import save_tiny
from tests.ray.cluster_fixtures import Rig
from tests.unit.text_fixtures import write_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]
NAME = "train-tiny"
SERVE = """
models:
  - model: train-tiny
    engine: {kind: fake}
"""


@pytest.fixture
def config(cluster: Rig, tmp_path: Path) -> Path:
    """A model in the cluster's library, data, and a file that trains one on the other."""
    return write_config(cluster, tmp_path, {"steps": 8, "save_every": 4})


def write_config(cluster: Rig, folder: Path, run: dict[str, Any], **changes: Any) -> Path:
    library = Library(cluster.home / "library")
    if not library.versions(NAME):
        source = save_tiny(folder / "base", vocab_size=400)
        write_tokenizer(source)
        library.publish(NAME, source, Facts(licence="apache-2.0", notes=("random",)))
    for name, count in (("train", 24), ("heldout", 6)):
        rows = [dialogue(number) for number in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    path = folder / "tiny-sft.yaml"
    fields: dict[str, Any] = {
        "model": f"{NAME}@1",
        "data": {"train": "train.jsonl", "heldout": "heldout.jsonl", "max_len": 128},
        "optim": {"lr": 1e-2},
        "batch": {"total": 4},
        "run": {"workers": 2, "num_cpus": 0.5, **run},
    }
    path.write_text(yaml.safe_dump(fields | changes))
    return path


def dialogue(number: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"where is engine {number}"},
            {"role": "assistant", "content": f"in stall {number % 3}"},
        ]
    }


def test_train_publishes_the_next_version_with_its_lineage(cluster: Rig, config: Path) -> None:
    told = cluster.run("train", str(config), timeout_s=180).stdout
    [run] = (cluster.home / "runs").glob("tiny-sft-*")
    assert "ray job submit --address http://" in told
    assert f" --working-dir . -- python -m train_jobs.finetune {config}\n" in told
    assert "step 8/8  loss " in told
    assert f"published {NAME}@2" in told

    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["published"], result["steps"]) == ("succeeded", f"{NAME}@2", 8)
    assert result["heldout_loss_after"] < result["heldout_loss_before"]
    assert result["engine"]["zero_stage"] == 2  # TC-01, from inside the worker
    assert result["engine"]["world"] == 2

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "event" not in record]
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "trained_tokens", "eta_s"} <= set(steps[0])
    events = [record["event"] for record in records if "event" in record]
    looks = ["evaluated", "checkpoint", "checkpoint", "evaluated"]
    assert events == ["met", "ready", *looks, "published"]
    logged = cluster.run("jobs", "logs", run.name).stdout  # also those of `ray job logs`
    assert "step 8/8  loss " in logged
    assert (run / "checkpoints" / "step-00000008" / "COMPLETE").exists()

    version = Library(cluster.home / "library").verify(f"{NAME}@2")
    assert version.manifest.base == f"{NAME}@1"
    lineage = version.manifest.lineage
    assert lineage is not None
    assert lineage.run_id == run.name
    assert set(lineage.data_hashes) == {"train.jsonl", "heldout.jsonl"}
    assert lineage.code_revision
    assert version.manifest.licence == "apache-2.0"
    assert version.manifest.metrics["heldout_loss_after"] == result["heldout_loss_after"]


@pytest.fixture
def answering(cluster: Rig, config: Path) -> Iterator[Path]:
    """The base of what a run has made, deployed; yields the folder with its data."""
    library = Library(cluster.home / "library")
    if len(library.versions(NAME)) < 2:
        cluster.run("train", str(config), timeout_s=180)
    library.move_alias(NAME, "champion", 1, None, "test")
    serve = config.parent / "serve.yaml"
    serve.write_text(SERVE)
    cluster.run("deploy", str(serve), "--timeout", "170", timeout_s=200)
    yield config.parent
    cluster.run("undeploy", NAME, check=False)


def test_RC07_an_answer_leads_to_all_that_made_it_and_its_data_back_to_it(
    cluster: Rig, answering: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = answering / "heldout.jsonl"
    monkeypatch.setitem(cluster.env, "USER", "ann")
    cluster.run("promote", f"{NAME}@2")
    cluster.run("eval", f"{NAME}@2", "--data", str(data), "--local", "1", timeout_s=180)
    asked = {"model": NAME, "prompt": [5, 6, 7], "max_tokens": 2}
    answer = requests.post(
        f"{cluster.cluster.serve_url}/v1/completions",
        json=asked,
        headers={"Authorization": f"Bearer {cluster.api_key}"},
        timeout=60,
    ).json()
    told = json.loads(cluster.run("lineage", answer["system_fingerprint"], "--json").stdout)
    record = json.loads((cluster.home / "runs" / told["run"] / "result.json").read_text())
    assert told["ref"] == record["published"] == f"{NAME}@2"
    assert told["config_hash"]
    hashes = {
        name: hashlib.sha256((answering / name).read_bytes()).hexdigest()
        for name in ("train.jsonl", "heldout.jsonl")
    }
    assert told["data"] == hashes
    assert told["made_with"]["base"]["ref"] == f"{NAME}@1"
    [judged] = told["evaluations"]
    assert (judged["ref"], judged["data"]) == (f"{NAME}@2", {data.name: hashes[data.name]})
    [promoted] = told["promoted"]
    assert (promoted["alias"], promoted["before"], promoted["by"]) == (
        "champion",
        1,
        "ann (promote)",
    )
    back = json.loads(cluster.run("lineage", "--data", hashes["train.jsonl"], "--json").stdout)
    assert (f"{NAME}@2", "trained on", True) in [
        (one["ref"], one["how"], one["there"]) for one in back["versions"]
    ]
    for needed, why in ((1, f"{NAME}@2 (base)"), (2, "@champion")):
        refused = cluster.run("models", "rm", f"{NAME}@{needed}", "--yes", check=False)
        assert refused.returncode == 1
        assert why in refused.stderr
    assert [v.number for v in Library(cluster.home / "library").versions(NAME)][:2] == [1, 2]


def test_a_bad_row_is_told_before_anything_is_submitted(cluster: Rig, config: Path) -> None:
    with (config.parent / "train.jsonl").open("a") as file:
        file.write('{"messages": []}\n')
    before = sorted((cluster.home / "runs").glob("*"))
    ran = cluster.run("train", str(config), check=False)
    assert ran.returncode == 1
    assert "train.jsonl:25: messages: must be a list of at least one message" in ran.stderr
    assert sorted((cluster.home / "runs").glob("*")) == before


def test_a_job_that_fails_on_the_cluster_says_why(cluster: Rig, config: Path) -> None:
    """The base is damaged after the checks on this side: the ranks find it."""
    weights = cluster.home / "library" / "models" / NAME / "versions" / "1" / "model.safetensors"
    whole = weights.read_bytes()
    weights.chmod(0o600)
    try:
        weights.write_bytes(whole[:100])
        ran = cluster.run("train", str(config), timeout_s=120, check=False)
    finally:
        weights.write_bytes(whole)
    assert ran.returncode == 1
    assert "error: " in ran.stderr
    assert re.search(r"rank \d failed: SafetensorError", ran.stderr)
    run = max((cluster.home / "runs").glob("tiny-sft-*"), key=lambda path: path.stat().st_mtime)
    assert json.loads((run / "result.json").read_text())["status"] == "failed"
