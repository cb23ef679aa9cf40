"""What watches a run and what it decides: bounds of ranks, figures, losses, pulses. No torch."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.errors import JobError
from train_jobs import ports
from train_jobs.config import FinetuneConfig
from train_jobs.launch import saving_first, workers_of
from train_jobs.plan import demand
from train_jobs.ports import RayWorld
from train_jobs.runs import RunDir
from train_jobs.standing import Standing, named
from train_jobs.supervision import Best, Diverge, EarlyStop
from train_jobs.watch import Heart, Losses, Lost, Pulse, claim, clear, ended, stalled, suspects


def config(**changes: Any) -> FinetuneConfig:
    fields: dict[str, Any] = {
        "model": "tiny@1",
        "data": {"train": "/toy.jsonl", "heldout": "/held.jsonl"},
        "batch": {"total": 12},
        "run": {"workers": 2, "steps": 9},
    }
    for key, value in changes.items():
        fields[key] = fields.get(key, {}) | value
    return FinetuneConfig.model_validate(fields)


def test_tc11_ranks_may_be_bounds_and_the_batch_stays() -> None:
    elastic = config(run={"workers": {"min": 1, "max": 4}})
    assert (elastic.run.least_workers, elastic.run.workers) == (1, 4)
    assert workers_of(elastic) == (1, 4)
    assert demand(elastic).count == 1
    assert [elastic.at(ranks).accumulate for ranks in (1, 2, 3, 4)] == [12, 6, 4, 3]
    assert FinetuneConfig.model_validate_json(elastic.model_dump_json()) == elastic
    assert workers_of(config()) == workers_of(elastic.at(2)) == 2


@pytest.mark.parametrize(
    ("run", "batch", "told"),
    [
        ({"workers": {"min": 1, "max": 5}}, 12, r"is not for 5; it is for 1, 2, 3, 4.*of 60"),
        ({"workers": {"min": 2, "max": 3}}, 7, r"is not for 2, 3; it is for none.*multiple of 6"),
        ({"workers": {"min": 3, "max": 2}}, 12, "min=3 is above max=2"),
        ({"workers": {"min": 1}}, 12, r"give a number, or \{min: 1, max: 2\}"),
        ({"workers": {"min": 0, "max": 2}}, 12, "min_workers"),
        ({"best": {}}, 12, "run.best needs figures to go by: give run.evaluate_every"),
        ({"early_stop": {"metric": "loss"}}, 12, "run.early_stop needs figures"),
    ],
)
def test_what_cannot_be_is_refused(run: dict[str, Any], batch: int, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        config(run=run, batch={"total": batch})


def test_figures_need_held_out_rows_and_the_best_needs_a_rule() -> None:
    with pytest.raises(ValidationError, match="evaluate_every needs held-out rows"):
        config(run={"evaluate_every": 2}, data={"heldout": None})
    config(run={"evaluate_every": 2}, data={"heldout": None, "split": 0.1})
    with pytest.raises(ValidationError, match="publish.which=best needs run.best"):
        config(publish={"which": "best"})


def walk(figures: list[float], **rules: Any) -> Standing:
    stood = Standing()
    for step, figure in enumerate(figures, start=1):
        told = {"loss": figure, "accuracy": -figure}
        stood = stood.after(step, told, rules.get("best"), rules.get("early_stop"))
    return stood


def test_the_best_steps_are_ranked_and_of_equal_ones_the_first_counts() -> None:
    figures = [3.0, 1.0, 2.0, 1.0]
    assert walk(figures, best=Best()).best == ((2, 1.0),)
    assert walk(figures, best=Best(keep=3)).best == ((2, 1.0), (4, 1.0), (3, 2.0))
    assert walk(figures, best=Best(metric="accuracy", mode="max")).best == ((2, -1.0),)
    again = walk(figures, best=Best(keep=2)).after(4, {"loss": 0.5}, Best(keep=2), None)
    assert again.best == ((4, 0.5), (2, 1.0))  # a resumed run measures a step again
    assert Standing.of(json.loads(json.dumps(asdict(again)))) == again


@pytest.mark.parametrize(
    ("figures", "min_delta", "is_over"),
    [
        ([3, 2, 1], 0.0, False),
        ([3, 2, 2.5, 2.1], 0.0, True),
        ([3, 2, 2.5, 1.9], 0.0, False),
        ([3, 2.95, 2.9], 0.1, False),
        ([3, 2.95, 2.92, 2.5], 0.1, True),
    ],
)
def test_early_stopping_counts_evaluations_without_a_better_figure(
    figures: list[float], min_delta: float, is_over: bool
) -> None:
    stood = Standing()
    for step, figure in enumerate(figures):
        if not stood.ended:
            rule = EarlyStop(patience=2, min_delta=min_delta)
            stood = stood.after(step, {"loss": figure}, None, rule)
    assert stood.ended is is_over


def test_a_figure_that_is_not_given_is_named_with_those_that_are() -> None:
    with pytest.raises(JobError, match="run.best.metric='f1': .* give accuracy, loss"):
        named({"loss": 1.0, "accuracy": 0.5}, "f1", "run.best.metric")
    with pytest.raises(JobError, match="it is nan"):
        named({"loss": float("nan")}, "loss", "run.best.metric")


def test_tc28_a_loss_that_runs_away_ends_the_run_and_is_not_saved() -> None:
    losses = Losses(Diverge(times=3, steps=3, window=4))
    for step, loss in enumerate([9.0, 2.0, 2.1, 1.9, 2.0, 7.0, 7.0], start=1):
        losses.add(step, loss)
    assert losses.are_wild
    losses.add(8, 2.0)  # it came back
    assert not losses.are_wild
    losses.add(9, 8.0)
    losses.add(10, 9.0)
    with pytest.raises(JobError, match=r"step 11: .* 10, for 3 steps .* 3 times the 2 .*step 9"):
        losses.add(11, 10.0)


def test_small_and_negative_losses_may_jump_and_a_rule_may_be_off() -> None:
    losses = Losses(Diverge(times=3, steps=2, window=10))
    for step, loss in enumerate([0.001, -0.2, 1.4, 1.4, -3.0, 0.0, 1.49, 1.49]):
        losses.add(step, loss)
    silent = Losses(None)
    for step in range(100):
        silent.add(step, 10.0**step)
    assert not silent.are_wild


def pulses(**changes: Any) -> dict[int, Pulse]:
    made = {n: Pulse(n, 5, "forward", count=40, alive=9, pid=70 + n, host="h") for n in range(3)}
    return made | {int(name[1:]): replace(made[int(name[1:])], **c) for name, c in changes.items()}


def test_tc29_who_holds_the_others_up() -> None:
    now = pulses()
    alive = {"alive": 10}
    later = pulses(r0=alive, r1=alive, r2=alive)
    behind = pulses(r0=alive, r1={**alive, "count": 38, "doing": "reading rows"}, r2=alive)
    stopped = pulses(r0=alive, r2=alive)
    assert [p.rank for p in suspects(now, later)] == [0, 1, 2]  # all in the same collective
    assert [p.rank for p in suspects(now, behind)] == [1]
    assert [p.rank for p in suspects(now, stopped)] == [1]
    told = stalled(suspects(now, behind), 60)
    assert told == (
        "no progress for 60 s (run.stall_s): rank 1 (process 71 on h) in step 5, reading rows; "
        "look at the disk or the network that data.train lies on"
    )


def wait(until: threading.Event) -> None:
    assert until.wait(20)


def test_tc29_a_rank_that_stops_is_named_by_all_and_one_reason_stays(tmp_path: Path) -> None:
    told: dict[int, str] = {}
    over = [threading.Event() for _ in range(3)]

    def end(rank: int, why: str) -> None:
        told[rank] = why
        over[rank].set()

    hearts = [
        Heart(tmp_path, rank, 3, 0.6, lambda why, rank=rank: end(rank, why), 0.05).start()
        for rank in range(3)
    ]
    try:
        for step in range(1, 4):
            for heart in hearts:
                heart.at(step, "forward")
            time.sleep(0.1)
        assert not told
        hearts[0].at(4, "reading rows")
        hearts[1].at(4, "reading rows")
        hearts[0].at(4, "forward")
        hearts[1].at(4, "forward")  # rank 2 has not come out of step 3
        for event in over:
            wait(event)
    finally:
        for heart in hearts:
            heart.stop()
    assert set(told.values()) == {told[0]}
    assert "rank 2 (process " in told[0]
    assert "in step 3, forward" in told[0]
    assert ended(tmp_path) == told[0]
    assert claim(tmp_path, "another") == told[0]
    clear(tmp_path)
    assert ended(tmp_path) is None


def test_of_many_that_claim_at_once_one_reason_stays(tmp_path: Path) -> None:
    for turn in range(20):
        folder = tmp_path / str(turn)
        folder.mkdir()
        together = threading.Barrier(8)

        def claims(rank: int, folder: Path = folder, at: threading.Barrier = together) -> str:
            at.wait(20)
            return claim(folder, f"reason {rank}")

        with ThreadPoolExecutor(8) as pool:
            told = list(pool.map(claims, range(8), timeout=20))
        assert set(told) == {ended(folder)}
        assert [path.name for path in folder.iterdir()] == ["ended.json"]


def test_a_reason_that_cannot_be_written_still_ends_its_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert claim(tmp_path / "gone", "mine") == "mine"
    assert "ended.json: No such file or directory" in capsys.readouterr().err


def test_a_heart_that_beats_ends_nobody(tmp_path: Path) -> None:
    told: list[str] = []
    heart = Heart(tmp_path, 0, 1, 0.3, told.append, 0.02).start()
    for step in range(20):
        heart.at(step, "forward")
        time.sleep(0.04)
    heart.stop()
    time.sleep(0.5)  # a stopped one watches no more
    assert not told


def test_lost_contact_travels() -> None:
    error = pickle.loads(pickle.dumps(Lost("rank 0 lost contact with rank 1")))
    assert isinstance(error, JobError)
    assert str(error) == "rank 0 lost contact with rank 1"


def test_a_drained_node_is_saved_for_once_and_by_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worlds = [RayWorld(rank, 2, RunDir(tmp_path)) for rank in (0, 1)]
    monkeypatch.setattr(ports, "is_preempted", lambda: False)
    assert [world.should_save() for world in worlds] == [False, False]
    monkeypatch.setattr(ports, "is_preempted", lambda: True)
    assert [world.should_save() for world in worlds] == [True, False]
    assert [world.should_save() for world in worlds] == [False, False]
    assert not any(world.should_stop() for world in worlds)  # it trains on until it is gone


def test_t42_a_line_that_does_not_fit_on_the_disk_is_left_out_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)
    run.append({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (run.metrics.stat().st_size + 9, before[1]))
    try:
        run.append({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run.append({"step": 3})
    assert [record["step"] for record, _ in run.read_metrics()] == [1, 3]
    assert "no room for a line: " in capsys.readouterr().err


def test_a_job_that_is_told_to_end_asks_for_a_save_first_and_then_ends(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with saving_first(run):
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop.exists()
        with pytest.raises(SystemExit, match="143"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
