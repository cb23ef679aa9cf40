"""Tokens are made once for an input, whoever asks, and kept within bounds."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.errors import ClusterError, ConfigError
from cluster.home import home
from tests.unit.data_fixtures import Loader, examples, jsonl, said, told
from train_jobs.data import store, tokenise
from train_jobs.data.dataset import Dataset, hashes_of, load_datasets
from train_jobs.data.files.row import Row
from train_jobs.data.settings import Data
from train_jobs.data.store import Builder, Cache, Tokens
from train_jobs.objectives.settings import DPO, CausalLM, ChatSFT, SimPO


@pytest.fixture
def load(tmp_path: Path) -> Loader:
    return Loader(tmp_path)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    made = [said(f"hello {number}", "there " * (number % 5 + 1)) for number in range(30)]
    return jsonl(tmp_path / "a.jsonl", made)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the encoder was given."""
    calls: list[int] = []
    real = tokenise.encode_rows

    def counting(work: tokenise.Work, batch: list[Row]) -> Any:
        calls.append(len(batch))
        return real(work, batch)

    monkeypatch.setattr(tokenise, "encode_rows", counting)
    return calls


def entries() -> list[Path]:
    return [e for e in (home() / "cache" / "tokens").iterdir() if not e.name.startswith(".")]


def test_the_second_load_encodes_nothing(load: Loader, rows: Path, encoded: list[int]) -> None:
    first = load(train=rows)
    assert encoded == [30]
    again = load(train=rows)
    assert encoded == [30]
    assert told(again) == told(first)
    # what is decided about whole examples asks for no new tokens
    load(train=rows, max_len=34, truncate="drop")
    load(train={"path": rows, "weight": 3}, deduplicate="exact", split=0.3)
    moved = rows.rename(rows.with_name("b.jsonl"))
    assert examples(load(train=moved))[0].where == f"{moved}:1"
    assert encoded == [30]


@pytest.mark.parametrize(
    "change",
    [
        lambda load, rows: {"train": jsonl(rows, [said("other", "rows")])},
        lambda load, rows: {"train": rows, "scrub": True},
        lambda load, rows: {"train": {"path": rows, "form": "messages"}},
        lambda load, rows: {"train": rows} if tokenizer_changed(load) else {},
    ],
    ids=["content", "scrub", "form", "tokenizer"],
)
def test_whatever_changes_tokens_makes_them_anew(
    load: Loader, rows: Path, encoded: list[int], change: Callable[[Loader, Path], dict[str, Any]]
) -> None:
    load(train=rows)
    load(**change(load, rows))
    assert len(encoded) == 2
    assert len(entries()) == 2


def tokenizer_changed(load: Loader) -> bool:
    path = load.base / "chat_template.jinja"
    path.write_text(path.read_text() + " ")
    return True


def test_equal_bytes_under_another_ending_are_read_anew(load: Loader, tmp_path: Path) -> None:
    content = gzip.compress(b'text\n"engine in stall"\n', mtime=0)
    for name in ("a.csv.gz", "a.tsv.gz"):
        (tmp_path / name).write_bytes(content)
    text = CausalLM(kind="causal_lm")
    quoted, plain = (load(text, train=tmp_path / name) for name in ("a.csv.gz", "a.tsv.gz"))
    assert told(quoted) != told(plain)  # a table with tabs has no quoting


def test_settings_of_the_loss_alone_do_not_count(tmp_path: Path, load: Loader) -> None:
    row = {"prompt": "hello", "chosen": "there", "rejected": "out"}
    path = jsonl(tmp_path / "a.jsonl", [row])
    for beta in (0.1, 0.2):
        load(DPO(kind="dpo", beta=beta), train=path)
    assert len(entries()) == 1
    load(SimPO(kind="simpo"), train=path)
    assert len(entries()) == 2


def test_a_run_that_fails_leaves_no_entry(load: Loader, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*[said("hello", "there")] * 1200, "oops"])
    with pytest.raises(ConfigError, match="a.jsonl:1201: not JSON"):
        load(train=path)
    assert entries() == []
    assert not list((home() / "cache" / "tokens").glob(".*.????????"))


def test_bad_rows_of_a_kept_entry_are_refused_when_they_must_be(
    load: Loader, tmp_path: Path, encoded: list[int]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [said("hello", "there"), "oops"])
    load(train=path, on_bad_row="skip", max_bad_share=0.5)
    with pytest.raises(ConfigError, match="a.jsonl:2: not JSON"):
        load(train=path)
    assert encoded == [2]


