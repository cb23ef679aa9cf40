"""Where else a run's figures go: TensorBoard and MLflow, through their own libraries.

A sink is opened before anything is trained, by rank 0: one that cannot start ends the run there.
One that breaks later is dropped with a word, for no run ends for its telemetry.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from train_jobs.config import FinetuneConfig
    from train_jobs.ports import World
    from train_jobs.runs import RunDir

MODULES: Mapping[str, str] = {"tensorboard": "tensorboard", "mlflow": "mlflow"}
"""The library of each sink; the extra of the same name installs it."""
FOLDERS: Mapping[str, str] = {"tensorboard": "tensorboard", "mlflow": "mlflow"}
STEPS = (None, "resumed")
"""Records that say which step the run is in. A checkpoint is sealed while later steps run, and the
best one lies before the last."""
NO_FIGURES = ("step", "steps", "time", "eta_s")


class Sink(Protocol):
    """One place that figures go to."""

    def figures(self, figures: Mapping[str, float], step: int) -> None:
        """Take the figures of a step, or of an evaluation after it."""

    def close(self) -> None:
        """Write what is left."""


def check_installed(names: Sequence[str]) -> None:
    """Refuse a sink whose library is not there, before a job is submitted."""
    for name in names:
        if importlib.util.find_spec(MODULES[name]) is None:
            raise ConfigError(
                f"track: {name}: its library is not installed here; `pip install "
                f"'roundhouse[{name}]'` brings it, on every machine of the cluster"
            )


def open_sink(name: str, run: RunDir, config: FinetuneConfig) -> Sink:
    """Open one sink in the run's folder. ConfigError when it cannot start."""
    check_installed([name])
    folder = run.path / FOLDERS[name]
    try:
        folder.mkdir(exist_ok=True)
        told = flat(config.model_dump(mode="json"))
        return _TensorBoard(folder, told) if name == "tensorboard" else _MLflow(folder, run, told)
    except Exception as error:  # whatever its library raises, the run must not begin
        raise ConfigError(
            f"track: {name}: it cannot start ({type(error).__name__}: {error}); mend that, or take "
            f"{name} out of track"
        ) from error


class _TensorBoard:
    """Event files in the run's folder: ``tensorboard --logdir RUNS``."""

    def __init__(self, folder: Path, config: Mapping[str, str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        rows = "\n".join(f"    {key}: {value}" for key, value in config.items())
        self._writer.add_text("config", rows)

    def figures(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    """A local store of files; the whole MLflow's ``mlflow ui --backend-store-uri`` shows it.

    A resumed run goes on in the same run of MLflow's.
    """

    def __init__(self, folder: Path, run: RunDir, config: Mapping[str, str]) -> None:
        # MLflow 3 maintains its store of files no more; the other needs a database's libraries
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=folder.absolute().as_uri())
        known = self._client.get_experiment_by_name("roundhouse")
        experiment = known.experiment_id if known else self._client.create_experiment("roundhouse")
        before = self._client.search_runs([experiment], max_results=1)
        if before:
            self._id = before[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(experiment, run_name=run.id).info.run_id
        for key, value in config.items():
            self._client.log_param(self._id, key, value[:500])

    def figures(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._client.log_metric(self._id, name.replace("@", "_"), value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Return a configuration as ``optim.lr: 0.0001`` and so on; what is None is left out."""
    if isinstance(value, Mapping):
        inner = (flat(one, f"{prefix}.{key}" if prefix else str(key)) for key, one in value.items())
        return {key: text for part in inner for key, text in part.items()}
    return {} if value is None else {prefix: str(value)}


def figures_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what a record of ``metrics.jsonl`` measured, named as it is shown."""
    event = record.get("event")
    if event not in (None, "evaluated"):
        return {}
    family = "train" if event is None else "heldout"
    return {
        f"{family}/{name}": float(value)
        for name, value in record.items()
        if name not in NO_FIGURES and isinstance(value, int | float) and not isinstance(value, bool)
    }


def untracked(name: str, error: Exception) -> dict[str, str]:
    """Return the record that says why a sink was left out."""
    return {"event": "untracked", "sink": name, "why": f"{type(error).__name__}: {error}"}


@dataclass
class TrackedWorld:
    """A rank's world whose reports go to the sinks as well."""

    inner: World
    sinks: dict[str, Sink] = field(default_factory=dict)
    step: int = 0

    @property
    def rank(self) -> int:
        """See `World`."""
        return self.inner.rank

    @property
    def size(self) -> int:
        """See `World`."""
        return self.inner.size

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Report, and tell the sinks what was measured."""
        self.inner.report(metrics)
        if metrics.get("event") in STEPS:
            self.step = metrics.get("step", self.step)
        figures = figures_of(metrics)
        for name, sink in list(self.sinks.items() if figures else ()):
            try:
                sink.figures(figures, self.step)
            except Exception as error:  # a library's own: see the module
                del self.sinks[name]
                self.inner.report(untracked(name, error))

    def saved(self, checkpoint: Path, metrics: Mapping[str, Any]) -> None:
        """See `World`."""
        self.inner.saved(checkpoint, metrics)

    def should_stop(self) -> bool:
        """See `World`."""
        return self.inner.should_stop()

    def should_save(self) -> bool:
        """See `World`."""
        return self.inner.should_save()

    def listening(self) -> AbstractContextManager[None]:
        """See `World`."""
        return self.inner.listening()


@contextmanager
def tracked(world: World, run: RunDir, config: FinetuneConfig) -> Iterator[World]:
    """Yield the world with the sinks that the configuration names behind it, on rank 0."""
    if not config.track or world.rank:
        yield world
        return
    sinks: dict[str, Sink] = {}
    try:
        for name in config.track:
            sinks[name] = open_sink(name, run, config)
        yield TrackedWorld(world, sinks)
    finally:
        for opened, sink in sinks.items():
            _close(world, opened, sink)


def _close(world: World, name: str, sink: Sink) -> None:
    try:
        sink.close()
    except Exception as error:  # a library's own; the run has published by now
        told = untracked(name, error)
        sys.stderr.write(f"track: {name}: it was not closed ({told['why']})\n")
        with suppress(OSError):  # it is on the log: a full disk takes no record either
            world.report(told)
