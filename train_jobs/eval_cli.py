"""``roundhouse eval``: measure a version on rows, and say whether two versions differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cluster import console
from cluster.options import AsJson, DryRun, complete_ref
from train_jobs.verbs import Sets, find_cluster

if TYPE_CHECKING:
    from cluster.library.evaluations import Evaluation
    from train_jobs.evaluation import EvaluationConfig, Measurement


class ModelOrVerb(TyperGroup):
    """Takes ``eval MODEL`` for ``eval run MODEL``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put ``run`` in front of what is no verb of this group."""
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["run", *args]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


app = typer.Typer(
    cls=ModelOrVerb,
    help="Measure a version: `roundhouse eval MODEL --data FILE`, or compare two of them.",
    no_args_is_help=True,
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="name, name@3 or name@alias.", autocompletion=complete_ref
    ),
]
DataFile = Annotated[
    Path, typer.Option("--data", metavar="FILE", help="Rows to measure on: jsonl, csv, parquet ...")
]
Kind = Annotated[
    str | None,
    typer.Option("--objective", metavar="KIND", help="sft, dpo ...; by default the rows tell."),
]
Reference = Annotated[
    str | None,
    typer.Option("--reference", metavar="REF", help="What dpo and kto compare with: the base."),
]
Local = Annotated[
    int | None,
    typer.Option("--local", metavar="N", min=1, help="N processes here, without a cluster."),
]
Workers = Annotated[
    int | None, typer.Option("--workers", metavar="N", min=1, help="N ranks on the cluster.")
]
Again = Annotated[bool, typer.Option("--again", help="Measure anew what was measured before.")]


@app.command("run")
def run_(
    model: Model,
    data: DataFile,
    objective: Kind = None,
    reference: Reference = None,
    local: Local = None,
    workers: Workers = None,
    again: Again = False,
    overrides: Sets = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Measure a version on the rows of a file, with intervals; `models show` keeps the figures."""
    console.use_json(as_json)
    measurement = _asked(model, data, objective, reference, overrides, local or workers)
    if dry_run:
        console.result(_rehearse(measurement, local))
        return
    found = _measured(measurement, local, again)
    _show(found)
    console.result(found.model_dump(mode="json"))


