"""Weights from a trainer to two sharded replicas that answer all the while, by the shelf."""

from __future__ import annotations

import json
import subprocess
import sys
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
from tests.parity.adapter_fixtures import save_adapter
from tests.parity.engine_fixtures import save_tiny
from tests.ray.cluster_fixtures import ROOT, Rig
from tests.unit.text_fixtures import write_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
NAME = "pair"
CONFIG = """
models:
  - model: pair@live
    replicas: 2
    num_cpus: 0.25
    drain_s: 5
    adapters: [extra@live]
    engine:
      tensor_parallel: 2
      device: cpu
      dtype: float32
      max_model_len: 256
      max_lora_rank: 8
      threads: 1
      weights: shared
"""
PUT = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from cluster.session import connect, current
from cluster.weights import client
from cluster.weights.files import small_files
connect(current())
ref, folder = sys.argv[1], Path(sys.argv[2])
if ref.startswith("-"):
    client.withdraw(ref[1:])
else:
    tensors = load_file(next(folder.glob("*.safetensors"))).items()
    plan = None
    if sys.argv[3:] == ["and lie"]:  # one number of the second rank's part changes after its hash
        import numpy
        victim, true, seen = "model.layers.0.mlp.down_proj.weight", client.hash_of, []
        plan = {victim: (1, 2)}
        mine = [a for a in client.cut(client.array_of(dict(tensors)[victim]), 1, 2)][1]
        wrong = true(mine)
        def lie(array):
            told = true(array)
            if told == wrong:
                array.reshape(-1)[7] += 1.0
                seen.append(told)
            return told
        client.hash_of = lie
    elif len(sys.argv) > 3:  # killed in the middle
        import os
        writer, some = client.Writer(), list(tensors)[:2]
        writer.ship("torn", some)
        os.kill(os.getpid(), 9)
    client.publish(ref, small_files(folder), tensors, "pair@1", plan)
    assert plan is None or len(seen) == 1
