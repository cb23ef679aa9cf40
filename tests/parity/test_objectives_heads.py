"""Objectives with a head of their own: losses, learning, ranks, and what is published."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity import heads_work as work
from tests.parity.heads_fixtures import (
    encoded,
    records,
    save_bart,
    save_bert,
    save_llama,
    save_t5,
)
from tests.parity.training_fixtures import Ranks, one, two
from tests.parity.training_work import settings
from train_jobs.config import FinetuneConfig
from train_jobs.data.dataset import Dataset
from train_jobs.data.example import Document, Example
from train_jobs.objectives.open import open_objective
from train_jobs.objectives.padded import Padding, padded
from train_jobs.objectives.reward import Compared, RewardModel
from train_jobs.objectives.sequence_classification import Labelled, SequenceClassifier
from train_jobs.objectives.settings import Reward, SequenceClassification, TokenClassification
from train_jobs.objectives.token_classification import Tagged, TokenClassifier

pytestmark = pytest.mark.parity
__all__ = ["one", "two"]

PADDING = Padding(0, typed=False, caches=False)
CLASSES: dict[str, Any] = {"kind": "sequence_classification"}
LORA: dict[str, Any] = {"kind": "lora", "r": 4, "alpha": 8.0}
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    # name: base, objective, rows
    "single_label": ("bert", CLASSES, "single_label"),
    "pair": ("bert", CLASSES, "pair"),
    "decoder": ("llama", CLASSES, "single_label"),
    "multi_label": ("bert", CLASSES | {"problem": "multi_label"}, "multi_label"),
    "regression": ("bert", CLASSES | {"problem": "regression"}, "regression"),
    "tags": ("bert", {"kind": "token_classification"}, "tags"),
    "t5": ("t5", {"kind": "seq2seq", "max_target_len": 40}, "translation"),
    "bart": ("bart", {"kind": "seq2seq", "max_target_len": 40}, "translation"),
    "masked": ("bert", {"kind": "masked_lm"}, "text"),
    "next": ("bert", {"kind": "masked_lm", "next_sentence": True}, "text"),
    "reward": ("llama", {"kind": "reward"}, "preference"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {"bert": save_bert, "t5": save_t5, "bart": save_bart, "llama": save_llama}
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in made.items()}


def task(
    bases: dict[str, Path], name: str, count: int = 24, seed: int = 0, **changes: Any
) -> tuple[Path, dict[str, Any], Dataset]:
    """Return base, fields of the configuration and data of one of KINDS."""
    base, objective, rows = KINDS[name]
    parsed = FinetuneConfig.model_validate(settings(objective=objective)).objective
    settled, data = encoded(parsed, bases[base], records(rows, count, seed))
    fields = settings(objective=settled.model_dump(), optim={"lr": 5e-3, "weight_decay": 0.0})
    return bases[base], fields | changes, data


def texts(*lengths: int) -> Any:
    return PADDING.collate([[Document("", (7,) * n, (True,) * n)] for n in lengths], "cpu")


def says(logits: Any) -> Any:
    """Return a model that always says this."""
    return lambda **_: SimpleNamespace(logits=torch.tensor(logits, requires_grad=True))


def softmax(x: Any) -> Any:
    raised = np.exp(x - x.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


LOGITS = np.array([[2.0, -1.0, 0.5], [0.1, 0.2, -0.3]], dtype=np.float32)


def test_tc23_single_label_is_the_cross_entropy_summed_over_rows() -> None:
    objective = SequenceClassifier(SequenceClassification(**CLASSES, labels=("a", "b", "c")))
    batch = Labelled(texts(3, 2), torch.tensor([2, 0]))
    loss = objective.loss(says(LOGITS), batch)
    expected = -np.log(softmax(LOGITS)[[0, 1], [2, 0]]).sum()
    assert float(loss.total) == pytest.approx(expected, rel=1e-6)
    assert loss.figures == {"accuracy": (0.0, 2.0)}
    assert batch.weight == 2


def test_tc23_multi_label_is_the_mean_binary_cross_entropy_of_each_row() -> None:
    settings = SequenceClassification(**CLASSES, problem="multi_label", labels=("a", "b", "c"))
    labels = np.array([[1, 0, 1], [0, 0, 0]], dtype=np.float32)
    loss = SequenceClassifier(settings).loss(
        says(LOGITS), Labelled(texts(3, 2), torch.tensor(labels))
    )
    p = 1 / (1 + np.exp(-LOGITS))
    expected = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean(-1).sum()
    assert float(loss.total) == pytest.approx(expected, rel=1e-6)


def test_tc23_a_regression_is_the_squared_error() -> None:
    settings = SequenceClassification(**CLASSES, problem="regression")
    batch = Labelled(texts(3, 2), torch.tensor([0.5, -1.0]))
    loss = SequenceClassifier(settings).loss(says([[2.0], [1.0]]), batch)
    assert float(loss.total) == pytest.approx(1.5**2 + 2.0**2, rel=1e-6)


def test_tc23_tags_are_the_cross_entropy_of_first_tokens_only() -> None:
    objective = TokenClassifier(TokenClassification(kind="token_classification", labels=("O", "X")))
    objective._padding = PADDING
    ids = ((2, 9, 9, 3), (2, 9, 3))
    tags = ((None, "X", None, None), (None, "O", None))
    examples = [
        Example((Document("", row, tuple(t is not None for t in tag)),), tag)
        for row, tag in zip(ids, tags, strict=True)
    ]
    batch: Tagged = objective.collate(examples)
    logits = np.random.default_rng(0).normal(size=(2, 4, 2)).astype(np.float32)
    loss = objective.loss(says(logits), batch)
    expected = -np.log(softmax(logits)[[0, 1], [1, 1], [1, 0]]).sum()
    assert float(loss.total) == pytest.approx(expected, rel=1e-6)
    assert batch.weight == 2


@pytest.mark.parametrize("pull", [0.0, 0.1])
def test_tc23_a_reward_is_judged_by_its_margin(pull: float) -> None:
    objective = RewardModel(Reward(kind="reward", center_rewards_coefficient=pull))
    model = says([[1.5], [0.2], [0.5], [0.9]])  # two chosen, two rejected
    loss = objective.loss(model, Compared(texts(3, 2, 4, 3)))
    expected = sum(
        math.log1p(math.exp(-(c - r))) + pull * (c + r) ** 2 for c, r in [(1.5, 0.5), (0.2, 0.9)]
    )
    assert float(loss.total) == pytest.approx(expected, rel=1e-6)
    assert loss.figures["accuracy"] == (1.0, 2.0)
    assert loss.figures["margin"][0] == pytest.approx(1.0 - 0.7, rel=1e-5)
    equal = objective.loss(says([[0.3], [0.3]]), Compared(texts(3, 2)))
    assert float(equal.total) == pytest.approx(math.log(2) + pull * 0.36, rel=1e-6)


def loaded(base: Path, fields: dict[str, Any]) -> tuple[Any, Any]:
    """Return objective and model, ready."""
    torch.manual_seed(0)
    objective = open_objective(FinetuneConfig.model_validate(fields))
    model = objective.load(base, torch.float32)
    objective.prepare(model)
    return objective, model.eval()


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_tc23_tc24_seq2seq_is_transformers_loss_summed(
    bases: dict[str, Path], name: str, smoothing: float
) -> None:
    base, fields, data = task(bases, name, 3)
    fields["objective"] |= {"label_smoothing": smoothing}
    objective, model = loaded(base, fields)
    examples = [row[0] for row in data.rows]
    loss = objective.loss(model, objective.collate(examples, [], "cpu"))
    labels = padded([example.documents[1].ids[1:] for example in examples], -100, "cpu")
    sources = PADDING.collate([example.documents[:1] for example in examples], "cpu")
    with torch.no_grad():
        reference = model(**sources.inputs, labels=labels)  # it shifts the labels itself
    count = int((labels != -100).sum())
    assert int(loss.figures["token_accuracy"][1]) == count
    logs = np.log(softmax(reference.logits.double().numpy()))
    kept = (labels != -100).numpy()
    picked = np.take_along_axis(logs, np.maximum(labels.numpy(), 0)[..., None], -1)[..., 0]
    expected = -((1 - smoothing) * picked + smoothing * logs.mean(-1))[kept].sum()
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    if not smoothing:
        assert float(loss.total) == pytest.approx(float(reference.loss) * count, rel=1e-5)


@pytest.mark.parametrize("name", ["masked", "next"])
def test_tc23_hidden_tokens_are_transformers_loss_summed(bases: dict[str, Path], name: str) -> None:
    base, fields, data = task(bases, name, 6)
    objective, model = loaded(base, fields)
    examples, keys = [row[0] for row in data.rows], [str(n) for n in range(len(data.rows))]
    batch = objective.collate(examples, keys, "cpu")
    loss = objective.loss(model, batch)
    labels = torch.full_like(batch.texts.ids_BS, -100)
    labels.view(-1)[batch.places_K] = batch.targets_K
    truth = padded([[n for d in e.documents for n in d.ids] for e in examples], 0, "cpu")
    assert torch.equal(labels[labels >= 0], truth[labels >= 0])  # asked for what was there
    with torch.no_grad():
        told = (
            model(**batch.texts.inputs, labels=labels)
            if name == "masked"
            else model(**batch.texts.inputs)
        )
    logits = told.logits if name == "masked" else told.prediction_logits
    logs = np.log(softmax(logits.double().numpy())).reshape(-1, logits.shape[-1])
    expected = -logs[batch.places_K.numpy(), batch.targets_K.numpy()].sum()
    if name == "next":
        pairs = np.log(softmax(told.seq_relationship_logits.double().numpy()))
        replaced = np.array([int(not example.label) for example in examples])
        each = -pairs[np.arange(len(examples)), replaced]  # 0: it followed
        expected += each[batch.owners_K.numpy()].sum()
    else:
        assert float(loss.total) == pytest.approx(float(told.loss) * batch.weight, rel=1e-5)
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_padding_changes_nothing(bases: dict[str, Path], name: str) -> None:
    """One batch of unequal rows is the sum of its rows, in loss, outcome and gradient."""
    base, fields, data = task(bases, name, 5)
    objective, model = loaded(base, fields)
    examples, keys = [row[0] for row in data.rows], [str(n) for n in range(len(data.rows))]
    assert len({example.tokens for example in examples}) > 2

    def summed(groups: list[list[int]]) -> tuple[float, Any, list[Any]]:
        model.zero_grad()
        total, found = 0.0, []
        for group in groups:
            some, named = [examples[n] for n in group], [keys[n] for n in group]
            batch = objective.collate(some, named, "cpu")
            loss = objective.loss(model, batch).total
            loss.backward()
            total += float(loss.detach())
            with torch.no_grad():
                found += objective.outcomes(model, batch, some)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return total, gradients, found

    together, by_one = (
        summed(groups)
        for groups in ([list(range(len(examples)))], [[n] for n in range(len(examples))])
    )
    assert together[0] == pytest.approx(by_one[0], rel=1e-5)
    for ours, theirs in zip(together[1], by_one[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(together[2], by_one[2], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert (ours.where, ours.weight, ours.meant) == (theirs.where, theirs.weight, theirs.meant)
    assert sum(outcome.loss for outcome in together[2]) == pytest.approx(together[0], rel=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_tc02_tc05_ranks_and_micro_batches_are_only_bookkeeping(
    one: Ranks, two: Ranks, bases: dict[str, Path], name: str
) -> None:
    base, fields, data = task(bases, name, 22)
    _, _, heldout = task(bases, name, 19, seed=1)
    if name in ("single_label", "pair", "decoder", "multi_label", "tags"):
        heldout = data
    run = fields["run"] | {"steps": 4}
    fields |= {"run": run, "zero": 0, "batch": {"micro": 8, "total": 8}}
    [alone] = one.run(work.measured, base, fields, data, heldout)
    fields |= {"zero": 2, "batch": {"micro": 2, "total": 8}}
    pair = two.run(work.measured, base, fields, data, heldout)
    assert pair[0]["start"] == pair[1]["start"] == alone["start"]  # new heads are drawn alike
    assert pair[0]["digest"] == pair[1]["digest"]
    np.testing.assert_allclose(pair[0]["loss"], alone["loss"], rtol=1e-4)
    np.testing.assert_allclose(pair[0]["norm"], alone["norm"], rtol=1e-3)
    assert len(set(alone["loss"])) == 4
    for figure, value in alone["figures"].items():
        assert pair[0]["figures"][figure] == pair[1]["figures"][figure]
        assert pair[0]["figures"][figure] == pytest.approx(value, rel=0.02, abs=0.02), figure


@pytest.mark.parametrize("name", ["single_label", "t5", "next"])
def test_tc02_stage_3_gives_the_same_curve_and_generates(
    one: Ranks, two: Ranks, bases: dict[str, Path], name: str
) -> None:
    base, fields, data = task(bases, name, 11)
    fields |= {"run": fields["run"] | {"steps": 3}, "batch": {"micro": 2, "total": 4}, "zero": 0}
    [alone] = one.run(work.measured, base, fields, data, data)
    pair = two.run(work.measured, base, fields | {"zero": 3}, data, data)
    assert pair[0]["start"] == pair[1]["start"] == alone["start"]
    np.testing.assert_allclose(pair[0]["loss"], alone["loss"], rtol=1e-4)
    for figure, value in alone["figures"].items():
        assert pair[0]["figures"][figure] == pair[1]["figures"][figure]
        assert pair[0]["figures"][figure] == pytest.approx(value, rel=0.02, abs=0.02), figure


LEARNT: dict[str, tuple[str, float, int, float]] = {
    # the figure that shows it, what it must reach, steps, learning rate
    "single_label": ("accuracy", 1.0, 60, 5e-3),
    "decoder": ("accuracy", 1.0, 60, 5e-3),
    "multi_label": ("exact_match", 1.0, 80, 5e-3),
    "regression": ("pearson", 0.99, 150, 3e-3),
    "tags": ("entity_f1", 1.0, 60, 5e-3),
    "t5": ("exact_match", 1.0, 250, 2e-2),
    "bart": ("exact_match", 1.0, 200, 5e-3),
    "masked": ("token_accuracy", 1.0, 250, 5e-3),
    "next": ("next_sentence_accuracy", 1.0, 250, 3e-3),
    "reward": ("accuracy", 1.0, 40, 5e-3),
}


@pytest.mark.parametrize("name", LEARNT)
def test_tc25_eight_examples_are_learnt_by_heart(
    one: Ranks, bases: dict[str, Path], name: str
) -> None:
    figure, reached, steps, lr = LEARNT[name]
    base, fields, data = task(bases, name, 8, seed=3)
    fields |= {
        "zero": 0,
        "optim": {"lr": lr, "weight_decay": 0.0},
        "batch": {"micro": 8, "total": 8},
        "run": fields["run"] | {"steps": steps},
    }
    [outcome] = one.run(work.measured, base, fields, data, data)
    assert outcome["figures"][figure] >= reached, outcome["figures"]
    assert outcome["loss"][-1] < 0.3 * outcome["loss"][0]


def reloaded(auto: str, directory: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    import transformers

    model = getattr(transformers, auto).from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    with torch.no_grad():
        told = model.eval()(**{name: torch.tensor(rows) for name, rows in inputs.items()})
    return {name: value.numpy() for name, value in told.items() if "logits" in name}


INPUTS = {"input_ids": [[2, 9, 10, 3], [2, 11, 3, 0]], "attention_mask": [[1] * 4, [1, 1, 1, 0]]}
AUTOS = {
    "single_label": "AutoModelForSequenceClassification",
    "decoder": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "tags": "AutoModelForTokenClassification",
    "masked": "AutoModelForMaskedLM",
    "next": "AutoModelForPreTraining",
    "reward": "AutoModelForSequenceClassification",
}


@pytest.mark.parametrize(
    ("name", "zero", "adapter"),
    [
        *((name, 2, None) for name in AUTOS),
        *((name, 3, None) for name in ("single_label", "masked", "next", "reward")),
        *((name, 2, LORA) for name in ("single_label", "masked", "next", "reward", "tags")),
    ],
)
def test_tc13_the_export_computes_what_the_live_model_does(
    two: Ranks, bases: dict[str, Path], tmp_path: Path, name: str, zero: int, adapter: Any
) -> None:
    base, fields, data = task(bases, name, 8)
    run = fields["run"] | {"steps": 3}
    fields |= {"run": run, "zero": zero, "adapter": adapter, "batch": {"micro": 2, "total": 4}}
    out = tmp_path / "out"
    live = two.run(work.exported, base, fields, data, out, INPUTS)[0]
    again = reloaded(AUTOS[name], out, INPUTS)
    assert again.keys() == live["outputs"].keys()
    for output, value in live["outputs"].items():
        np.testing.assert_allclose(again[output], value, rtol=1e-5, atol=1e-5)
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    told = json.loads((out / "config.json").read_text())
    assert told["architectures"] != json.loads((base / "config.json").read_text())["architectures"]
    assert str(base) not in (out / "config.json").read_text()
    if name == "single_label":
        assert told["id2label"] == {"0": "0", "1": "1", "2": "2"}
        assert told["label2id"] == {"0": 0, "1": 1, "2": 2}
        assert told["problem_type"] == "single_label_classification"
    if adapter:  # the head learns whole, the base by its additions only
        whole = [n for n in live["trained"] if "lora_" not in n]
        assert whole
        assert all(any(part in n for part in ("classifier", "score", "cls.")) for n in whole), whole


def test_a_classifier_is_a_base_for_other_labels(
    one: Ranks, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, fields, data = task(bases, "single_label", 8)
    fields |= {"run": fields["run"] | {"steps": 1}}
    one.run(work.exported, base, fields, data, tmp_path / "three", INPUTS)
    _, fields, data = task(bases, "pair", 8)
    fields |= {"run": fields["run"] | {"steps": 1}}
    [live] = one.run(work.exported, tmp_path / "three", fields, data, tmp_path / "two", INPUTS)
    assert live["outputs"]["logits"].shape == (2, 2)
    told = json.loads((tmp_path / "two" / "config.json").read_text())
    assert told["id2label"] == {"0": "0", "1": "1"}


def test_tc26_a_base_in_another_format_is_trained_and_stored_as_asked(
    one: Ranks, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, fields, data = task(bases, "single_label", 8)
    fields |= {"run": fields["run"] | {"steps": 1}}
    one.run(work.exported, base, fields, data, tmp_path / "out", INPUTS, "bfloat16")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    # and a bfloat16 base runs in float32
    [outcome] = one.run(work.measured, tmp_path / "out", fields, data, data)
    kinds = {value.dtype.kind: value.dtype.name for value in outcome["parameters"].values()}
    assert kinds["f"] == "float32"
