"""One rank of an evaluation: measure its share, and on rank 0 write down what was found."""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import load
from cluster.errors import JobError, RoundhouseError
from cluster.library import evaluations
from cluster.library.evaluations import Evaluation, Figure
from cluster.library.store import Library
from train_jobs.evaluation import EvaluationConfig, Measurement
from train_jobs.group import Place
from train_jobs.ports import PlainWorld, World
from train_jobs.runs import RunDir

if TYPE_CHECKING:
    from train_jobs.metrics.bootstrap import Interval
    from train_jobs.outcome import Outcome

FILE = "evaluation.json"
"""The configuration in the run's folder. Not ``config.json``: that is a training run's."""
TELL_S = 5.0
"""Between two words on how far it has come."""


def run_rank(run: RunDir, place: Place, revision: str | None) -> None:
    """Measure; rank 0 stores the evaluation and writes ``result.json``.

    Raises:
        JobError: a loss is not a finite number.
    """
    began = time.monotonic()
    config = load(run.path / FILE, EvaluationConfig)
    from train_jobs import group

    training = config.run.training()
    group.prepare(place, training)  # before torch is imported
    device = group.join(place, training)
    world = PlainWorld(place.rank, place.size, run)
    try:
        group.quiet()
        told = Told(world, min(TELL_S, config.run.stall_s / 4))
        world.report({"event": "met", "world": world.size})
        measurement = Measurement.load(config)
        from train_jobs.bare import open_bare
        from train_jobs.evaluate import outcomes
        from train_jobs.metrics.bootstrap import intervals

        bare, objective = open_bare(measurement, device, run, world, told.alive)
        told.begin(measurement.data.examples, len(measurement.data.rows))
        seed = config.run.seed
        found = outcomes(bare, objective, measurement.data, world, seed, told.beat)
    finally:
        group.leave()
    if place.rank:
        return
    check_finite(found)
    told.say({"event": "resampling", "examples": len(found), "draws": config.draws})
    figures = intervals(found, objective.score, config.draws, seed=seed, beat=told.alive)
    record = record_of(measurement, figures, len(found), device.dtype, revision)
    library = Library()
    version = measurement.version
    rows = [as_json(outcome) for outcome in found]
    path = evaluations.write(library.root, version.name, version.number, record, rows)
    seconds = round(time.monotonic() - began, 1)
    answer = {"path": str(path), **record.model_dump(mode="json"), "seconds": seconds}
    run.finish({"status": "succeeded", "evaluation": answer})


class Told:
    """Says every few seconds how far rank 0 has come: lines that any log keeps, and signs of life.

    Whoever waits for the evaluation ends it where none comes.
    """

    def __init__(self, world: World, period_s: float) -> None:
        self._world, self._period_s = world, period_s
        self._word: dict[str, Any] = {"event": "preparing"}
        self._said = time.monotonic()
        self._passes = self._examples = self._rows = 0

    def say(self, word: dict[str, Any]) -> None:
        """Say something now, and again for as long as it is true."""
        self._word, self._said = word, time.monotonic()
        self._world.report(word)

    def alive(self) -> None:
        """Be called as often as anything has been done."""
        if time.monotonic() - self._said > self._period_s:
            self.say(self._word)

    def begin(self, examples: int, rows: int) -> None:
        """Note how much there is to be measured."""
        self._examples, self._rows = examples, rows
        self.say({"event": "measured", "examples": 0, "of": examples})

    def beat(self) -> None:
        """Be called before each pass, in which every rank measures one row."""
        done = min(1.0, self._passes * self._world.size / self._rows)
        told = {"examples": round(done * self._examples), "of": self._examples}
        self._word = {"event": "measured", **told}
        self._passes += 1
        self.alive()


def check_finite(found: Sequence[Outcome]) -> None:
    """Raise JobError, naming the first example whose loss is no number."""
    for outcome in found:
        if outcome.loss != outcome.loss or abs(outcome.loss) == float("inf"):
            raise JobError(
                f"{outcome.where}: the loss is {outcome.loss}; the version's weights are damaged "
                "(`roundhouse models verify`), or overflow in this number format: try "
                "--set run.dtype=float32"
            )


def record_of(
    measurement: Measurement,
    figures: Mapping[str, Interval],
    examples: int,
    dtype: str,
    revision: str | None,
) -> Evaluation:
    """Return what the library keeps."""
    config, version = measurement.config, measurement.version
    return Evaluation(
        id=measurement.id,
        ref=version.ref,
        digest=version.manifest.digest,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        objective=measurement.objective.model_dump(mode="json"),
        data=measurement.hashes,
        settings={**measurement.asked, "dtype": dtype},
        reference=measurement.reference.ref if measurement.reference else None,
        examples=examples,
        kept=min(examples, evaluations.KEPT),
        draws=config.draws,
        figures={
            name: Figure(value=one.value, low=one.low, high=one.high)
            for name, one in figures.items()
        },
        code_revision=revision,
    )


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Return one line of the stored outcomes; a place without the folders of this machine."""
    return {
        "where": Path(outcome.where).name,
        "loss": outcome.loss,
        "weight": outcome.weight,
        "said": outcome.said,
        "meant": outcome.meant,
    }


def main(argv: Sequence[str]) -> int:
    """Be one plain process: ``RUN_FOLDER RANK SIZE HOST:PORT``."""
    from train_jobs.local import die_with_parent

    die_with_parent()
    run, rank, size = RunDir(Path(argv[0])), int(argv[1]), int(argv[2])
    try:
        run_rank(run, Place(rank, size, rank, size, argv[3]), None)
    except RoundhouseError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    from train_jobs.local import end

    faulthandler.enable()
    end(main(sys.argv[1:]))
