"""Distillation: a student learns its teacher's distributions, block by block, however divided."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import JobError
from cluster.generation import Answered, Ask
from tests.parity import objectives_work as work
from tests.parity.engine_fixtures import VOCAB, save_tiny
from tests.parity.training_fixtures import Ranks, base, dataset, documents, one, two
from tests.parity.training_work import settings
from tests.unit.serving_fixtures import write_model
from train_jobs.data.dataset import Dataset
from train_jobs.data.example import Document, Example
from train_jobs.objectives import head as heads
from train_jobs.objectives import served_teacher
from train_jobs.objectives.distillation import Distilled
from train_jobs.objectives.divergence import divergence
from train_jobs.objectives.packed import load_decoder
from train_jobs.objectives.served_teacher import ServedDistilled
from train_jobs.objectives.settings import Distillation
from train_jobs.ports import PlainWorld
from train_jobs.runs import RunDir

pytestmark = pytest.mark.parity
__all__ = ["base", "one", "two"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model: deeper, wider, with a padded vocabulary."""
    return save_tiny(
        tmp_path_factory.mktemp("teacher"),
        seed=5,
        hidden_size=96,
        num_hidden_layers=4,
        vocab_size=VOCAB + 16,
    )


@pytest.fixture(scope="module")
def data() -> Dataset:
    return dataset(documents(40, prefix=10))


def fields(teacher: Path, **changes: Any) -> dict[str, Any]:
    options = changes.pop("options", {})
    changes.setdefault("run", {"steps": 5})
    objective = {"kind": "distillation", "teacher": str(teacher), **options}
    return settings(objective=objective, **changes)


OPTIONS = {"beta": 0.3, "temperature": 1.5, "nll": 0.2, "top_k": 20}


def test_tc02_ranks_stages_and_micro_batches_are_only_bookkeeping(
    one: Ranks, two: Ranks, base: Path, teacher: Path, data: Dataset, tmp_path: Path
) -> None:
    some = {"teacher": teacher, "options": OPTIONS}
    whole = fields(**some, zero=0, batch={"micro": 4})
    [expected] = one.run(work.trained, base, whole, data, tmp_path)
    for zero in (0, 2, 3):
        found = two.run(work.trained, base, fields(**some, zero=zero), data, tmp_path)[0]
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(found["norm"], expected["norm"], rtol=1e-4)
        for name, value in expected["parameters"].items():
            np.testing.assert_allclose(found["parameters"][name], value, atol=2e-4)
        assert found["after"] == pytest.approx(expected["after"], rel=1e-4)


def test_tc23_a_teacher_has_nothing_to_tell_itself(
    one: Ranks, base: Path, data: Dataset, tmp_path: Path
) -> None:
    [found] = one.run(
        work.trained, base, fields(base, optim={"lr": 1e-9}, run={"steps": 1}), data, tmp_path
    )
    assert found["before"]["divergence"] == pytest.approx(0, abs=1e-6)
    assert found["loss"][0] == pytest.approx(0, abs=1e-6)
    assert found["norm"][0] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"beta": 1.0}, OPTIONS], ids=str)
def test_the_loss_is_that_of_whole_logits(
    base: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(heads, "BLOCK", 5 * VOCAB)
    made = documents(4, seed=3)
    said = Distillation(kind="distillation", teacher="t", **options)
    objective = Distilled(said, teacher)
    student = objective.load(base, torch.float32)
    objective.prepare(student)
    batch = objective.collate([Example((document,)) for document in made])
    loss = objective.loss(student, batch).total
    loss.backward()
    plain, other = load_decoder(base, torch.float32), load_decoder(teacher, torch.float32)
    expected = torch.zeros(())
    for document in made:
        expected = expected + alone(plain, other, document, said)
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-4)
    for (name, ours), theirs in zip(student.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=2e-3, atol=5e-4, msg=lambda told, n=name: f"{n}: {told}"
        )


def alone(student: Any, teacher: Any, document: Document, said: Distillation) -> torch.Tensor:
    """One document by itself, through the library's own attention and whole logits."""
    ids = torch.tensor([document.ids])
    places = [at - 1 for at in range(1, len(document.ids)) if document.trained[at]]
    ours = student(input_ids=ids, use_cache=False).logits[0, places]
    with torch.no_grad():
        theirs = teacher(input_ids=ids, use_cache=False).logits[0, places, :VOCAB]
    p, q = ((x / said.temperature).log_softmax(1) for x in (theirs, ours))
    targets = ids[0, [at + 1 for at in places]]
    nll = torch.nn.functional.cross_entropy(ours, targets, reduction="sum")
    if said.top_k:
        named = p.topk(said.top_k, dim=1).indices
        p, q = coarse(p, named), coarse(q, named)
    return divergence(q, p, said.beta).sum() + said.nll * nll


