"""The driver of a training job: Ray Train around `train_jobs.worker`.

This uses `DataParallelTrainer`, not its subclass `TorchTrainer`: importing ``ray.train.torch``
imports torch, here and once more in Ray Train's controller, some ten CPU seconds for a process
group that `train_jobs.group` makes in two lines.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster import console
from cluster.errors import JobError, NotEnough, RoundhouseError
from cluster.resources import Demand
from cluster.session import IN_JOB, connect
from train_jobs.attempts import Attempt
from train_jobs.config import FinetuneConfig
from train_jobs.plan import demand
from train_jobs.runs import RunDir
from train_jobs.watch import ended, wrong
from train_jobs.worker import train

TELL_S = 1.0
"""Between two looks at what the ranks have written."""
ROOM_S = 30.0
"""How long a job waits for CPUs that another is just giving back."""

# Where the cluster was not started by `roundhouse up`; read when ray is imported
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
"""What `group.keep_freed_memory` does, said before the process starts: Ray Train runs a rank's loop
in a thread, whose own arena of glibc's would go on giving its memory back."""


def launch(run: RunDir, config: FinetuneConfig, attempt: Attempt, resume: bool) -> int:
    """Run all ranks on the cluster and wait for them; returns 0.

    Raises:
        JobError: a rank failed; ``result.json`` says the same.
    """
    try:
        with telling(run):
            _fit(run, config, attempt.name(run), resume)
    except RoundhouseError as error:
        run.fail(str(error))
        raise
    return 0


@contextmanager
def telling(run: RunDir) -> Iterator[None]:
    """Meanwhile print what happens, a line each, for ``ray job logs`` and ``jobs logs``."""
    if threading.current_thread() is not threading.main_thread():
        yield  # a trial of a search, of which there are many
        return
    from train_jobs.follow import line

    over, offset = threading.Event(), run.metrics_end()

    def tell() -> None:
        at, last = offset, False
        while not last:
            last = over.wait(TELL_S)
            for record, end in run.read_metrics(at):
                console.out(line(record))
                at = end

    thread = threading.Thread(target=tell, name="telling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10 * TELL_S)


def join_cluster() -> None:
    """Make this process a driver of the cluster; a second call does nothing."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    connect()


def _fit(run: RunDir, config: FinetuneConfig, name: str, resume: bool) -> None:
    join_cluster()
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    wait_for_room(demand(config))
    resources = {"CPU": config.run.num_cpus}
    if config.run.num_gpus:
        resources["GPU"] = config.run.num_gpus
    trainer = DataParallelTrainer(
        train,
        train_loop_config={
            "run": str(run.path),
            "revision": code_revision(),
            "resume": resume,
        },
        scaling_config=ScalingConfig(
            num_workers=workers_of(config),
            elastic_resize_monitor_interval_s=config.run.resize_s,
            use_gpu=bool(config.run.num_gpus),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(run.path / "ray"),
            failure_config=FailureConfig(max_failures=config.run.max_failures),
            worker_runtime_env={"env_vars": KEEP_FREED_MEMORY},
        ),
    )
    try:
        with saving_first(run):
            told = trainer.fit().return_value
    except TrainingFailedError as error:
        raise JobError(cause(run, error)) from error
    if isinstance(told, dict) and told["status"] == "failed":
        raise JobError(told["error"])


@contextmanager
def saving_first(run: RunDir) -> Iterator[None]:
    """Meanwhile take a SIGTERM, as ``ray job stop`` sends it, as a wish to save and stop.

    Ray gives a job a minute for it. Where the run has been asked to stop before, it ends now.
    """

    def end(number: int, _: Any) -> None:
        if run.stop.exists():
            sys.exit(128 + number)
        run.stop.touch()

    if threading.current_thread() is not threading.main_thread():
        yield  # a trial of a search: Tune's process has the signal
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def workers_of(config: FinetuneConfig) -> int | tuple[int, int]:
    """Return the number of ranks as Ray Train takes it: two bounds make a run elastic."""
    most, least = config.run.workers, config.run.least_workers
    return most if least == most else (least, most)


def wait_for_room(wanted: Demand) -> None:
    """Wait until the cluster has what the ranks reserve; NotEnough after ``ROOM_S``.

    Ray Train itself would wait for ever. Only totals are compared: Ray has the last word.
    """
    import ray

    deadline = time.monotonic() + ROOM_S
    asked = {"CPU": wanted.cpus * wanted.count, "GPU": wanted.gpus * wanted.count}
    while True:
        free = ray.available_resources()
        short = {name: n for name, n in asked.items() if n > free.get(name, 0.0) + 1e-6}
        if not short:
            return
        if time.monotonic() > deadline:
            told = ", ".join(f"{free.get(name, 0.0):g} {name}" for name in short)
            raise NotEnough(
                f"wanted: {wanted}; free: {told}, after {ROOM_S:.0f} s; end what holds the rest "
                "(`roundhouse status` shows it) or lower run.workers or run.num_cpus"
            )
        time.sleep(0.5)


def submission_id() -> str | None:
    """Return Ray's id of the submitted job that this process drives; None outside of one."""
    told = json.loads(os.environ.get(IN_JOB, "{}"))
    found = told.get("metadata", {}).get("job_submission_id")
    return str(found) if found else None


def code_revision() -> str | None:
    """Return the hash of the code package this job runs from."""
    import ray

    uri: str = ray.get_runtime_context().runtime_env.get("working_dir", "")
    return uri.rpartition("_ray_pkg_")[2].removesuffix(".zip") or None


def cause(run: RunDir, error: Any) -> str:
    """Return one line that names the rank and why it failed."""
    if found := wrong(run.pulses):
        return f"run {run.id}: rank {found[0]} failed: {found[1]}"
    if why := ended(run.pulses):
        return f"run {run.id}: {why}"
    failures = getattr(error, "worker_failures", {}) or {}
    if not failures:
        return f"run {run.id}: {error}"
    # ranks fail together: the first that says something of its own is the cause
    own = {rank: e for rank, e in failures.items() if isinstance(e, RoundhouseError)}
    rank, first = sorted((own or failures).items())[0]
    kind = "" if own else f"{type(first).__name__}: "
    return f"run {run.id}: rank {rank} failed: {kind}{first}"
