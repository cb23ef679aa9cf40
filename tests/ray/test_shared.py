"""Ranks of one node that map one copy of their weights from its shelf."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.parity.engine_fixtures import save_tiny
from tests.ray.cluster_fixtures import ROOT, Rig
from tests.ray.share_work import VERSION

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
WIDE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "initializer_range": 0.05,
}
"""Tens of millions of parameters: pieces that Ray keeps in shared memory, not in a reply."""
KILL = """
from cluster.session import connect, current
connect(current())
import ray
from cluster.weights.actors import agents
for agent in agents().values():
    ray.kill(agent)
"""


class Loader:
    """A process that loads as a rank does (`share_work`)."""

    def __init__(self, rig: Rig, warm: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray.share_work", warm],
            cwd=ROOT, env=rig.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, *what: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(" ".join(map(str, what)) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):  # Ray says things of its own
                return json.loads(line)
        raise AssertionError(f"the process ended before it answered {what}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait(10)


@pytest.fixture(scope="module")
def two(cluster: Rig, models: dict[str, Path]) -> Iterator[tuple[Loader, Loader]]:
    with ExitStack() as stack:
        made = [Loader(cluster, models["warm"]) for _ in range(2)]
        for loader in made:
            stack.callback(loader.end)
        yield made[0], made[1]


def forms(rig: Rig) -> dict[str, Any]:
    """What ranks share on the cluster's one node, by its name on the shelf."""
    told = json.loads(rig.run("shelf", "list", "--json").stdout)
    [node] = told["nodes"].values()
    return {key: one for key, one in node["versions"].items() if key.startswith(f"{VERSION}#")}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wide")
    return {
        "warm": save_tiny(folder / "warm"),
        "llama": save_tiny(folder / "llama", seed=1, num_hidden_layers=8, **WIDE),
        "olmo2": save_tiny(folder / "olmo2", "olmo2", seed=1, **WIDE),
    }


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_RC10_a_second_rank_maps_what_the_first_has_packed(
    cluster: Rig, models: dict[str, Path], two: tuple[Loader, Loader], quantization: str
) -> None:
    first, second = two
    private = first.ask("load", models["llama"], "packed", quantization)
    said, weights = first.ask("say")["said"], private["weights"]
    first.ask("leave")
    assert private["private"] > 0.9 * weights, "else this measures nothing"

    assert first.ask("load", models["llama"], "shared", quantization)["weights"] == weights
    assert second.ask("load", models["llama"], "shared", quantization)["private"] < 0.05 * weights
    one, other = first.ask("say"), second.ask("say")
    assert one["said"] == other["said"] == said
    assert other["mapped"] >= 0.95 * weights
    assert first.ask("write")["refused"]
    [told] = forms(cluster).values()
    assert told["users"] == 2
    first.ask("leave")
    assert second.ask("say")["said"] == said
    [told] = forms(cluster).values()
    assert told["users"] == 1
    second.ask("leave")
    assert not forms(cluster), "what nobody maps any more leaves the shelf"


def test_RC10_layers_of_other_models_are_shared_as_well(
    cluster: Rig, models: dict[str, Path], two: tuple[Loader, Loader]
) -> None:
    first, second = two
    weights = first.ask("load", models["olmo2"], "packed", "none")["weights"]
    said = first.ask("say")["said"]
    first.ask("leave")
    first.ask("load", models["olmo2"], "shared", "none")
    second.ask("load", models["olmo2"], "shared", "none")
    one, other = first.ask("say"), second.ask("say")
    assert one["said"] == other["said"] == said
    assert min(one["mapped"], other["mapped"]) >= 0.95 * weights
    [told] = forms(cluster).values()
    assert told["users"] == 2
    first.ask("leave"), second.ask("leave")


def test_RC10_a_dead_agent_takes_no_weights_with_it(
    cluster: Rig, models: dict[str, Path], two: tuple[Loader, Loader]
) -> None:
    first, second = two
    first.ask("load", models["llama"], "shared", "none")
    said = first.ask("say")["said"]
    subprocess.run([sys.executable, "-c", KILL], cwd=ROOT, env=cluster.env, timeout=60, check=True)
    assert first.ask("say")["said"] == said
    second.ask("load", models["llama"], "shared", "none")  # it packs anew
    assert second.ask("say")["said"] == said
    first.ask("leave"), second.ask("leave")