def coarse(logps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    kept = logps.gather(1, ids)
    return torch.cat([kept, (1 - kept.exp().sum(1, keepdim=True)).log()], dim=1)


def test_tc25_a_student_of_its_teachers_size_becomes_it(
    one: Ranks, base: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = save_tiny(tmp_path_factory.mktemp("other"), seed=7, initializer_range=0.05)
    some = fields(other, batch={"total": 2}, run={"steps": 60}, optim={"lr": 5e-3})
    [found] = one.run(work.trained, base, some, dataset(documents(8)), tmp_path)
    assert found["after"]["divergence"] < 0.05
    assert found["after"]["divergence"] < 0.2 * found["before"]["divergence"]


class Served:
    """A teacher behind the sampler's contract: what a replica would say of each place."""

    def __init__(self, directory: Path) -> None:
        self._model = load_decoder(directory, torch.float32)

    def ask(self, asks: Sequence[Ask]) -> list[Answered]:
        return [Answered("teacher@1", prompt=self._likely(ask)) for ask in asks]

    def _likely(self, ask: Ask) -> tuple[Any, ...]:
        with torch.no_grad():
            ids = torch.tensor([ask.prompt_ids])
            logps = self._model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(1)
        top = logps.topk(ask.top, dim=1)
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return tuple(tuple(zip(ids, values, strict=True)) for ids, values in rows)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_served_teacher_says_the_same_as_one_beside_the_engine(
    base: Path, tmp_path_factory: pytest.TempPathFactory, beta: float
) -> None:
    other = save_tiny(tmp_path_factory.mktemp("served"), seed=11)
    examples = [Example((document,)) for document in documents(4, seed=3)]
    options = {"kind": "distillation", "top_k": 12, "beta": beta, "nll": 0.1}
    there = ServedDistilled(Distillation(teacher="serve:other", **options), Served(other))
    here = Distilled(Distillation(teacher="other", **options), other)
    losses, slopes = [], []
    for objective in (there, here):
        student = objective.load(base, torch.float32)
        objective.prepare(student)
        [batch] = objective.step(student, [objective.collate(examples)], [1.0])
        loss = objective.loss(student, batch).total
        loss.backward()
        losses.append(loss.detach())
        slopes.append(student.model.embed_tokens.weight.grad)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-4)


class Promoted:
    """A served teacher whose alias moves."""

    version = "teacher@1"

    def ask(self, asks: Sequence[Ask]) -> list[Answered]:
        place = tuple((token, -2.0) for token in range(3))
        return [Answered(self.version, prompt=(place,) * (len(a.prompt_ids) - 1)) for a in asks]


def test_a_run_learns_from_one_version_of_a_served_teacher(
    base: Path, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_teacher.dist, "broadcast_object_list", lambda told: None)
    told = Distillation(kind="distillation", teacher="serve:teacher", top_k=3)
    run, sampler = RunDir(tmp_path), Promoted()
    world = PlainWorld(0, 1, run)
    objective = ServedDistilled(told, sampler)
    batch = objective.collate([Example((document,)) for document in documents(2, seed=3)])
    objective.before(None, data, None, run, world)
    assert objective.others == {"teacher": "teacher@1"}
    assert objective.taught([batch])
    sampler.version = "teacher@2"
    with pytest.raises(JobError, match=r"now answers as teacher@2, .* learn from teacher@1; move"):
        objective.taught([batch])
    resumed = ServedDistilled(told, sampler)  # and in the next process as well
    resumed.before(None, data, None, run, world)
    with pytest.raises(JobError, match="`roundhouse promote teacher@1` and resume"):
        resumed.taught([batch])


def test_what_the_student_says_itself_takes_the_place_of_the_answer(
    one: Ranks, two: Ranks, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On-policy: which examples and what is said depend on the place in the run alone."""
    student = save_tiny(
        write_model(tmp_path_factory.mktemp("bytes")), vocab_size=258, initializer_range=0.05
    )
    teacher = save_tiny(tmp_path_factory.mktemp("other"), seed=3, vocab_size=258)
    options = {"lmbda": 0.5, "beta": 1.0, "max_completion_length": 6}
    made = dataset(documents(24))
    whole = fields(teacher, options=options, zero=0, batch={"micro": 4}, run={"steps": 3})
    [expected] = one.run(work.trained, student, whole, made, tmp_path)
    some = fields(teacher, options=options, run={"steps": 3})
    found = two.run(work.trained, student, some, made, tmp_path)[0]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-4)
    off = fields(teacher, options={**options, "lmbda": 0.0}, zero=0, run={"steps": 3})
    [given] = one.run(work.trained, student, off, made, tmp_path)
    assert abs(given["loss"][0] / expected["loss"][0] - 1) > 1e-3
