"""The model card that lies in every published version as README.md. Pure.

Written from what the run knows and the manifest keeps, so that nobody has to remember: nothing in
it is praise. Its head is the YAML that model hubs read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cluster.library.evaluations import Figure, told
from train_jobs.data.settings import HUB

if TYPE_CHECKING:
    from cluster.library.manifest import Facts
    from train_jobs.data.dataset import Dataset
    from train_jobs.task import Task

BEFORE, AFTER = "_before", "_after"
HELD_OUT = "heldout_"


def render(task: Task, name: str, facts: Facts, intervals: Mapping[str, Figure]) -> str:
    """Return the card of a version of ``name``; ``intervals`` are of the held-out figures after."""
    parts = [
        _head(task, facts),
        f"# {name}",
        _what(task, facts),
        "## Data",
        _data(task, facts),
        "## Results",
        _results(task, facts.metrics, intervals),
        "## Configuration",
        f"```yaml\n{_configuration(task)}```",
        "## Limits",
        _limits(task),
        "## Licence",
        _licence(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _head(task: Task, facts: Facts) -> str:
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "base_model": facts.base,
        "license": facts.licence or "unknown",
        "tags": ["roundhouse", task.objective.kind],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _what(task: Task, facts: Facts) -> str:
    how = "all parameters trained" if task.config.adapter is None else "trained in part"
    lineage = facts.lineage
    lines = [
        f"Made from `{facts.base}` by the objective `{task.objective.kind}`: {how}, "
        f"{task.order.steps} steps of {task.config.batch.total} rows "
        f"({task.order.epochs_done:.3g} epochs).",
    ]
    if lineage:
        code = f", code `{lineage.code_revision}`" if lineage.code_revision else ""
        lines.append(f"Run `{lineage.run_id}`, configuration `{lineage.config_hash[:16]}`{code}.")
        lines += [f"Its {what} was `{ref}`." for what, ref in lineage.models.items()]
    lines += [f"{note[0].upper()}{note[1:]}." for note in facts.notes]
    return "\n".join(lines)


def _data(task: Task, facts: Facts) -> str:
    rows = ["| | examples | tokens | learnt from |", "| --- | ---: | ---: | ---: |"]
    rows.append(_counts("trained on", task.train))
    if task.heldout:
        rows.append(_counts("held out", task.heldout))
    hashes = facts.lineage.data_hashes if facts.lineage else {}
    files = [f"- `{_named(name)}`: SHA-256 `{value}`" for name, value in hashes.items()]
    return "\n".join([*rows, "", *files])


def _counts(what: str, data: Dataset) -> str:
    learnt = f"{data.trained_tokens} tokens" if data.trained_tokens else "labels"
    return f"| {what} | {data.examples} | {data.tokens} | {learnt} |"


def _results(task: Task, metrics: Mapping[str, float], intervals: Mapping[str, Figure]) -> str:
    names = [key[len(HELD_OUT) : -len(AFTER)] for key in metrics if key.endswith(AFTER)]
    if not names:
        return "Nothing was held out, so nothing was measured."
    rows = ["| held out | before | after |", "| --- | ---: | ---: |"]
    for name in names:
        before = metrics.get(f"{HELD_OUT}{name}{BEFORE}")
        after = intervals.get(name) or Figure(value=metrics[f"{HELD_OUT}{name}{AFTER}"])
        rows.append(f"| {name} | {'-' if before is None else f'{before:.4f}'} | {told(after)} |")
    of = f"Of {task.heldout.examples} held-out examples" if task.heldout else "Of held-out examples"
    return "\n".join([*rows, "", f"{of}; in brackets 95 % bootstrap intervals."])


def _configuration(task: Task) -> str:
    """Return what was asked, without the folders of the machine that asked."""
    said = task.config.model_dump(mode="json", exclude_defaults=True)
    for sources in ("train", "heldout"):
        for source in said.get("data", {}).get(sources) or ():
            source["path"] = _named(source["path"])
    return yaml.safe_dump(said, sort_keys=False)


def _named(path: str) -> str:
    """Return a file by its name alone, and a hub's data set by its whole one."""
    return path if path.startswith(HUB) else Path(path).name


def _limits(task: Task) -> str:
    report, data = task.train.report, task.config.data
    lines = [
        f"It has seen rows of up to {data.max_len} tokens; longer ones were not tried.",
        "It was taught nothing beyond these rows; what its base gets wrong it may get wrong.",
        "No figure above says how safe its answers are.",
    ]
    if task.heldout is None:
        lines.append("It was not measured on rows that it had not seen.")
    elif task.heldout.examples < 100:
        lines.append(f"Only {task.heldout.examples} examples were held out: see the intervals.")
    for count, what in (
        (report.truncated, "rows were cut to that length"),
        (report.too_long, "rows were left out as too long"),
        (len(report.bad_rows), "or more rows were left out as damaged"),
        (report.also_heldout, "rows were left out because they are held out as well"),
    ):
        if count:
            lines.append(f"{count} {what}.")
    return "\n".join(f"- {line}" for line in lines)


def _licence(facts: Facts) -> str:
    base = facts.licence or "unknown; ask whoever made it"
    return f"Of the base: {base}. The terms of the data are not known here; they may say more."