def test_a_torn_entry_is_made_anew(load: Loader, rows: Path, encoded: list[int]) -> None:
    first = told(load(train=rows))
    [entry] = entries()
    (entry / "ids.bin").write_bytes(b"x")
    assert told(load(train=rows)) == first
    (entry / "index.json").write_text("{")
    assert told(load(train=rows)) == first
    assert len(encoded) == 3


def together(folder: str, barrier: Any, told: Any) -> None:
    os.environ["ROUNDHOUSE_HOME"] = folder
    counted: list[int] = []
    real = tokenise.encode_rows

    def slow(work: Any, batch: Any) -> Any:
        counted.append(len(batch))
        time.sleep(0.3)
        return real(work, batch)

    tokenise.encode_rows = slow
    base = Path(folder).parent
    barrier.wait(20)
    load = Loader.__new__(Loader)
    load.base = base / "model"
    data = load(train=base / "a.jsonl")
    told.put((len(counted), data.tokens))


def test_ranks_that_start_at_once_tokenise_once(load: Loader, rows: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.SimpleQueue()
    arguments = (str(home()), barrier, queue)
    ranks = [context.Process(target=together, args=arguments, daemon=True) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    answers = [queue.get() for _ in ranks]
    assert sorted(count for count, _ in answers) == [0, 0, 1]
    assert len({tokens for _, tokens in answers}) == 1


def test_who_waits_too_long_for_another_is_told(
    load: Loader, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "WAIT_S", 0.1)
    load(train=rows)
    [entry] = entries()
    cache = Cache()
    with cache.making(entry.name):
        shutil.rmtree(entry)
        with pytest.raises(ClusterError, match="another process holds"):
            load(train=rows)


def entry_of(cache: Cache, key: str, age_s: float) -> None:
    cache.write(key, [Builder().chunk()], "text")
    used = time.time() - age_s
    os.utime(cache.folder / key, (used, used))


def test_the_longest_unused_entries_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "tokens", limit=1)
    for key, age_s in (("new", 10.0), ("old", 9000.0), ("older", 10000.0)):
        (tmp_path / "tokens").mkdir(exist_ok=True)
        cache.limit = 1 << 30
        entry_of(cache, key, age_s)
    size = sum(f.stat().st_size for f in (tmp_path / "tokens" / "old").iterdir())
    cache.limit = 2 * size
    cache.shrink(keep="new")
    assert {e.name for e in cache.folder.iterdir()} == {"new", "old"}
    cache.limit = 1
    cache.shrink(keep="new")
    assert {e.name for e in cache.folder.iterdir()} == {"new"}, "what was just used stays"


def test_finding_an_entry_counts_as_use(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "tokens")
    entry_of(cache, "key", 9000.0)
    before = (cache.folder / "key").stat().st_mtime
    assert cache.find("key", ["a"]) is not None
    assert (cache.folder / "key").stat().st_mtime > before + 8000


def test_tokens_are_mapped_and_labels_come_back(tmp_path: Path) -> None:
    from train_jobs.data.example import Document, Example

    made = [
        Example((Document("", (1, 2, 3), (False, True, True)),), ("a", ("b", 2.5))),
        Example((Document("", (4,), (True,)), Document("", (5, 6), (False, True)))),
        Example((Document("", (7, 8), (True, True)),), {"answer": [1, None]}),
        Example((Document("", (9, 9), (True, True)),), False),
    ]
    cache, built = Cache(tmp_path / "tokens"), Builder()
    for number, example in enumerate(made):
        built.add(example, number % 2, number + 1, number)
    cache.write("key", [built.chunk(), Builder().chunk()], "text")
    tokens = cache.find("key", ["x.jsonl", "y.jsonl"])
    assert isinstance(tokens, Tokens)
    assert isinstance(tokens.arrays["ids"], np.memmap)
    found = [tokens.example(number) for number in range(len(tokens))]
    assert [e.where for e in found] == ["x.jsonl:1", "y.jsonl:2", "x.jsonl:3", "y.jsonl:4"]
    assert [[(d.ids, d.trained) for d in e.documents] for e in found] == [
        [(d.ids, d.trained) for d in e.documents] for e in made
    ]
    assert [e.label for e in found] == [("a", ("b", 2.5)), None, {"answer": (1, None)}, False]
    assert not list(tmp_path.rglob("*.npy"))
    assert json.loads((cache.folder / "key" / "index.json").read_text())["form"] == "text"


class FakeRay(SimpleNamespace):
    """Runs a task when its result is asked for, and remembers how many waited at once."""

    def __init__(self) -> None:
        super().__init__(exceptions=SimpleNamespace(GetTimeoutError=TimeoutError))
        self.waiting = self.most = self.tasks = 0

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **options: Any) -> Any:
        assert options["num_cpus"] == 0, "the ranks hold all CPUs and wait for this task"

        def wrap(function: Any) -> Any:
            def start(*arguments: Any) -> Any:
                self.waiting += 1
                self.tasks += 1
                self.most = max(self.most, self.waiting)
                return lambda: function(*arguments)

            return SimpleNamespace(remote=start)

        return wrap

    def get(self, reference: Any, timeout: float) -> Any:
        assert timeout > 0
        self.waiting -= 1
        return reference()


