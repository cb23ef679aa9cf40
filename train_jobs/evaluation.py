"""What one evaluation is: a version, rows, and what is asked of it. No torch, no Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, model_validator

from cluster.config import Frozen, build
from cluster.errors import ConfigError
from cluster.library.evaluations import id_of
from cluster.library.store import Library, Version
from train_jobs.config import FinetuneConfig, Run
from train_jobs.data import readers
from train_jobs.data.dataset import Dataset, load_datasets
from train_jobs.data.settings import Data, Source
from train_jobs.data.settle import settle
from train_jobs.data.tokenise import form_of
from train_jobs.objectives.families import check_family, family_of
from train_jobs.objectives.pinning import pinned
from train_jobs.objectives.settings import GRPO, Objective

MAX_LEN = 512
LOOKED_AT = 100
"""Rows that are read in search of the first good one."""
HEADS = {
    "sequence_classification": ("ForSequenceClassification",),
    "reward": ("ForSequenceClassification",),
    "token_classification": ("ForTokenClassification",),
    "masked_lm": ("ForMaskedLM", "ForPreTraining"),
}
"""What the class of a model must end with: a head that a version lacks would be random."""
REFERRED = ("dpo", "kto")
"""Objectives that compare with another version."""


class Where(Frozen):
    """Where and how an evaluation computes."""

    workers: PositiveInt = 1
    """Ranks; each holds the whole model and takes a share of the rows."""
    num_cpus: PositiveFloat = 1.0
    num_gpus: float = Field(0.0, ge=0)
    """Reserved for each worker."""
    threads: PositiveInt | None = None
    """CPU threads of a worker; by default the machine's cores divided by its workers."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: NonNegativeInt = 0
    """Of what is hidden or drawn, and of the resamples."""
    timeout_s: PositiveFloat = 600.0
    stall_s: PositiveFloat = 600.0
    """Seconds without a word from rank 0 after which an evaluation is ended. Longer than the model
    takes to load, than one row takes, and than what the objective asks of others for it."""

    def training(self) -> Run:
        """Return the same as a training run says it."""
        return Run(steps=1, **self.model_dump())


class EvaluationConfig(Frozen):
    """The whole of one evaluation, as its ranks read it."""

    model: str
    data: Data
    """``train`` names the rows that are measured."""
    objective: Objective
    reference: str | None = None
    """The version that preferences are measured against."""
    draws: PositiveInt = 1000
    """Resamples that intervals are taken from."""
    run: Where = Field(default_factory=Where)

    @model_validator(mode="after")
    def _compared(self) -> EvaluationConfig:
        kind = self.objective.kind
        if kind in REFERRED and self.reference is None:
            raise ValueError(
                f"objective.kind={kind} measures preferences against another version, and none is "
                "named: against itself a version has none; give reference: NAME@3 (--reference)"
            )
        return self


