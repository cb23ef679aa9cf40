"""One rank with its engine: train, evaluate, save, publish, one verb each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import JobError
from train_jobs import checkpoint
from train_jobs.engine import forget, open_all
from train_jobs.group import Device
from train_jobs.ports import World
from train_jobs.progress import START, Progress
from train_jobs.runs import RunDir
from train_jobs.saver import Saver
from train_jobs.standing import Standing
from train_jobs.supervisor import Supervisor
from train_jobs.task import Task, lineage
from train_jobs.watch import Heart, Lost

if TYPE_CHECKING:
    from cluster.library.evaluations import Figure
    from cluster.library.store import Version
    from train_jobs.live import LiveWeights
    from train_jobs.objectives.base import Objective


@dataclass
class Fit:
    """See the module. Every rank calls every verb."""

    task: Task
    run: RunDir
    world: World
    device: Device
    engine: Any
    objective: Objective
    record: Mapping[str, Any]
    """What DeepSpeed really runs, checked against the configuration."""
    started: float
    """When this process began, on the monotonic clock."""
    since: Progress
    """Where the run stood then."""
    seconds_before: float
    """Seconds of earlier processes, up to the checkpoint."""
    losses: dict[str, float]
    """Held-out figures before and after."""
    standing: Standing
    """What those in between have shown."""
    saver: Saver
    heart: Heart
    intervals: dict[str, Figure] = field(default_factory=dict)
    """Of the held-out figures after, on rank 0."""
    live: LiveWeights | None = None
    """The way to the cluster's shelf, once it was wanted."""

    @classmethod
    def begin(
        cls,
        task: Task,
        run: RunDir,
        world: World,
        device: Device,
        found: tuple[Path, checkpoint.Meta] | None,
        started: float,
    ) -> Fit:
        """Load the base, and a checkpoint if one was found, into an engine; report it."""
        config = task.config
        engine, objective, record = open_all(task, run, world, device, found)
        data = {
            "steps": task.order.steps,
            "rows": len(task.train.rows),
            "tokens": task.train.tokens,
            "trained_tokens": task.train.trained_tokens,
        }
        seconds = round(time.monotonic() - started, 1)
        ready = {"event": "ready", "device": device.name, "seconds": seconds}
        world.report({**ready, **record, **data})
        since, before, losses, standing = START, 0.0, dict[str, float](), Standing()
        if found:
            path, meta = found
            told = {"event": "resumed", "step": meta.step, "path": str(path)}
            world.report({**told, "from_world": meta.world, "world": world.size})
            since, before, standing = meta.progress, meta.seconds, meta.standing
            losses = dict(meta.losses)
        limits, adapter = config.run, config.adapter is not None
        saver = Saver(run.checkpoints, world, limits.keep, adapter, limits.timeout_s)
        heart = Heart(run.pulses, world.rank, world.size, limits.stall_s)
        return cls(
            task, run, world, device, engine, objective, record, started, since, before, losses,
            standing, saver, heart,
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Of all processes that worked on the run so far."""
        return self.seconds_before + time.monotonic() - self.started

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Beat, listen, and say who is gone when a collective breaks.

        Raises:
            Lost: other ranks do not answer.
        """
        import torch.distributed as dist

        self.heart.start()
        dist.barrier()  # all of them beat
        try:
            with self.world.listening():
                yield
        except RuntimeError as error:
            if not is_contact_lost(error):
                raise
            raise Lost(self._who(error)) from error
        finally:
            self.heart.stop()
            self.saver.join()

    def _who(self, error: RuntimeError) -> str:
        who = [p for p in self.heart.suspects() if p.rank != self.world.rank]
        names = " and ".join(map(str, who[:4])) or "the other ranks"
        at = f", last in step {who[0].step}, {who[0].doing}" if who else ""
        told = str(error).splitlines()[0]
        return (
            f"rank {self.world.rank} lost contact with {names}{at} ({told:.160}); see what ended "
            "it: memory, the machine, or somebody who killed it"
        )

    def train(self) -> Progress:
        """Run the optimiser's steps that are left; the last checkpoint is whole on return."""
        from train_jobs.loop import train

        task = self.task
        if task.config.publish.every:
            self.open_live()
        guard = Supervisor(
            task.config.run, self.standing, self.saver, self.heart, lambda when: self.measure(when)
        )

        def save(progress: Progress, metrics: Mapping[str, float]) -> None:
            self.standing = guard.standing
            self.save(progress, metrics)

        progress = train(
            self.engine,
            task.config,
            self.objective,
            task.train,
            task.order,
            self.world,
            save,
            self.since,
            guard,
            self.go_live,
        )
        self.standing = guard.standing
        self.saver.settle()
        return progress

    def open_live(self) -> None:
        """Have the shelf ready, so that nothing but weights stands between a step and replicas."""
        from cluster.weights.client import Writer
        from train_jobs.live import LiveWeights

        told = self.task.config.publish
        name = told.name or self.task.base.name
        self.live = LiveWeights(self.task.base, name, self.run.id, Writer(), told.update)

    def go_live(self, progress: Progress) -> None:
        """Put the weights on the cluster's shelf; a shelf that is full does not end the run."""
        assert self.live, "it is opened before the first step"
        began = time.monotonic()
        try:
            ref = self.live.put(self.engine, progress.step)
        except JobError as error:
            self.world.report({"event": "not_live", "step": progress.step, "why": str(error)})
            return
        seconds = round(time.monotonic() - began, 2)
        self.world.report({"event": "live", "step": progress.step, "ref": ref, "seconds": seconds})
        if progress.step == self.task.order.steps:
            self.live.give_way(ref)

    def evaluate_before(self) -> None:
        """Measure the held-out rows first of all, and see that the figures asked for are there."""
        figures, run = self.evaluate("before"), self.task.config.run
        if figures:
            Standing().after(0, figures, run.best, run.early_stop)

    def evaluate(self, when: str) -> Mapping[str, float]:
        """Measure the held-out rows, if there are any, for the run's result."""
        if self.task.heldout is None:
            return {}
        figures = self.measure(when)
        self.losses |= {f"heldout_{name}_{when}": value for name, value in figures.items()}
        return figures

    def measure(self, when: str) -> Mapping[str, float]:
        """Measure the held-out rows and report what was found."""
        from train_jobs.evaluate import outcomes, sureness

        assert self.task.heldout is not None, "the configuration checks it"
        seed = self.task.config.run.seed

        def beat() -> None:
            self.heart.at(self.since.step, "evaluating")

        found = outcomes(self.engine, self.objective, self.task.heldout, self.world, seed, beat)
        figures = self.objective.score(found)
        if when == "after" and self.world.rank == 0:
            self.intervals = sureness(self.objective, found, seed, beat=beat)
        self.world.report({"event": "evaluated", "when": when, **figures})
        return figures

    def save(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Write a checkpoint; it is sealed and announced meanwhile."""
        config = self.task.config
        meta = checkpoint.Meta(
            # whoever goes on from here has not been asked to stop
            progress=replace(progress, stopped=False),
            world=self.world.size,
            zero=config.zero,
            config=config.model_dump(mode="json"),
            losses=dict(self.losses),
            seconds=self.seconds,
            standing=self.standing,
            data=self.task.hashes,
        )
        told = {"step": progress.step, **metrics}
        self.saver.save(self.engine, meta, self.standing.steps, told)

    def take_best(self, progress: Progress) -> int:
        """Go back to the best checkpoint, if that is to be published; returns its step.

        The engine is built anew: under ZeRO 3 DeepSpeed loads into a fresh one only.
        """
        if self.task.config.publish.which == "last" or not self.standing.best:
            return progress.step
        path, passed = self._best()
        if passed:
            self.world.report({"event": "skipped", "checkpoints": passed})
        if path is None:
            return progress.step
        meta = checkpoint.read_meta(path)
        if meta.step != progress.step:
            del self.objective
            forget(self.engine)
            self.engine, self.objective, _ = open_all(
                self.task, self.run, self.world, self.device, (path, meta)
            )
        self.world.report({"event": "best", "step": meta.step})
        return meta.step

    def _best(self) -> tuple[Path | None, list[str]]:
        """Return the best checkpoint that is whole, as rank 0 finds it."""
        import torch.distributed as dist

        told: list[Any] = [None]
        if self.world.rank == 0:
            folder = self.run.checkpoints
            ranked = [folder / checkpoint.name_of(step) for step, _ in self.standing.best]
            told = [checkpoint.first_whole(ranked)]
        dist.broadcast_object_list(told)
        found: tuple[Path | None, list[str]] = told[0]
        return found

    def publish(self, revision: str | None) -> str | None:
        """Add the model to the library. Returns ``name@number`` on rank 0, None on the others."""
        from train_jobs.card import render
        from train_jobs.export import EXPORT, publish
        from train_jobs.objectives.base import Asking

        config = self.task.config
        asked = self.objective.others if isinstance(self.objective, Asking) else {}
        models = {**config.objective.others, **asked}
        facts = lineage(self.task, self.run.id, self.losses, revision, models)
        name, staging = config.publish.name or self.task.base.name, self.run.path / EXPORT
        card = render(self.task, name, facts, self.intervals)
        version = publish(
            self.engine,
            self.task.base,
            name,
            staging,
            facts,
            self.world.rank,
            adapter=config.adapter is not None,
            head=config.objective.head,
            card=card,
            hold=config.publish.hold,
            apart=not config.publish.merge,
        )
        if version is None:
            return None
        self.world.report({"event": "published", "ref": version.ref})
        self._settle(version)
        return version.ref

    def _settle(self, version: Version) -> None:
        """Let what answers as ``live`` answer with the version that lasts, and clear the shelf."""
        from train_jobs.objectives.base import Shelving

        policies = self.objective.on_shelf if isinstance(self.objective, Shelving) else None
        prefixes = [one for one in (self.live and self.live.prefix, policies) if one]
        if not prefixes:
            return
        from cluster.library.ref import NEWEST
        from cluster.library.store import Library
        from cluster.weights.client import withdraw_run

        library = Library()
        now = library.aliases(version.name).get(NEWEST)
        if now is not None:  # it is deployed so
            library.move_alias(version.name, NEWEST, version.number, now, self.run.id)
        for prefix in prefixes:
            withdraw_run(prefix)


def is_contact_lost(error: RuntimeError) -> bool:
    """Say whether a collective failed for want of another rank; torch has no one class for it."""
    text = str(error).lower()
    return type(error).__name__ in {"DistBackendError", "DistNetworkError", "DistStoreError"} or (
        any(sign in text for sign in ("connection closed", "connection reset", "timed out"))
    )