def test_many_rows_go_to_tasks_in_a_ray_job_and_come_back_in_order(
    load: Loader, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = told(load(train=rows))
    shutil.rmtree(home() / "cache")
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(tokenise, "BATCH", 3)
    load(train=rows)
    assert fake.tasks == 0, "few rows are not worth a task"
    shutil.rmtree(home() / "cache")
    monkeypatch.setattr(tokenise, "MANY", 20)
    assert told(load(train=rows)) == here
    assert (fake.tasks, fake.most) == (10, 3)


def test_the_head_of_a_source_is_enough_to_refuse_a_row_by_and_is_never_taken_for_the_whole(
    tmp_path: Path, load: Loader
) -> None:
    def read(**data: Any) -> Dataset:
        return load_datasets(Data(**data), ChatSFT(), load.base, head=4)[0]

    good = [said("x", f"y{n}") for n in range(10)]
    path = jsonl(tmp_path / "a.jsonl", good)
    assert (read(train=path).partial, read(train=path).examples) == (True, 4)
    few = jsonl(tmp_path / "few.jsonl", good[:4])
    assert (read(train=few).partial, read(train=few).examples) == (False, 4)
    assert load(train=path).examples == 10
    assert not read(train=path).partial, "all of its tokens are there by now"
    # what other rows could make good is not refused: a split of nothing, doubles of each other
    same = jsonl(tmp_path / "same.jsonl", [good[0]] * 10 + good)
    assert read(train=same, split=0.001, deduplicate="exact").examples == 4
    late = jsonl(tmp_path / "late.jsonl", [*good, "{", *good])
    assert read(train=late).examples == 4, "the job will find it"
    early = jsonl(tmp_path / "early.jsonl", [good[0], "{", *good])
    with pytest.raises(ConfigError, match=r"early\.jsonl:2: "):
        read(train=early)


def test_data_hashes_cover_every_file(tmp_path: Path, load: Loader, rows: Path) -> None:
    import hashlib

    other = jsonl(tmp_path / "b.jsonl", [said("x", "y")])
    data = load(train=[rows, other])
    expected = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (rows, other)}
    assert data.hashes == expected
    (tmp_path / "held").mkdir()
    held = jsonl(tmp_path / "held" / "a.jsonl", [said("p", "q")])
    train, heldout = load.both(train=rows, heldout=held)
    assert heldout is not None
    assert [*train.hashes, *heldout.hashes] == ["a.jsonl", "held/a.jsonl"]
    assert load(train=rows).sha256 != data.sha256


def test_a_language_model_reads_a_large_text_without_holding_it(
    tmp_path: Path, load: Loader
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("hello there\n" * 3000)
    data = load(CausalLM(kind="causal_lm"), train=path)
    assert data.examples == 3000
    assert data.rows[-1][0].documents[0].ids == data.rows[0][0].documents[0].ids


def test_tc12_what_a_resume_looks_at_is_what_the_run_has_read(load: Loader, tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [said("where", "stall 3")])
    (tmp_path / "held").mkdir()
    jsonl(tmp_path / "held" / "a.jsonl", [said("when", "at noon")])
    named: dict[str, Any] = {
        "train": str(tmp_path / "*.jsonl"),
        "heldout": str(tmp_path / "held" / "a.jsonl"),
    }
    train, heldout = load.both(**named)
    assert heldout is not None
    found = hashes_of(Data(**named))
    assert set(found) == {"a.jsonl", "held/a.jsonl"}
    assert found == {**train.hashes, **heldout.hashes}
