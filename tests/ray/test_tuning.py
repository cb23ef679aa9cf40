"""``roundhouse tune`` on a cluster of two cores, with trials of two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.library.store import Library
from tests.ray.cluster_fixtures import Rig
from tests.ray.test_training import NAME, write_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def test_tc38_trials_of_two_ranks_end_a_poor_one_early_and_the_best_is_published(
    cluster: Rig, tmp_path: Path
) -> None:
    """One after the other: the third is behind two at its first look, long before its end."""
    tune = {
        "space": {"optim.lr": {"grid": [1e-9, 1e-2, 1e-10]}},
        "metric": "loss",
        "scheduler": {"kind": "asha", "grace": 1, "reduction": 3},
        "concurrent": 1,
    }
    run = {"steps": 200, "num_cpus": 1, "evaluate_every": 10}
    config = write_config(cluster, tmp_path, run, tune=tune)
    before = len(Library(cluster.home / "library").versions(NAME))
    told = json.loads(cluster.run("tune", str(config), "--json", timeout_s=360).stdout)
    states = {one["point"]["optim.lr"]: one["state"] for one in told["trials"]}
    assert states == {1e-9: "succeeded", 1e-2: "succeeded", 1e-10: "ended early"}
    ended = next(one for one in told["trials"] if one["state"] == "ended early")
    assert ended["steps"] < 200
    assert "  stopped  " in cluster.run("jobs", "list").stdout
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
