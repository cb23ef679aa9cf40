"""Two ranks as Ray actors in a replica's placement group: they answer, and fail as one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from cluster import local, processes
from cluster.library.manifest import Facts
from cluster.library.store import Library
from tests.parity.engine_fixtures import save_tiny
from tests.ray.cluster_fixtures import Rig
from tests.unit.text_fixtures import write_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
HI: Any = [{"role": "user", "content": "Hi"}]
NAME = "cut"
CONFIG = """
models:
  - model: cut
    num_cpus: 0.5
    drain_s: 2
    engine:
      tensor_parallel: TP
      device: cpu
      dtype: float32
      max_model_len: 1024
      threads: 1
"""


@pytest.fixture(scope="module")
def cut(cluster: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A tiny random Llama, served by two ranks."""
    place = tmp_path_factory.mktemp("cut")
    source = save_tiny(place / "model", vocab_size=400, max_position_embeddings=1024)
    write_tokenizer(source)
    Library(cluster.home / "library").publish(NAME, source, Facts())
    (place / "serve.yaml").write_text(CONFIG.replace("TP", "2"))
    cluster.run("deploy", str(place / "serve.yaml"), "--timeout", "120", timeout_s=150)
    yield cluster
    cluster.run("undeploy", NAME, check=False)


def rank_processes(rig: Rig) -> list[int]:
    """The processes of this cluster's rank actors, by what Ray calls them."""
    ours = processes.of_home(local.home_id(rig.home))
    return sorted(p.pid for p in ours if p.alive() and "RankActor" in p.name)


def say(rig: Rig, max_tokens: int = 3) -> str | None:
    api = openai.OpenAI(
        base_url=f"{rig.cluster.serve_url}/v1", api_key=rig.api_key, max_retries=0, timeout=60
    )
    told = api.chat.completions.create(
        model=NAME, messages=HI, max_tokens=max_tokens, temperature=0.0
    )
    return told.choices[0].message.content


def back(rig: Rig, within_s: float) -> str | None:
    """Wait until the model answers again."""
    until = time.monotonic() + within_s
    while True:
        try:
            return say(rig)
        except openai.APIError:
            assert time.monotonic() < until, "the replica did not come back"
            time.sleep(0.2)


def test_sizes_that_do_not_divide_are_refused_before_anything_is_deployed(
    cut: Rig, tmp_path: Path
) -> None:
    config = tmp_path / "three.yaml"
    config.write_text(CONFIG.replace("TP", "3"))
    ran = cut.run("deploy", str(config), check=False)
    assert ran.returncode == 1
    assert "engine.tensor_parallel=3 does not divide num_attention_heads=4" in ran.stderr
    assert "use 1 or 2" in ran.stderr
    assert say(cut)


def test_T30_a_rank_that_dies_takes_its_replica_and_leaves_no_orphan(cut: Rig) -> None:
    first, before = say(cut), rank_processes(cut)
    assert len(before) == 2
    answer = requests.post(
        f"{cut.cluster.serve_url}/v1/chat/completions",
        json={"model": NAME, "messages": HI, "stream": True, "max_tokens": 900, "seed": 1},
        headers={"Authorization": f"Bearer {cut.api_key}"},
        stream=True,
        timeout=60,
    )
    lines: list[bytes] = []
    for line in answer.iter_lines(chunk_size=1):
        lines.append(line)
        if len(lines) == 10:
            os.kill(before[-1], signal.SIGKILL)
    told = [line for line in lines if line]
    assert "error" in json.loads(told[-1].removeprefix(b"data: ")), told[-1]
    assert b"data: [DONE]" not in told

    assert back(cut, 90) == first, "rebuilt whole, with the same weights"
    after = rank_processes(cut)
    assert len(after) == 2
    assert not set(before) & set(after), "the whole replica was replaced"


def test_T33_a_rank_that_hangs_is_found_by_its_health_and_replaced(cut: Rig) -> None:
    first, before = say(cut), rank_processes(cut)
    os.kill(before[-1], signal.SIGSTOP)  # every process is alive, no token comes any more

    def ready() -> int:
        return requests.get(f"{cut.cluster.serve_url}/readyz", timeout=10).status_code

    until = time.monotonic() + 60  # the target is 12: one period, and the bound of one probe
    while ready() != 503:
        assert time.monotonic() < until, "nobody noticed"
        time.sleep(0.2)
    assert back(cut, 150) == first
    until = time.monotonic() + 30  # what is stopped hears no SIGTERM, and is killed after its drain
    while set(before) & set(rank_processes(cut)):
        assert time.monotonic() < until, "a rank was left over"
        time.sleep(0.2)
    until = time.monotonic() + 15
    while ready() != 200:
        assert time.monotonic() < until
        time.sleep(0.2)
