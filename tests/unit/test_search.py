"""A search: which trials there are, what each runs, and what becomes of them. No Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import dump, load
from cluster.errors import ConfigError, JobError, NotEnough
from cluster.library.manifest import Facts
from cluster.library.store import Library
from tests.unit.library_fixtures import model
from train_jobs import tune
from train_jobs.config import FinetuneConfig
from train_jobs.export import EXPORT, HELD
from train_jobs.jobs import state_of
from train_jobs.runs import RunDir
from train_jobs.search import Tune
from train_jobs.tune_cli import line_of


def config(**changes: Any) -> FinetuneConfig:
    fields: dict[str, Any] = {
        "model": "m@1",
        "data": {"train": "/t.jsonl", "heldout": "/h.jsonl"},
        "batch": {"total": 4},
        "run": {"workers": 2, "steps": 2},
        "tune": {"space": {"optim.lr": {"grid": [1e-5, 1e-3]}}},
    }
    return FinetuneConfig.model_validate(fields | changes)


def test_grids_are_crossed_and_the_rest_is_drawn_the_same_for_a_seed() -> None:
    space = {
        "optim.lr": {"loguniform": [1e-5, 1e-2]},
        "batch.total": {"grid": [4, 8]},
        "adapter.r": {"grid": [4, 16, 64]},
        "optim.weight_decay": {"choice": [0.0, 0.1]},
        "optim.warmup_ratio": {"uniform": [0.0, 0.5]},
    }
    told = Tune.model_validate({"space": space, "trials": 5})
    points = told.points()
    assert len(points) == told.combinations == 30
    assert points == told.points()
    assert points != told.model_copy(update={"seed": 1}).points()
    assert {(p["batch.total"], p["adapter.r"]) for p in points} == {
        (total, r) for total in (4, 8) for r in (4, 16, 64)
    }
    rates = [p["optim.lr"] for p in points]
    assert all(isinstance(lr, float) and 1e-5 <= lr <= 1e-2 for lr in rates)
    assert sum(lr < 10**-3.5 for lr in rates if isinstance(lr, float)) > 8  # half of them by powers
    assert {p["optim.weight_decay"] for p in points} == {0.0, 0.1}


def test_a_power_of_ten_is_a_number_also_after_json(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(dump(config()))
    told = load(tmp_path / "c.json", FinetuneConfig).tune
    assert told is not None
    assert told.points() == [{"optim.lr": 1e-5}, {"optim.lr": 1e-3}]


def test_a_trial_is_the_run_with_other_values_that_publishes_nothing_itself() -> None:
    made = tune.config_of(config(), {"optim.lr": 1e-5, "run.steps": 7})
    assert (made.optim.lr, made.run.steps, made.run.workers) == (1e-5, 7, 2)
    assert made.publish.hold
    assert made.tune is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tune": None}, "has no search"),
        ({"data": {"train": "/t.jsonl"}}, "rows that no trial learns from"),
        ({"tune": {"space": {"optim.rate": {"grid": [1]}}}}, "unknown key 'rate'"),
        ({"tune": {"space": {"optim.lr": {"grid": [-1]}}}}, "optim.lr: Input should be greater"),
        (
            {"tune": {"space": {"optim.lr": {"grid": [1]}}, "scheduler": {}}},
            "run.evaluate_every",
        ),
    ],
)
def test_a_search_that_cannot_be_run_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tune.check(config(**changes))


def test_tc38_as_many_trials_at_once_as_have_room_and_never_none() -> None:
    assert tune.concurrent(config(), cpus=2, gpus=0) == 1
    many = config(tune={"space": {"optim.lr": {"grid": [1e-5, 1e-3]}}, "trials": 8})
    assert tune.concurrent(many, cpus=8, gpus=0) == 4
    assert tune.concurrent(config(), cpus=1, gpus=0) == 1
    small = config(run={"workers": 2, "steps": 2, "num_cpus": 0.5})
    assert tune.concurrent(small, cpus=2, gpus=0) == 2
    gpus = config(run={"workers": 2, "steps": 2, "num_gpus": 1})
    assert tune.concurrent(gpus, cpus=64, gpus=4) == 2


def test_a_search_may_lower_how_many_run_at_once_and_not_raise_it() -> None:
    for wanted, at_once in ((1, 1), (3, 3), (9, 4), (None, 4)):
        grid = {"optim.lr": {"grid": [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]}}
        told = config(tune={"space": grid, "concurrent": wanted})
        assert tune.concurrent(told, cpus=8, gpus=0) == at_once
    few = config(tune={"space": {"optim.lr": {"grid": [1e-5]}}})
    assert tune.concurrent(few, cpus=64, gpus=0) == 1


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("ROUNDHOUSE_HOME", str(tmp_path / "home"))
    Library().publish("m", model(tmp_path / "base"), Facts())
    return RunDir.create("tiny-tune")


def trial(search: RunDir, lr: float, value: float, whole: bool = True) -> RunDir:
    run = tune.begin(search, tune.config_of(config(), {"optim.lr": lr}), {"optim.lr": lr})
    run.append({"event": "evaluated", "when": "before", "loss": 9.0})
    run.append({"event": "evaluated", "when": "after", "loss": value})
    if whole:
        run.finish({"status": "succeeded"})
        model(run.path / EXPORT, fill=int(value * 10))
        (run.path / HELD).write_text(Facts(base="m@1", notes=(f"lr {lr:g}",)).model_dump_json())
    return run


def test_the_best_whole_trial_becomes_the_next_version(search: RunDir) -> None:
    best, other = trial(search, 1e-3, 1.5), trial(search, 1e-5, 2.5)
    ended = trial(search, 1e-4, 1.0, whole=False)  # it has no model, and wrote no result
    told = config().tune
    assert told is not None
    trials = tune.collect(search, told, {})
    assert [one.state for one in trials] == ["ended early", "succeeded", "succeeded"]
    result = tune.finish(search, config(), told, trials)
    assert (result["best"], result["value"], result["published"]) == (best.id, 1.5, "m@2")
    assert Library().get("m", 2).manifest.notes == ("lr 0.001",)
    assert not (other.path / EXPORT).exists()
    assert json.loads(search.result.read_text())["trials"][1]["run"] == best.id
    assert state_of(ended, {}) == "stopped"
    assert (ended.read_result() or {})["search"] == search.id


def test_a_trial_without_room_waits_where_all_see_it_and_does_not_fail(
    search: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([{"CPU": 1.0}, {"CPU": 0.5}, {"CPU": 2.0}, {"CPU": 2.0}])
    launches: list[str] = []

    def launch(run: RunDir, config: FinetuneConfig, attempt: object, resume: bool) -> int:
        launches.append(run.id)
        if len(launches) == 1:  # another has taken what was free
            run.fail("wanted: 2 CPU")
            raise NotEnough("wanted: 2 CPU")
        assert run.read_result() is None, "what came to nothing has left nothing"
        return 0

    monkeypatch.setattr(tune, "free_resources", lambda: next(free))
    monkeypatch.setattr(tune, "POLL_S", 0.0)
    monkeypatch.setattr("train_jobs.launch.launch", launch)
    run = tune.begin(search, tune.config_of(config(), {"optim.lr": 1e-5}), {"optim.lr": 1e-5})
    failed: list[BaseException] = []
    tune._train(run, search, {"event": "trial", "run": run.id}, failed)
    assert failed == []
    assert launches == [run.id, run.id]
    [told] = [record for record, _ in search.read_metrics()]
    assert (told["event"], told["run"], told["free"]) == ("waiting", run.id, "1 CPU")
    assert line_of(told).startswith(f"trial {run.id}: waits for 2 x train rank")


def test_a_search_without_a_whole_trial_says_why(search: RunDir) -> None:
    run = trial(search, 1e-3, 1.5, whole=False)
    run.finish({"status": "failed", "error": "the loss is no number"})
    told = config().tune
    assert told is not None
    with pytest.raises(JobError, match="the loss is no number"):
        tune.finish(search, config(), told, tune.collect(search, told, {}))