"""
LORA = "pair@run.lora.1"
"""Adds to pair@1: a run's matrices without the weights below them."""
EXTRA = ("extra@run.lora.1", "extra@run.lora.2")
"""The same of a run with a name of its own; both add to pair@1, too."""
TOO_WIDE = "extra@run.lora.3"
ASKED = ([5, 6, 7, 8], [9, 3, 11, 40, 41, 42, 43], list(range(20, 60)))
"""Prompts: the last is longer than a block of the cache, so its beginning is kept there."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Versions of one tiny Llama by their reference; they differ in their numbers alone."""
    refs = ("pair@1", "pair@run.a.1", "pair@run.a.2", "pair@run.a.3")
    made = {}
    for seed, ref in enumerate(refs):
        folder = tmp_path_factory.mktemp("pair") / "model"
        made[ref] = save_tiny(folder, seed=seed, vocab_size=400)
        write_tokenizer(folder)
    for seed, ref in enumerate((LORA, *EXTRA, TOO_WIDE), 1):
        rank = 16 if ref == TOO_WIDE else 4
        made[ref] = save_adapter(made["pair@1"], tmp_path_factory.mktemp("lora"), seed, r=rank)
        told = json.loads((made[ref] / "adapter_config.json").read_text())
        told["base_model_name_or_path"] = "pair@1"
        (made[ref] / "adapter_config.json").write_text(json.dumps(told))
    return made


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, list[str]]:
    """What a fresh model of each version answers, by transformers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from cluster.text.chat import ChatText

    told: dict[str, list[str]] = {}
    for ref, folder in folders.items():
        added = (folder / "adapter_config.json").exists()
        whole = folders["pair@1"] if added else folder
        model = AutoModelForCausalLM.from_pretrained(
            whole, dtype=torch.float32, trust_remote_code=False
        )
        if added:
            model = PeftModel.from_pretrained(model, folder)
        text = ChatText.load(whole)
        told[ref] = []
        for ids in ASKED:
            asked = torch.tensor([ids])
            made = model.generate(input_ids=asked, max_new_tokens=8, do_sample=False)
            told[ref].append(text.decode(made[0, len(ids) :].tolist()))
    assert len({str(texts) for texts in told.values()}) == len(told), "versions must differ"
    return told


@pytest.fixture(scope="module")
def pair(
    cluster: Rig, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rig]:
    Library(cluster.home / "library").publish(NAME, folders["pair@1"], Facts())
    config = tmp_path_factory.mktemp("pair") / "serve.yaml"
    config.write_text(CONFIG)
    cluster.run("deploy", str(config), "--timeout", "170", timeout_s=200)
    yield cluster
    cluster.run("undeploy", NAME, check=False)


def put(rig: Rig, ref: str, folder: Path, *more: str) -> int:
    """Publish from a process of its own, which then ends: what a trainer does."""
    ran = subprocess.run(
        [sys.executable, "-c", PUT, ref, str(folder), *more],
        cwd=ROOT, env=rig.env, timeout=120, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == (-9 if "and die" in more else 0), ran.stderr
    return ran.returncode


def ask(rig: Rig, at: int = 0, model: str = NAME) -> tuple[str | None, str]:
    """Return which version answered, and what."""
    api = openai.OpenAI(
        base_url=f"{rig.cluster.serve_url}/v1", api_key=rig.api_key, max_retries=0, timeout=60
    )
    asked: Any = list(ASKED[at])
    told = api.completions.create(model=model, prompt=asked, max_tokens=8, temperature=0.0)
    return told.system_fingerprint, told.choices[0].text


class Client(threading.Thread):
    """Asks again and again; writes down who answered what."""

    def __init__(self, rig: Rig, at: int, model: str = NAME) -> None:
        super().__init__(daemon=True)
        self._rig, self.at, self._end = rig, at, threading.Event()
        self._model = model
        self.said: list[tuple[str | None, str]] = []
        self.failures: list[str] = []

    def run(self) -> None:
        while not self._end.is_set():
            try:
                self.said.append(ask(self._rig, self.at, self._model))
            except Exception as error:
                self.failures.append(repr(error))
            time.sleep(0.1)  # two cores also hold the trainer, four ranks and the proxy

    def finish(self) -> None:
        self._end.set()
        self.join(60)


def until_all(rig: Rig, ref: str, seconds: float = 60.0, model: str = NAME) -> None:
    """Wait until only ``ref`` answers: eight answers in a row, of whatever replica.

    Of the model itself no replica holds another version then, but for what a LoRA adds to.
    """
    until, row = time.monotonic() + seconds, 0
    beside = {"pair@1"} if ref == LORA else set[str]()
    while row < 8 or (model == NAME and live(rig) - beside != {ref}):
        row = row + 1 if ask(rig, model=model)[0] == ref else 0
        assert time.monotonic() < until, f"{ref} does not answer alone: {live(rig)} are held"


def live(rig: Rig) -> set[str]:
    """Return the versions that replicas of the model hold, as the gateway heard last."""
    head = {"Authorization": f"Bearer {rig.api_key}"}
    told = requests.get(f"{rig.cluster.serve_url}/v1/models/{NAME}", headers=head, timeout=30)
    return set(told.json()["live"])


def test_RC01_SC10_new_weights_reach_two_sharded_replicas_without_a_lost_request(
    pair: Rig, folders: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    for at in range(len(ASKED)):
        assert ask(pair, at) == ("pair@1", expected["pair@1"][at]), "its prefixes are kept now"
    clients = [Client(pair, n % len(ASKED)) for n in range(8)]
    for client in clients:
        client.start()
    for ref in ("pair@run.a.1", "pair@run.a.2"):
        put(pair, ref, folders[ref])
        until_all(pair, ref)
    for client in clients:
        client.finish()
    order = ["pair@1", "pair@run.a.1", "pair@run.a.2"]
    for n, client in enumerate(clients):
        assert client.failures == []
        for who, said in client.said:
            assert said == expected[str(who)][n % len(ASKED)], f"{who} does not answer so"
    seen = {who for client in clients for who, _ in client.said}
    assert seen == set(order)
    assert ask(pair, 2, "pair@run.a.2") == ("pair@run.a.2", expected["pair@run.a.2"][2])


def test_RC03_a_trainer_killed_while_it_publishes_changes_nothing_and_may_try_again(
    pair: Rig, folders: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    ref = "pair@run.a.3"
    put(pair, ref, folders[ref], "and die")
    assert ask(pair, 1) == ("pair@run.a.2", expected["pair@run.a.2"][1])
    put(pair, ref, folders[ref])
    until_all(pair, ref)
    assert ask(pair, 1) == (ref, expected[ref][1])


def test_RC04_what_is_withdrawn_stops_answering_and_the_one_before_answers_again(
    pair: Rig, folders: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    put(pair, "-pair@run.a.3", folders["pair@1"])
    until_all(pair, "pair@run.a.2")
    assert ask(pair, 2) == ("pair@run.a.2", expected["pair@run.a.2"][2])
    for ref in ("-pair@run.a.2", "-pair@run.a.1"):
        put(pair, ref, folders["pair@1"])
    until_all(pair, "pair@1")
    assert ask(pair, 0) == ("pair@1", expected["pair@1"][0])


def failures(rig: Rig) -> dict[str, str]:
    told = json.loads(rig.run("status", "--json").stdout)["in_memory"]["models"]
    found: dict[str, str] = next(one["failed"] for one in told if one["name"] == NAME)
    return found


def test_RC02_a_shard_that_is_not_what_its_hash_says_is_taken_by_no_rank(
    pair: Rig, folders: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    bad, good, before = "pair@run.b.1", "pair@run.b.2", str(ask(pair)[0])
    clients = [Client(pair, at) for at in range(len(ASKED))]
    for client in clients:
        client.start()
    put(pair, bad, folders["pair@run.a.3"], "and lie")
    until = time.monotonic() + 60
    while not (told := failures(pair)):
        assert time.monotonic() < until, "nobody says that it could not be loaded"
    assert set(told) == {bad}
    assert "differs from its hash" in told[bad]
    assert f"{NAME}: {bad} could not be loaded: a shard of" in pair.run("status").stdout
    with pytest.raises(openai.NotFoundError, match="differs from its hash"):
        ask(pair, 0, bad)
    for client in clients:
        client.finish()
        assert client.failures == []
        assert set(client.said) == {(before, expected[before][client.at])}
    put(pair, good, folders["pair@run.a.2"])
    until_all(pair, good)
    assert ask(pair, 1) == (good, expected["pair@run.a.2"][1]), "the ranks are still together"
    assert failures(pair) == {}
    for ref in (good, bad):
        put(pair, f"-{ref}", folders["pair@1"])
    until_all(pair, before)


def test_SC11_what_a_lora_run_has_learnt_travels_alone_and_answers_beside_its_base(
    pair: Rig, folders: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    put(pair, LORA, folders[LORA])
    until_all(pair, LORA)
    for at in range(len(ASKED)):
        assert ask(pair, at) == (LORA, expected[LORA][at])
        assert ask(pair, at, "pair@1") == ("pair@1", expected["pair@1"][at])


def test_SC11_an_adapter_that_a_run_goes_on_training_answers_under_its_own_name(
    pair: Rig, folders: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'extra' here"):
        ask(pair, model="extra")
    before = ask(pair)[0]
    put(pair, EXTRA[0], folders[EXTRA[0]])
    until = time.monotonic() + 60
    while "extra@live" not in models(pair):
        assert time.monotonic() < until, "no replica answers for it"
        time.sleep(0.1)
    until_all(pair, EXTRA[0], model="extra@live")
    clients = [Client(pair, n % len(ASKED), "extra") for n in range(4)]
    for client in clients:
        client.start()
    put(pair, EXTRA[1], folders[EXTRA[1]])
    until_all(pair, EXTRA[1], model="extra")
    put(pair, TOO_WIDE, folders[TOO_WIDE])
    put(pair, f"-{EXTRA[0]}", folders["pair@1"])
    until = time.monotonic() + 60
    while "r=16 is outside 1 to 8" not in refusal(pair, TOO_WIDE):
        assert time.monotonic() < until, "nobody says why it is not taken"
        time.sleep(0.2)
    for client in clients:
        client.finish()
        assert client.failures == []
    for n, client in enumerate(clients):
        for who, said in client.said:
            assert said == expected[str(who)][n % len(ASKED)], f"{who} does not answer so"
    assert {who for client in clients for who, _ in client.said} == {*EXTRA}
    for at in range(len(ASKED)):
        assert ask(pair, at, "extra@live") == (EXTRA[1], expected[EXTRA[1]][at])
        assert ask(pair, at, "pair@1") == ("pair@1", expected["pair@1"][at])
    assert ask(pair)[0] == before, "the model is not touched"


def refusal(rig: Rig, model: str) -> str:
    """Return why a version does not answer."""
    with pytest.raises(openai.NotFoundError) as told:
        ask(rig, model=model)
    return str(told.value)


def models(rig: Rig) -> set[str]:
    """Return what may be asked for."""
    api = openai.OpenAI(base_url=f"{rig.cluster.serve_url}/v1", api_key=rig.api_key)
    return {one.id for one in api.models.list()}
