"""``python -m train_jobs.tune RUN_FOLDER``: the driver of a search, trials under Ray Tune.

A trial is an ordinary training run with a folder of its own. Its driver reserves no CPU: on a small
cluster a driver that held one would wait for ever for ranks that have no room beside it. A trial
keeps its model in its folder; of all trials only the best becomes a version.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import console
from cluster.config import build, load
from cluster.errors import ConfigError, JobError, NotEnough, RoundhouseError
from cluster.resources import EPSILON, Demand
from cluster.session import connect
from train_jobs.config import FinetuneConfig
from train_jobs.objectives.pinning import pinned
from train_jobs.plan import demand
from train_jobs.runs import RunDir
from train_jobs.search import Tune, overrides

FILE = "tune.json"
"""The resolved configuration in the search's folder. Not ``config.json``: that is a run's."""
TRIALS = "trials"
POINT = "point"
ENDED = "ended early"
POLL_S = 0.5
WAIT_S = 24 * 3600.0
"""How long a trial waits for CPUs that others hold."""
DRIVER = {"CPU": 0, "memory": 1 << 20}
"""What a trial's driver reserves: Ray wants something of it, and the ranks want every CPU."""


@dataclass(frozen=True)
class Trial:
    """One trial, as the table shows it."""

    run: str
    point: Mapping[str, Any]
    value: float | None
    """Of the metric, at its end; None where it has none."""
    steps: int | None
    state: str
    """``succeeded``, ``ended early`` or ``failed``."""
    error: str | None = None


def config_of(config: FinetuneConfig, point: Mapping[str, Any]) -> FinetuneConfig:
    """Return the run of one trial.

    Raises:
        ConfigError: a value cannot be where it is to go, or the field does not exist.
    """
    fields = config.model_dump(mode="json") | {"tune": None}
    fields["publish"] = fields["publish"] | {"hold": True, "every": None}
    return build(fields, FinetuneConfig, overrides(point), "tune.space")


def check(config: FinetuneConfig) -> Tune:
    """Return the search of a configuration. ConfigError: there is none, or it cannot be run."""
    told = config.tune
    if told is None:
        raise ConfigError(
            "tune: this configuration has no search; add tune: {space: {optim.lr: {loguniform: "
            "[1.0e-5, 1.0e-3]}}, trials: 8}, or run it with `roundhouse train`"
        )
    if not (config.data.heldout or config.data.split):
        raise ConfigError(
            "tune: a search needs rows that no trial learns from: give data.heldout or data.split"
        )
    if told.scheduler and not config.run.evaluate_every:
        raise ConfigError("tune.scheduler: asha compares trials on their way: run.evaluate_every")
    for point in told.points():
        config_of(config, point)
    return told


def concurrent(config: FinetuneConfig, cpus: float, gpus: float) -> int:
    """Return how many trials run at once: as many as have room, or as the search wants if fewer.

    ``cpus`` and ``gpus`` are what is free. At least one: it waits until it has room.
    """
    run = config.run
    fits = cpus / (run.num_cpus * run.workers)
    if run.num_gpus:
        fits = min(fits, gpus / (run.num_gpus * run.workers))
    room = max(1, int(fits + EPSILON))
    told = config.tune
    return min(room, told.concurrent or room, told.combinations) if told else room


def drive(search: RunDir) -> dict[str, Any]:
    """Run all trials, publish the best; returns the result.

    Raises:
        JobError: no trial came to an end.
    """
    config = load(search.path / FILE, FinetuneConfig)
    told = check(config)
    connect()
    import ray
    from ray import tune as ray_tune

    free = ray.available_resources()
    at_once = concurrent(config, free.get("CPU", 0.0), free.get("GPU", 0.0))
    search.append({"event": "search", "trials": told.combinations, "concurrent": at_once})
    scheduler = None
    if asha := told.scheduler:
        from ray.tune.schedulers import AsyncHyperBandScheduler

        scheduler = AsyncHyperBandScheduler(
            time_attr="looks",
            grace_period=asha.grace,
            reduction_factor=asha.reduction,
            max_t=10**6,  # a run ends by itself
        )
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(trial, DRIVER),
        param_space={
            POINT: ray_tune.grid_search(told.points()),
            "search": str(search.path),
        },
        tune_config=ray_tune.TuneConfig(
            metric=told.metric,
            mode=told.mode,
            scheduler=scheduler,
            max_concurrent_trials=at_once,
        ),
        run_config=ray_tune.RunConfig(
            name=search.id, storage_path=str(search.path / "ray"), verbose=0
        ),
    )
    errors = {
        json.dumps(found.config[POINT]): str(found.error)
        for found in tuner.fit()
        if found.error and found.config
    }
    trials = collect(search, told, errors)
    return finish(search, config, told, trials)


def trial(told: Mapping[str, Any]) -> None:
    """Be one trial: start its run, and tell Tune what the held-out rows say on its way."""
    from ray import tune as ray_tune

    search = RunDir(Path(told["search"]))
    config = load(search.path / FILE, FinetuneConfig)
    assert config.tune, "it was checked"
    metric = config.tune.metric
    mine = config_of(config, told[POINT])
    mine = mine.model_copy(update={"objective": pinned(mine.objective)})
    run = begin(search, mine, told[POINT])
    news = {"event": "trial", "run": run.id, "metric": metric, "point": told[POINT]}
    search.append(news)
    failed: list[BaseException] = []
    thread = threading.Thread(
        target=_train, args=(run, search, news, failed), name="trial", daemon=True
    )
    thread.start()
    offset, looks = 0, 0
    while True:
        alive = thread.is_alive()
        for record, end in run.read_metrics(offset):
            offset = end
            if record.get("event") == "evaluated" and record["when"] != "before":
                if metric not in record:
                    known = ", ".join(k for k, v in record.items() if isinstance(v, float))
                    raise JobError(f"tune.metric={metric}: the held-out rows give {known}")
                looks += 1
                search.append(news | {"value": record[metric]})
                # a scheduler ends no trial that has done its steps: it sees no look in the last one
                whole = record["when"] == "after"
                ray_tune.report({metric: record[metric]} | ({} if whole else {"looks": looks}))
        if not alive:
            break
        time.sleep(POLL_S)
    if failed:
        raise failed[0]


