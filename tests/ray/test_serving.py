"""Deploy, ask, promote, kill: the serving path on a cluster, through the user's own door."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from cluster.library.manifest import Facts
from cluster.library.store import Library
from tests.ray.cluster_fixtures import Rig
from tests.unit.serving_fixtures import publish, write_model

pytestmark = pytest.mark.ray
HI: Any = [{"role": "user", "content": "Hi"}]
TINY = """
models:
  - model: tiny
    drain_s: 5
    engine: {kind: fake, token_delay_s: 0.02}
"""
OTHER = """
models:
  - model: other
    drain_s: 2
    engine: {kind: fake}
limits: {max_new_tokens: 300}
"""
BROKEN = """
models:
  - model: broken
    engine: {kind: fake}
"""


@pytest.fixture(scope="module")
def served(cluster: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """The cluster with ``tiny@1`` and ``tiny@2`` in its library, the first of them live."""
    place = tmp_path_factory.mktemp("serving")
    library = Library(cluster.home / "library")
    publish(library, place, "tiny", "a")
    library.move_alias("tiny", "champion", 1, None, "test")
    publish(library, place, "tiny", "b")
    deploy(cluster, place, TINY)
    yield cluster
    for name in ("broken", "other", "tiny"):
        cluster.run("undeploy", name, check=False)


def deploy(rig: Rig, place: Path, text: str, check: bool = True) -> tuple[int, str]:
    path = place / "serve.yaml"
    path.write_text(text)
    ran = rig.run("deploy", str(path), "--timeout", "90", check=check)
    return ran.returncode, ran.stdout + ran.stderr


def client(rig: Rig, key: str | None = None) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{rig.cluster.serve_url}/v1",
        api_key=key or rig.api_key,
        max_retries=0,
        timeout=60,
    )


def pids(rig: Rig) -> dict[str, int]:
    """The process of each application's one replica."""
    apps = rig.cluster.json("GET", "/api/serve/applications/")["applications"]
    return {
        name: replica["pid"]
        for name, app in apps.items()
        for deployment in app["deployments"].values()
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING"
    }


def version(rig: Rig, model: str = "tiny") -> str | None:
    return (
        client(rig)
        .chat.completions.create(model=model, messages=HI, max_tokens=2)
        .system_fingerprint
    )


