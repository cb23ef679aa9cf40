"""``roundhouse eval`` as a job of the cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.library.store import Library
from tests.ray.cluster_fixtures import Rig
from tests.ray.test_training import NAME, write_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


def test_eval_runs_as_a_job_and_keeps_its_figures_with_the_version(
    cluster: Rig, tmp_path: Path
) -> None:
    write_config(cluster, tmp_path, {"steps": 1})  # the model and the rows
    data = str(tmp_path / "train.jsonl")
    half = ("--set", "run.num_cpus=0.5", "--workers", "2")
    ran = cluster.run("eval", f"{NAME}@1", "--data", data, *half, timeout_s=180)
    assert "ray job submit --address http://" in ran.stdout
    assert "measured 24 examples; 1000 resamples" in ran.stdout
    library = Library(cluster.home / "library")
    [found] = library.evaluations(library.get(NAME, 1))
    assert found.examples == 24
    assert found.code_revision
    loss = found.figures["loss"]
    assert loss.low is not None
    assert loss.low < loss.value
    again = cluster.run("eval", f"{NAME}@1", "--data", data, "--json")
    assert json.loads(again.stdout)["id"] == found.id  # not measured twice