def begin(search: RunDir, config: FinetuneConfig, point: Mapping[str, Any]) -> RunDir:
    """Make the folder of a trial's run, and note in the search's which values it has."""
    from cluster.config import dump

    run = RunDir.create(search.id.rpartition("-")[0].rpartition("-")[0].rpartition("-")[0])
    run.config.write_text(dump(config))
    notes = search.path / TRIALS
    notes.mkdir(exist_ok=True)
    staged = notes / f".{run.id}"
    staged.write_text(json.dumps(dict(point)))
    os.replace(staged, notes / f"{run.id}.json")
    return run


def _train(
    run: RunDir, search: RunDir, news: Mapping[str, Any], failed: list[BaseException]
) -> None:
    from train_jobs import attempts
    from train_jobs.launch import launch

    try:
        config = load(run.config, FinetuneConfig)
        with attempts.claim(run):
            attempt = attempts.join(run, None, resume=False)
            deadline = time.monotonic() + WAIT_S
            while True:
                wait_for_room(demand(config), search, news, deadline)
                try:
                    launch(run, config, attempt, resume=False)
                    return
                except NotEnough:  # another was faster: nothing of this run has begun
                    if time.monotonic() > deadline:
                        raise
                    run.result.unlink(missing_ok=True)
    except BaseException as error:  # carried to the thread that Tune listens to
        failed.append(error)


def wait_for_room(wanted: Demand, search: RunDir, news: Mapping[str, Any], deadline: float) -> None:
    """Wait until the cluster has free what a trial's ranks reserve, and say so once.

    Others use the cluster too; whether it could ever have room was asked before the search. Past
    the deadline it returns: the launch says what is short.
    """
    asked = {"CPU": wanted.cpus * wanted.count, "GPU": wanted.gpus * wanted.count}
    told = False
    while time.monotonic() < deadline:
        free = free_resources()
        short = {
            name: free.get(name, 0.0)
            for name in asked
            if asked[name] > free.get(name, 0.0) + EPSILON
        }
        if not short:
            return
        if not told:
            has = ", ".join(f"{amount:g} {name}" for name, amount in short.items())
            search.append({**news, "event": "waiting", "wanted": str(wanted), "free": has})
            told = True
        time.sleep(POLL_S)


def free_resources() -> Mapping[str, float]:
    """Return what Ray has free, in all."""
    import ray

    found: dict[str, float] = ray.available_resources()
    return found


def collect(search: RunDir, told: Tune, errors: Mapping[str, str]) -> list[Trial]:
    """Return every trial that began, the best first, from the folders of their runs."""
    from cluster import home

    found = []
    for path in sorted((search.path / TRIALS).glob("*.json")):
        run, point = RunDir(home.runs_dir() / path.stem), json.loads(path.read_text())
        result = run.read_result() or {}
        error = result.get("error") or errors.get(json.dumps(point))
        values = [
            record[told.metric]
            for record, _ in run.read_metrics()
            if record.get("event") == "evaluated" and told.metric in record
        ]
        whole = result.get("status") == "succeeded"
        state = "succeeded" if whole else "failed" if error else ENDED
        last = run.last_step() or {}
        value = values[-1] if values else None
        found.append(Trial(run.id, point, value, last.get("step"), state, error))
    sign = 1 if told.mode == "min" else -1
    worst = float("inf")
    return sorted(found, key=lambda t: worst if t.value is None else sign * t.value)


def finish(
    search: RunDir, config: FinetuneConfig, told: Tune, trials: Sequence[Trial]
) -> dict[str, Any]:
    """Publish the best of the whole trials, delete the other models, write the results."""
    from cluster import home
    from train_jobs.export import publish_held

    for one in trials:
        run = RunDir(home.runs_dir() / one.run)
        if one.state == ENDED and run.read_result() is None:  # Tune ended its processes at once
            run.finish({"status": "stopped", "steps": one.steps, "search": search.id})
    whole = [one for one in trials if one.state == "succeeded" and one.value is not None]
    if not whole:
        why = next((one.error for one in trials if one.error), None)
        raise JobError(
            f"search {search.id}: no trial came to its end with a {told.metric}; "
            f"{why or 'raise tune.scheduler.grace'}"
        )
    best, published = whole[0], None
    for one in trials:
        folder = home.runs_dir() / one.run
        if one is best and told.publish:
            base = config.model.partition("@")[0]
            published = publish_held(folder, config.publish.name or base).ref
        shutil.rmtree(folder / "export", ignore_errors=True)
    result = {
        "status": "succeeded",
        "metric": told.metric,
        "mode": told.mode,
        "best": best.run,
        "best_point": dict(best.point),
        "value": best.value,
        "published": published,
        "trials": [asdict(one) for one in trials],
    }
    search.finish(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Search; 0, or 1 with the reason in ``result.json``."""
    search = RunDir(Path(argv[0]))
    try:
        drive(search)
    except RoundhouseError as error:
        search.finish({"status": "failed", "error": str(error)})
        console.error(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
