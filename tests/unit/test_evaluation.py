"""Evaluations: what is asked of a version, where the answer lies, and whether two differ."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.config import build
from cluster.errors import ConfigError, Corrupt, JobError
from cluster.library import evaluations
from cluster.library.cli import models
from cluster.library.evaluations import Evaluation, Figure
from cluster.library.manifest import Facts, Lineage
from cluster.library.store import Library, Version
from tests.unit.data_fixtures import jsonl, said
from tests.unit.library_fixtures import CONFIG, model
from tests.unit.text_fixtures import write_tokenizer
from train_jobs import compare, eval_cli, evaluation, following
from train_jobs.evaluate_job import places_of
from train_jobs.evaluate_rank import Told
from train_jobs.evaluation import EvaluationConfig
from train_jobs.follow import State
from train_jobs.group import Place
from train_jobs.metrics.bootstrap import differences, intervals
from train_jobs.outcome import Outcome, mean_loss
from train_jobs.ports import PlainWorld
from train_jobs.runs import RunDir

LABELS = {"0": "bad", "1": "good"}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setenv("ROUNDHOUSE_HOME", str(tmp_path / "home"))
    return Library()


def publish(library: Library, folder: Path, name: str = "m", **config: Any) -> Version:
    source = model(folder / name, fill=len(library.versions(name)) + 1)
    (source / "tokenizer.json").unlink()
    write_tokenizer(source)
    (source / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 400, **config}))
    return library.publish(name, source, Facts(base=None))


def record(version: Version, **changes: Any) -> Evaluation:
    fields: dict[str, Any] = {
        "id": "sft-0",
        "ref": version.ref,
        "digest": version.manifest.digest,
        "created": "2026-11-22T10:00:00+00:00",
        "objective": {"kind": "sft"},
        "data": {"rows.jsonl": "0" * 64},
        "examples": 2,
        "kept": 2,
        "draws": 100,
        "figures": {"loss": Figure(value=1.5, low=1.25, high=1.75)},
    }
    return Evaluation(**(fields | changes))


def test_an_evaluation_lies_beside_the_version_which_stays_as_it_was(
    library: Library, tmp_path: Path
) -> None:
    version = publish(library, tmp_path)
    rows = [{"where": "rows.jsonl:1", "loss": 1.0, "weight": 2.0, "said": 1, "meant": None}] * 2
    evaluations.write(library.root, "m", 1, record(version), rows)
    [found] = library.evaluations(version)
    assert found.figures["loss"] == Figure(value=1.5, low=1.25, high=1.75)
    assert evaluations.outcomes(library.root, "m", 1, found) == rows
    assert library.verify("m@1").manifest == version.manifest
    shown = CliRunner().invoke(models, ["show", "m@1"]).output
    assert "sft on rows.jsonl" in shown
    assert "loss 1.5000 [1.2500, 1.7500]" in shown
    told = json.loads(CliRunner().invoke(models, ["show", "m@1", "--json"]).output)
    assert told["evaluations"][0]["figures"]["loss"]["value"] == 1.5

    evaluations.write(library.root, "m", 1, record(version, examples=1, kept=1), rows[:1])
    assert [one.examples for one in library.evaluations(version)] == [1]  # replaced
    library.remove("m@1")
    assert library.evaluations(version) == []


def test_torn_outcomes_are_told_and_other_files_are_no_evaluations(
    library: Library, tmp_path: Path
) -> None:
    version = publish(library, tmp_path)
    path = evaluations.write(library.root, "m", 1, record(version), [{"where": "a"}] * 2)
    (path.parent / "note.json").write_text("{}")
    assert len(library.evaluations(version)) == 1
    path.with_suffix(".jsonl").write_text('{"where": "a"}\n')
    with pytest.raises(Corrupt, match="holds 1 outcomes instead of 2"):
        evaluations.outcomes(library.root, "m", 1, record(version))


@pytest.mark.parametrize(
    ("config", "row", "expected"),
    [
        ({}, said("a", "b"), {"kind": "sft"}),
        ({}, {"text": "a b"}, {"kind": "causal_lm"}),
        ({}, {"prompt": "a", "completion": "b"}, {"kind": "prompt_completion"}),
        (
            {"architectures": ["XForSequenceClassification"], "id2label": LABELS},
            {"text": "a", "label": "good"},
            {
                "kind": "sequence_classification",
                "problem": "single_label",
                "labels": ["bad", "good"],
            },
        ),
        (
            {"architectures": ["XForSequenceClassification"], "id2label": {"0": "LABEL_0"}},
            {"text": "a", "label": 0.5},
            {"kind": "sequence_classification", "problem": "regression"},
        ),
        (
            {"architectures": ["XForTokenClassification"], "id2label": LABELS},
            {"tokens": ["a"], "tags": ["bad"]},
            {"kind": "token_classification", "labels": ["bad", "good"]},
        ),
    ],
)
def test_the_model_and_the_first_row_tell_what_to_measure(
    library: Library,
    tmp_path: Path,
    config: dict[str, Any],
    row: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    publish(library, tmp_path, **config)
    data = jsonl(tmp_path / "rows.jsonl", [row])
    found = evaluation.resolve("m", data).objective.model_dump(mode="json")
    assert {key: found[key] for key in expected} == expected


def test_what_cannot_be_measured_is_refused_before_anything_runs(
    library: Library, tmp_path: Path
) -> None:
    publish(library, tmp_path)
    publish(library, tmp_path, "headless", model_type="bert", architectures=["BertModel"])
    rows = jsonl(tmp_path / "rows.jsonl", [said("a", "b")])
    pairs = jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(ConfigError, match="has no trained head for reward"):
        evaluation.resolve("m", pairs, "reward")
    with pytest.raises(ConfigError, match="BertModel without a head"):
        evaluation.resolve("headless", rows)
    with pytest.raises(ConfigError, match="name it with --reference"):
        evaluation.resolve("m", pairs)
    with pytest.raises(ConfigError, match="no file"):
        evaluation.resolve("m", tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="--set draws: draws: Input should be greater"):
        evaluation.resolve("m", rows, overrides=["draws=0"])
    assert evaluation.resolve("m", pairs, reference="m@1").reference == "m@1"
    bad = jsonl(tmp_path / "bad.jsonl", [said("a", "b"), {"messages": []}])
    with pytest.raises(ConfigError, match=r"bad.jsonl:2: messages"):
        evaluation.Measurement.load(evaluation.resolve("m", bad))


def test_a_student_is_measured_against_the_teacher_that_it_had(
    library: Library, tmp_path: Path
) -> None:
    publish(library, tmp_path, "big")
    publish(library, tmp_path, "big")
    publish(library, tmp_path)
    rows = jsonl(tmp_path / "rows.jsonl", [said("a", "b")])
    with pytest.raises(ConfigError, match=r"m@1 does not say .* --set objective.teacher=NAME@3"):
        evaluation.resolve("m", rows, "distillation")
    taught = Lineage(run_id="r", config_hash="c", models={"teacher": "big@1"})
    library.publish("m", tmp_path / "m", Facts(lineage=taught))
    found = evaluation.resolve("m@2", rows, "distillation")
    assert found.objective.others == {"teacher": "big@1"}
    named = evaluation.resolve("m@2", rows, "distillation", None, ["objective.teacher=big"])
    assert named.objective.others == {"teacher": "big@2"}  # exact: it is part of the answer's name
    ids = {evaluation.Measurement.load(one).id for one in (found, named)}
    assert len(ids) == 2


def test_preferences_are_measured_against_another_version_however_they_are_asked_for(
    library: Library, tmp_path: Path
) -> None:
    alone = publish(library, tmp_path)
    source = model(tmp_path / "m2", fill=7)
    (source / "tokenizer.json").unlink()
    write_tokenizer(source)
    child = library.publish("m", source, Facts(base=alone.ref))
    rows = [{"prompt": "engine", "chosen": "in stall", "rejected": "gone"}]
    data = jsonl(tmp_path / "pairs.jsonl", rows)
    asked = ["objective.kind=dpo"]
    assert evaluation.resolve(child.ref, data, None, None, asked).reference == alone.ref
    assert evaluation.resolve(child.ref, data, "sft", None, asked).reference == alone.ref
    named = evaluation.resolve(alone.ref, data, None, None, [*asked, f"reference={child.ref}"])
    assert named.reference == child.ref
    with pytest.raises(ConfigError, match="name it with --reference"):
        evaluation.resolve(alone.ref, data, None, None, asked)
    fields = evaluation.resolve(child.ref, data, "kto").model_dump(mode="json")
    with pytest.raises(ConfigError, match="kind=kto measures .* give reference: NAME@3"):
        build({**fields, "reference": None}, EvaluationConfig)


class Busy:
    """A job that runs until it is ended."""

    killed = False

    def state(self) -> State:
        return "running"

    def why(self) -> str:
        return ""

    def kill(self) -> None:
        self.killed = True

    def detach(self) -> None:
        raise AssertionError


def test_an_evaluation_without_a_word_is_ended_by_name_of_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, job, run = [0.0], Busy(), RunDir(tmp_path)
    monkeypatch.setattr("train_jobs.following.time.monotonic", lambda: now[0])

    def sleep(seconds: float) -> None:
        now[0] += 10
        if now[0] < 400:
            run.append({"event": "measured", "examples": now[0], "of": 90})

    monkeypatch.setattr("train_jobs.following.time.sleep", sleep)
    with pytest.raises(
        JobError, match=r"no word for 60 s \(run.stall_s\), the last was 'measured'"
    ):
        following.watch(run, job, eval_cli.line, 60)
    assert job.killed
    assert 450 <= now[0] <= 470
    assert (run.read_result() or {})["status"] == "failed"


def test_rank_0_says_that_it_lives_once_in_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, run = [0.0], RunDir(tmp_path)
    monkeypatch.setattr("train_jobs.evaluate_rank.time.monotonic", lambda: now[0])
    told = Told(PlainWorld(0, 2, run), 5.0)
    told.alive()
    now[0] = 6.0
    told.alive()  # a pass of the reference
    told.begin(examples=8, rows=4)
    told.beat()
    now[0] = 12.0
    told.beat()
    told.alive()
    told.say({"event": "resampling"})
    now[0] = 18.0
    told.alive()
    words = [(r["event"], r.get("examples")) for r, _ in run.read_metrics()]
    assert words == [
        ("preparing", None),
        ("measured", 0),
        ("measured", 4),
        ("resampling", None),
        ("resampling", None),
    ]


def test_a_policy_is_measured_without_the_term_that_asks_for_an_adapter(
    library: Library, tmp_path: Path
) -> None:
    publish(library, tmp_path)
    rows = jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    sets = ["objective.beta=0.1", "objective.rewards=[builtins:len]"]
    config = evaluation.resolve("m", rows, "grpo", None, sets)
    training = evaluation.Measurement.load(config).training()
    assert training.objective.kind == "grpo"
    assert training.objective.beta == 0.0


def test_an_id_is_made_of_what_was_asked(library: Library, tmp_path: Path) -> None:
    publish(library, tmp_path)
    rows = jsonl(tmp_path / "rows.jsonl", [said("a", "b")])
    copy = jsonl(tmp_path / "copy.jsonl", [said("a", "b")])
    other = jsonl(tmp_path / "other.jsonl", [said("a", "c")])

    def asked(data: Path, *overrides: str, workers: int = 1) -> str:
        config = evaluation.resolve("m", data, overrides=overrides)
        return evaluation.Measurement.load(evaluation.at(config, workers)).id

    same = {asked(rows), asked(copy), asked(rows, workers=2), asked(rows, "run.threads=1")}
    assert len(same) == 1
    assert asked(other) not in same
    assert asked(rows, "run.seed=1") not in same
    assert asked(rows, "data.max_len=32") not in same


def outcome(number: int, right: bool) -> Outcome:
    return Outcome(f"rows.jsonl:{number}", 0.5 if right else 2.0, 1.0, right, True)


def score(outcomes: Any) -> dict[str, float]:
    right = [one.said == one.meant for one in outcomes]
    return {"loss": mean_loss(outcomes), "accuracy": sum(right) / len(right)}


def test_a_difference_is_real_only_when_it_is() -> None:
    rng = random.Random(0)
    hard = [rng.random() < 0.6 for _ in range(300)]
    worse = [outcome(n, right) for n, right in enumerate(hard)]
    better = [outcome(n, right or rng.random() < 0.3) for n, right in enumerate(hard)]
    alike = [outcome(n, right ^ (rng.random() < 0.02)) for n, right in enumerate(hard)]
    found = {one.name: one for one in compare.compare(worse, better, score, draws=300)}
    assert found["accuracy"].verdict == "better"
    assert found["loss"].verdict == "better"
    assert found["loss"].difference.value < 0
    assert found["accuracy"].difference.p < 0.05
    back = {one.name: one for one in compare.compare(better, worse, score, draws=300)}
    assert back["accuracy"].verdict == "worse"
    near = {one.name: one for one in compare.compare(worse, alike, score, draws=300)}
    assert near["accuracy"].verdict == "no difference shown"
    same = {one.name: one for one in compare.compare(worse, worse, score, draws=50)}
    assert same["loss"].difference.p == 1


def test_outcomes_are_paired_by_their_place() -> None:
    def row(number: int, loss: float) -> dict[str, Any]:
        where = f"rows.jsonl:{number}"
        return {"where": where, "loss": loss, "weight": 1.0, "said": ["a"], "meant": None}

    ours, theirs = compare.paired([row(1, 1.0), row(2, 2.0)], [row(2, 20.0), row(1, 10.0)])
    assert [(a.loss, b.loss) for a, b in zip(ours, theirs, strict=True)] == [(1, 10), (2, 20)]
    assert ours[0].said == ("a",)  # as it was before it was written
    with pytest.raises(ConfigError, match=r"only one of them has rows.jsonl:3"):
        compare.paired([row(1, 1.0)], [row(1, 1.0), row(3, 1.0)])


def test_a_score_gives_all_its_intervals_from_one_set_of_resamples() -> None:
    items = [outcome(n, n % 3 > 0) for n in range(60)]
    calls = 0

    def counted(some: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        return score(some)

    found = intervals(items, counted, draws=40)
    assert calls == 41
    assert found["accuracy"].low < 2 / 3 < found["accuracy"].high
    apart = differences(items, items, score, draws=20)
    assert {(one.low, one.high) for one in apart.values()} == {(0.0, 0.0)}
    # a figure that a resample does not have is left out of its interval
    some = intervals([1, 2], lambda drawn: {"f": 1.0} if len({*drawn}) > 1 else {}, draws=10)
    assert some["f"].low == some["f"].high == 1


def test_ranks_on_one_machine_share_its_threads() -> None:
    places = places_of([("a", "10.0.0.1:5"), ("b", "10.0.0.2:6"), ("a", "10.0.0.1:7")])
    assert places == [
        Place(0, 3, 0, 2, "10.0.0.1:5"),
        Place(1, 3, 0, 1, "10.0.0.1:5"),
        Place(2, 3, 1, 2, "10.0.0.1:5"),
    ]