@dataclass(frozen=True)
class Measurement:
    """An evaluation with its data: the same on every rank."""

    config: EvaluationConfig
    version: Version
    reference: Version | None
    data: Dataset
    objective: Objective

    @classmethod
    def load(cls, config: EvaluationConfig) -> Measurement:
        """Read the data. ConfigError names file and line, or what the model cannot do."""
        library = Library()
        version = library.resolve(config.model)
        check_model(config, version)
        reference = library.resolve(config.reference) if config.reference else None
        if reference:
            check_reference(version, reference)
        read, _ = load_datasets(config.data, config.objective, version.path)
        objective, _, data = settle(config.objective, version.path, read, read, config.run.seed)
        assert data is not None, "what was given as held out comes back"
        return cls(config, version, reference, data, objective)

    def training(self) -> FinetuneConfig:
        """Return a training run that has this objective: what opens it reads that."""
        objective = self.objective
        if isinstance(objective, GRPO):  # its beta weighs what is learnt, and asks for an adapter
            objective = objective.model_copy(update={"beta": 0.0})
        return FinetuneConfig(
            model=self.config.model,
            data=self.config.data,
            objective=objective,
            zero=0,
            run=self.config.run.training().model_copy(update={"workers": 1}),
        )

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file, by its name alone."""
        return {Path(name).name: value for name, value in self.data.hashes.items()}

    @property
    def id(self) -> str:
        """What tells this evaluation from others of the same version."""
        return id_of(self.objective.model_dump(mode="json"), self.asked)

    @property
    def asked(self) -> dict[str, Any]:
        """All beside the objective that decides the outcomes."""
        data = self.config.data.model_dump(mode="json", exclude={"train", "heldout", "split"})
        rows = [
            source.model_dump(mode="json", exclude={"path", "weight"})
            for source in self.config.data.train
        ]
        run = self.config.run.model_dump(include={"dtype", "seed"})
        return {
            "data": sorted(self.hashes.values()),
            "rows": rows,
            "reference": self.reference.ref if self.reference else None,
            **data,
            **run,
        }


def resolve(
    model: str,
    data: Path,
    kind: str | None = None,
    reference: str | None = None,
    overrides: Sequence[str] = (),
) -> EvaluationConfig:
    """Return the evaluation that options ask for; what they leave out, model and rows tell.

    ``reference`` counts for objectives that compare with another version.

    Raises:
        ConfigError: a row or an option that cannot be, or a model without the head for it.
        UnknownModel: the library has no such version.
    """
    version = Library().resolve(model)
    if version.manifest.kind == "adapter":
        raise ConfigError(
            f"{version.ref} is an adapter, which has no output of its own; evaluate the version it "
            f"was merged into, or its base {version.manifest.base}"
        )
    limit = version.manifest.architecture.context_length or MAX_LEN
    path = data if str(data).startswith("hub:") else Path(os.path.abspath(data))
    fields: dict[str, Any] = {
        "model": version.ref,
        "data": {"train": [{"path": str(path)}], "max_len": min(MAX_LEN, limit)},
        "objective": {"kind": kind or "sft"},
    }
    draft = build(
        {**fields, "objective": {"kind": "sft"}}, Draft, _only(overrides, "data"), "--set"
    )
    facts = facts_of(version)
    if kind is None:
        fields["objective"] = recognised(facts, version, draft.data.train[0])
    elif kind in HEADS:
        check_head(kind, facts, version.ref)
        fields["objective"] = {"kind": kind, **head_settings(kind, facts)}
    elif kind == "distillation":
        fields["objective"] |= taught_by(version, overrides)
    # --set may name another kind, and a reference
    named = [*_only(overrides, "objective"), *(o for o in overrides if o.startswith("reference="))]
    asked = build({**fields, "reference": reference}, Draft, named, "--set")
    kind = asked.objective["kind"]
    if kind in REFERRED:
        fields["reference"] = Library().resolve(asked.reference or _base(version, kind)).ref
    made = build(fields, EvaluationConfig, overrides, "--set")
    return made.model_copy(update={"objective": pinned(made.objective)})


def taught_by(version: Version, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Return the teacher that a version is measured against: by default the one that it had.

    Raises ConfigError where it had none, and nobody names one.
    """
    if any(one.startswith("objective.teacher=") for one in overrides):
        return {}
    lineage = version.manifest.lineage
    teacher = lineage.models.get("teacher") if lineage else None
    if teacher is None:
        raise ConfigError(
            f"--objective distillation: {version.ref} does not say whom it has learnt from; name "
            "the teacher with --set objective.teacher=NAME@3"
        )
    return {"teacher": teacher}


class Draft(Frozen):
    """What must be known of the rows before the objective is."""

    model: str
    data: Data
    objective: dict[str, Any]
    reference: str | None = None


def _only(overrides: Sequence[str], group: str) -> list[str]:
    return [one for one in overrides if one.startswith(f"{group}.")]


def facts_of(version: Version) -> dict[str, Any]:
    """Return a version's config.json."""
    facts: dict[str, Any] = json.loads((version.path / "config.json").read_text())
    return facts


