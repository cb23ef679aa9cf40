"""``roundhouse tune`` on a cluster of two cores, with trials of two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.library.store import Library
from tests.ray.cluster_fixtures import Rig
from tests.ray.test_training import NAME, write_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def test_tc38_two_trials_of_two_ranks_end_and_the_better_one_is_published(
    cluster: Rig, tmp_path: Path
) -> None:
    tune = {"space": {"optim.lr": {"grid": [1e-9, 1e-2]}}, "metric": "loss"}
    config = write_config(cluster, tmp_path, {"steps": 4, "num_cpus": 1}, tune=tune)
    before = len(Library(cluster.home / "library").versions(NAME))
    told = json.loads(cluster.run("tune", str(config), "--json", timeout_s=360).stdout)
    assert [one["state"] for one in told["trials"]] == ["succeeded", "succeeded"]
    assert told["best_point"] == {"optim.lr": 1e-2}
    values = [one["value"] for one in told["trials"]]
    assert values == sorted(values)
    library = Library(cluster.home / "library")
    versions = library.versions(NAME)
    assert len(versions) == before + 1  # the other trial's model is gone
    version = library.verify(told["published"])
    assert version.manifest.lineage is not None
    assert version.manifest.lineage.run_id == told["best"]
    assert "| loss |" in (version.path / "README.md").read_text()
    assert not list((cluster.home / "runs").glob("*/export"))
