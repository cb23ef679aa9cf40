"""A second home uses the tier's cluster as one that somebody else started."""

from __future__ import annotations

import json

import pytest

from tests.ray.cluster_fixtures import Rig, discard, new_rig

pytestmark = pytest.mark.ray


def test_a_home_attaches_works_and_lets_go(cluster: Rig) -> None:
    there, guest = cluster.cluster, new_rig()
    words = [
        *("attach", "--dashboard", there.dashboard, "--serve", there.serve_url),
        *("--token-file", str(there.token_file), "--gcs-port", str(there.ports["gcs"]), "--json"),
    ]
    said = json.loads(guest.run(*words).stdout)
    assert said["address"] == there.address
    assert guest.cluster.processes == ()
    status = json.loads(guest.run("status", "--json").stdout)
    assert status["endpoint"] == f"{there.serve_url}/v1"
    assert len(status["nodes"]) == 1
    assert "runs already" in guest.run("up").stdout
    guest.run("keys", "add", "guest")
    assert "goes on" in guest.run("down").stdout
    assert guest.run("status", check=False).returncode == 1
    assert json.loads(cluster.run("status", "--json").stdout)["endpoint"] == status["endpoint"]
    discard(guest)