def test_the_official_client_works_over_http(served: Rig) -> None:
    api = client(served)
    plain = api.chat.completions.create(model="tiny", messages=HI, max_tokens=5, seed=1)
    assert plain.usage
    assert (plain.usage.completion_tokens, plain.system_fingerprint) == (5, "tiny@1")
    stream = api.chat.completions.create(
        model="tiny", messages=HI, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage
    assert chunks[-1].usage.total_tokens == plain.usage.total_tokens
    done = api.completions.create(model="tiny@1", prompt=["a", "b"], max_tokens=3)
    assert [choice.index for choice in done.choices] == [0, 1]
    assert [model.id for model in api.models.list()] == ["tiny"]


def test_the_door_is_shut_without_a_key(served: Rig) -> None:
    url = served.cluster.serve_url
    for path in ("/v1/models", "/v1/chat/completions", "/docs", "/openapi.json", "/nix"):
        assert requests.get(f"{url}{path}", timeout=10).status_code == 401
    assert requests.get(f"{url}/readyz", timeout=10).json() == {"status": "ready"}
    with pytest.raises(openai.AuthenticationError):
        client(served, "rh-wrong").models.list()
    with pytest.raises(openai.NotFoundError, match="there are: tiny"):
        client(served).chat.completions.create(model="nix", messages=HI)


def test_T20_a_50_MB_body_over_http_is_413(served: Rig) -> None:
    head = {"Authorization": f"Bearer {served.api_key}"}
    url = f"{served.cluster.serve_url}/v1/chat/completions"

    def chunked() -> Iterator[bytes]:
        for _ in range(800):
            yield b"x" * 65_536

    for data in (b"x" * 50_000_000, chunked()):
        try:
            status = requests.post(url, data=data, headers=head, timeout=30).status_code
        except requests.ConnectionError:
            continue  # refused, and shut while the client was still sending
        assert status == 413
    assert version(served) == "tiny@1"


class Loop(threading.Thread):
    """A client that asks again and again, and writes down who answered."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(daemon=True)
        self._api, self._end = client(rig), threading.Event()
        self.versions: list[str] = []
        self.failures: list[str] = []

    def run(self) -> None:
        while not self._end.is_set():
            try:
                stream = self._api.chat.completions.create(
                    model="tiny", messages=HI, max_tokens=5, stream=True
                )
                who = {chunk.system_fingerprint for chunk in stream}
                assert len(who) == 1, who
                self.versions.append(str(who.pop()))
            except Exception as error:
                self.failures.append(repr(error))

    def finish(self) -> None:
        self._end.set()
        self.join(30)


def test_RC01_promotion_and_rollback_drop_no_request(served: Rig) -> None:
    before = pids(served)
    loops = [Loop(served) for _ in range(3)]
    for loop in loops:
        loop.start()
    time.sleep(0.5)
    said = served.run("promote", "tiny@2").stdout
    assert "tiny@2 answers" in said
    assert version(served) == "tiny@2"
    time.sleep(0.5)
    for loop in loops:
        loop.finish()
    for loop in loops:
        assert loop.failures == []
        assert loop.versions == sorted(loop.versions), "none goes back"
        assert set(loop.versions) == {"tiny@1", "tiny@2"}
    assert pids(served) == before, "in the same processes"
    with pytest.raises(openai.NotFoundError, match="versions of tiny that are: tiny@2"):
        version(served, "tiny@1")

    moved = json.loads(served.run("rollback", "tiny", "--json").stdout)
    assert (moved["before"], moved["to"], moved["live"]) == (2, 1, True)
    assert version(served) == "tiny@1"
    assert Library(served.home / "library").aliases("tiny") == {"champion": 1}


def test_a_promotion_of_what_does_not_exist_is_one_line(served: Rig) -> None:
    ran = served.run("promote", "tiny@9", check=False)
    assert (ran.returncode, len(ran.stderr.strip().splitlines())) == (1, 1)
    assert "versions 1, 2" in ran.stderr


def test_RC11_a_second_file_and_new_limits_leave_the_first_model(
    served: Rig, tmp_path: Path
) -> None:
    publish(Library(served.home / "library"), tmp_path, "other")
    before = pids(served)
    _, said = deploy(served, tmp_path, OTHER)
    assert "limits.max_new_tokens 4096 -> 300" in said
    assert "= model-tiny" in said
    after = pids(served)
    assert after["model-tiny"] == before["model-tiny"]
    # the gateway takes limits and models as it runs; code edited since the last deploy replaces it
    assert after["gateway"] == before["gateway"] or "gateway: new code" in said
    assert (version(served), version(served, "other")) == ("tiny@1", "other@1")
    with pytest.raises(openai.BadRequestError, match="more than the 300 allowed"):
        client(served).completions.create(model="tiny", prompt="a", max_tokens=301)
    said = served.run("undeploy", "other").stdout
    assert "- model-other" in said
    assert version(served) == "tiny@1"
    with pytest.raises(openai.NotFoundError):
        version(served, "other")


def test_chat_answers_a_piped_question(served: Rig) -> None:
    import subprocess

    ran = subprocess.run(
        served.command("chat", "tiny", "--max-tokens", "3"),
        input="Hi\n",
        env=served.env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip("\n")


def test_T31_a_model_that_cannot_start_is_told_without_a_traceback(
    served: Rig, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "broken")
    (source / "tokenizer.json").write_text("{}")
    Library(served.home / "library").publish("broken", source, Facts())
    code, said = deploy(served, tmp_path, BROKEN, check=False)
    assert code == 1
    assert "model-broken" in said
    assert "tokenizer" in said
    assert "Traceback" not in said
    assert version(served) == "tiny@1", "the others go on"
    served.run("undeploy", "broken")


def test_T29_a_replica_killed_mid_stream_ends_with_an_error_event(served: Rig) -> None:
    body = {"model": "tiny", "messages": HI, "stream": True, "max_tokens": 250}
    answer = requests.post(
        f"{served.cluster.serve_url}/v1/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {served.api_key}"},
        stream=True,
        timeout=30,
    )
    lines: list[bytes] = []
    for line in answer.iter_lines(chunk_size=1):
        lines.append(line)
        if len(lines) == 10:
            os.kill(pids(served)["model-tiny"], signal.SIGKILL)
    told = [line for line in lines if line]
    assert json.loads(told[-1].removeprefix(b"data: "))["error"]["code"] == "upstream_failed"
    assert b"data: [DONE]" not in told

    until = time.monotonic() + 60
    while True:  # rebuilt whole, with the version that the alias names
        try:
            assert version(served) == "tiny@1"
            return
        except openai.APIStatusError:
            assert time.monotonic() < until, "the replica did not come back"
            time.sleep(0.2)