def recognised(facts: Mapping[str, Any], version: Version, source: Source) -> dict[str, Any]:
    """Return the objective that a model and the first row of a file have in common."""
    asked = [{"kind": kind, **head_settings(kind, facts)} for kind in kinds_of(facts)]
    if not asked:
        raise ConfigError(
            f"{version.ref} is a {_class(facts) or 'model'} without a head that could be measured; "
            "train one on it first, with `roundhouse train`"
        )
    files = readers.find(source, "--data")
    head = list(islice(files.rows(), LOOKED_AT))
    good = next((at for at, row in enumerate(head) if row.fields is not None), len(head) - 1)
    first: ConfigError | None = None
    for fields in asked:
        objective: Objective = TypeAdapter(Objective).validate_python(fields)
        try:
            form_of(files, head[: good + 1], objective, version.path)
        except ConfigError as error:
            first = first or error
            continue
        return fields
    assert first is not None, "at least one was tried"
    raise first


def kinds_of(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the objectives that a model may be measured by, those of richer rows first."""
    name = _class(facts)
    if name.endswith(HEADS["token_classification"]):
        return ("token_classification",)
    if name.endswith(HEADS["sequence_classification"]):
        one = len(facts.get("id2label") or {0: ""}) == 1
        return ("reward", "sequence_classification") if one else ("sequence_classification",)
    match family_of(facts):
        case "seq2seq":
            return ("seq2seq",)
        case "encoder":
            return ("masked_lm",) if name.endswith(HEADS["masked_lm"]) else ()
        case _:
            return ("sft", "prompt_completion", "dpo", "kto", "causal_lm")


def head_settings(kind: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model's own head says of an objective: its problem and its labels."""
    named = facts.get("id2label") or {}
    labels = [named[key] for key in sorted(named, key=int)]
    if kind == "token_classification":
        return {"labels": labels}
    if kind != "sequence_classification":
        return {}
    told = str(facts.get("problem_type") or "")
    if told == "regression" or len(labels) == 1:
        return {"problem": "regression"}
    several = told == "multi_label_classification"
    return {"problem": "multi_label" if several else "single_label", "labels": labels}


def check_model(config: EvaluationConfig, version: Version) -> None:
    """Refuse what a version cannot be asked, from its files' headers alone."""
    facts = facts_of(version)
    check_head(config.objective.kind, facts, version.ref)
    check_family(config.objective, facts, version.ref, config.data.max_len)


def check_head(kind: str, facts: Mapping[str, Any], ref: str) -> None:
    """Refuse an objective whose head a model does not have."""
    wanted = HEADS.get(kind)
    if wanted and not _class(facts).endswith(wanted):
        raise ConfigError(
            f"{ref} is a {_class(facts) or 'model without a class'} and has no trained head for "
            f"{kind}: its answers would be random; it can be measured as "
            f"{', '.join(kinds_of(facts)) or 'nothing yet'}"
        )


def check_reference(version: Version, reference: Version) -> None:
    """Refuse a reference that reads other tokens."""
    mine, theirs = (v.manifest.files.get("tokenizer.json") for v in (version, reference))
    if mine != theirs:
        raise ConfigError(
            f"--reference {reference.ref}: it reads other tokens than {version.ref}, so their "
            "likelihoods cannot be compared; name a version with the same tokenizer"
        )


def _base(version: Version, kind: str) -> str:
    if version.manifest.base is None:
        raise ConfigError(
            f"{version.ref} was made from no other version of this library, and {kind} measures "
            "preferences against one; name it with --reference, or use --objective simpo or orpo"
        )
    return version.manifest.base


def _class(facts: Mapping[str, Any]) -> str:
    return str((facts.get("architectures") or [""])[0])


def at(config: EvaluationConfig, workers: int | None) -> EvaluationConfig:
    """Return the same evaluation with that many ranks."""
    if workers is None:
        return config
    run = config.run.model_copy(update={"workers": workers})
    return config.model_copy(update={"run": run})


def common_reference(first: str, second: str, named: str | None) -> str | None:
    """Return what both of two versions are compared with, where an objective asks for it."""
    library = Library()
    bases = [library.resolve(ref).manifest.base for ref in (second, first)]
    return named or bases[0] or bases[1]