@app.command()
def compare(
    first: Model,
    second: Model,
    data: DataFile,
    objective: Kind = None,
    reference: Reference = None,
    local: Local = None,
    workers: Workers = None,
    again: Again = False,
    overrides: Sets = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Say of each figure whether the second version differs from the first, by more than chance.

    What was not measured on these rows yet is measured first.
    """
    console.use_json(as_json)
    from train_jobs import compare as comparison
    from train_jobs.evaluation import common_reference

    common, ranks = common_reference(first, second, reference), local or workers
    measurements = [
        _asked(model, data, objective, common, overrides, ranks) for model in (first, second)
    ]
    if dry_run:
        rehearsed = [_rehearse(measurement, local) for measurement in measurements]
        console.result({"dry_run": True, "evaluations": rehearsed})
        return
    found = [_measured(measurement, local, again) for measurement in measurements]
    comparison.check_comparable(*found)
    ours, theirs = comparison.paired(
        *(_outcomes(m, f) for m, f in zip(measurements, found, strict=True))
    )
    from train_jobs.objectives.open import open_objective

    config, score = measurements[0].config, open_objective(measurements[0].training()).score
    told = comparison.compare(ours, theirs, score, config.draws, config.run.seed)
    console.table(
        f"{found[1].ref} minus {found[0].ref}, {len(ours)} examples",
        ["figure", found[0].ref, found[1].ref, "difference", "95% interval", "p", ""],
        [
            (
                one.name,
                f"{one.first:.4f}",
                f"{one.second:.4f}",
                f"{one.difference.value:+.4f}",
                f"[{one.difference.low:+.4f}, {one.difference.high:+.4f}]",
                f"{one.difference.p:.3f}",
                one.verdict,
            )
            for one in told
        ],
    )
    other_tokens = comparison.tokens_differ(ours, theirs)
    if other_tokens:
        console.note("the two read other tokens: losses and perplexities are of different things")
    console.result(
        {
            "first": found[0].ref,
            "second": found[1].ref,
            "examples": len(ours),
            "draws": config.draws,
            "other_tokens": other_tokens,
            "figures": [one.as_json() for one in told],
        }
    )


def _asked(
    model: str,
    data: Path,
    objective: str | None,
    reference: str | None,
    overrides: Sequence[str] | None,
    ranks: int | None,
) -> Measurement:
    """Return what options ask for; a bad row costs a second here, a minute elsewhere."""
    from train_jobs.evaluation import Measurement, at, resolve

    config = resolve(model, data, objective, reference, overrides or [])
    return Measurement.load(at(config, ranks))


def _measured(measurement: Measurement, local: int | None, again: bool) -> Evaluation:
    """Return the stored evaluation, after making it if there is none."""
    from cluster.library.store import Library

    version = measurement.version

    def stored() -> Evaluation | None:
        known = Library().evaluations(version)
        return next((one for one in known if one.id == measurement.id), None)

    found = None if again else stored()
    if found is not None and found.digest == version.manifest.digest:
        console.out(f"{version.ref} was measured on these rows before, {found.created}")
        return found
    _run(measurement.config, version.name, local)
    found = stored()
    assert found is not None, "a job that succeeded has written its evaluation"
    return found


def _run(config: EvaluationConfig, name: str, local: int | None) -> None:
    from cluster.config import dump
    from train_jobs.evaluate_rank import FILE
    from train_jobs.following import watch
    from train_jobs.runs import RunDir

    cluster = None if local else find_cluster(required=True)
    if cluster:
        from cluster.resources import plan
        from cluster.status import room
        from train_jobs.evaluate_job import demand

        plan([demand(config)], [node.idle() for node in room(cluster)]).require()
    run = RunDir.create(f"eval-{name}")
    (run.path / FILE).write_text(dump(config))
    console.out(f"evaluation {run.id}: {run.path}")
    if cluster is None:
        from train_jobs.local import LocalRanks

        ranks = LocalRanks.start(run, config.run.workers, module="train_jobs.evaluate_rank")
        watch(run, ranks, line, config.run.stall_s)
        return
    from cluster.session import runtime_env, upload_code
    from train_jobs.plan import hand_line
    from train_jobs.submitted import SubmittedJob

    entrypoint = _entrypoint(run.path)
    console.out(hand_line(cluster, entrypoint))
    environment = runtime_env(upload_code(cluster), {"ROUNDHOUSE_HOME": str(cluster.home)})
    job = SubmittedJob(cluster, run, run.id)
    job.submit(environment, entrypoint)
    watch(run, job, line)


def _entrypoint(folder: Path | str) -> str:
    import shlex

    return shlex.join(["python", "-m", "train_jobs.evaluate_job", str(folder)])


def line(record: dict[str, Any]) -> str:
    """Return one record of an evaluation as a line for people."""
    match record.get("event"):
        case "measured":
            return f"measured {record['examples']} of {record['of']} examples"
        case "resampling":
            return f"measured {record['examples']} examples; {record['draws']} resamples"
        case "met":
            return f"ranks that have met: {record['world']}; model and rows are loaded"
        case "preparing":
            return "the objective is prepared; no row is measured yet"
        case "reference":
            return f"the reference is asked about {record['documents']} answers first"
        case other:
            return str(other)


def _rehearse(measurement: Measurement, local: int | None) -> dict[str, Any]:
    """Print what an evaluation would do, and return it."""
    import json

    from cluster.resources import plan
    from cluster.status import room
    from train_jobs.evaluate_job import demand
    from train_jobs.plan import hand_line

    config = measurement.config
    cluster = None if local else find_cluster(required=False)
    placed = plan([demand(config)], room(cluster)) if cluster else None
    told: dict[str, Any] = {
        "dry_run": True,
        "config": config.model_dump(mode="json"),
        "examples": measurement.data.examples,
        "tokens": measurement.data.tokens,
        "evaluation": measurement.id,
        "fits": placed.fits if placed else None,
        "plan": str(placed) if placed else "no cluster runs; `roundhouse up` starts one",
        "submit": hand_line(cluster, _entrypoint("RUN_FOLDER")),
    }
    console.out(f"resolved configuration:\n{json.dumps(told['config'], indent=2)}")
    console.out(f"data: {told['examples']} examples, {told['tokens']} tokens")
    console.out(f"plan: {told['plan']}\nby hand: {told['submit']}")
    return told


def _show(found: Evaluation) -> None:
    from cluster.library.evaluations import told

    against = f", against {found.reference}" if found.reference else ""
    console.table(
        f"{found.ref} as {found.objective['kind']} on {', '.join(found.data)}, "
        f"{found.examples} examples{against}",
        ["figure", f"value [{found.level:.0%} interval]"],
        [(name, told(figure)) for name, figure in found.figures.items()],
    )


def _outcomes(measurement: Measurement, found: Evaluation) -> Sequence[dict[str, Any]]:
    from cluster.library import evaluations
    from cluster.library.store import Library

    version = measurement.version
    return evaluations.outcomes(Library().root, version.name, version.number, found)
