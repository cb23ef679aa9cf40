"""GRPO: answers are generated, rewarded and learnt from, the same however the work is divided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.generation import Answered, Ask, Sample
from cluster.text.chat import ChatText
from tests.parity import objectives_work as work
from tests.parity.engine_fixtures import save_tiny
from tests.parity.training_fixtures import Ranks, one, two
from tests.parity.training_work import settings
from tests.unit.serving_fixtures import write_model
from train_jobs.data.dataset import Dataset
from train_jobs.data.encoders.asked import asked, turn_end
from train_jobs.data.example import Example
from train_jobs.data.records import Asked
from train_jobs.objectives.generate import continued, own_attention
from train_jobs.objectives.grpo import GroupRelative
from train_jobs.objectives.packed import load_decoder
from train_jobs.objectives.settings import GRPO

pytestmark = pytest.mark.parity
__all__ = ["one", "two"]

REWARD = "tests.parity.objectives_work:early_letters"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model over bytes, with a tokenizer and a chat template."""
    folder = write_model(tmp_path_factory.mktemp("bytes"))
    return save_tiny(folder, vocab_size=258, initializer_range=0.05)


@pytest.fixture(scope="module")
def data(base: Path) -> Dataset:
    text = ChatText.load(base)
    rows = [
        Asked(f"toy.jsonl:{n}", ({"role": "user", "content": f"say {n}"},), (("weight", 2.0),))
        for n in range(8)
    ]
    return Dataset(tuple((asked(row, text),) for row in rows), 64, 0, "0" * 64)


def fields(**changes: Any) -> dict[str, Any]:
    options = changes.pop("options", {})
    objective = {
        "kind": "grpo",
        "rewards": [REWARD],
        "num_generations": 4,
        "max_completion_length": 6,
        **options,
    }
    changes.setdefault("run", {"steps": 3})
    return settings(objective=objective, **changes)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_tc02_tc05_ranks_and_micro_batches_are_only_bookkeeping(
    one: Ranks, two: Ranks, base: Path, data: Dataset, tmp_path: Path, loss_type: str
) -> None:
    options = {"loss_type": loss_type}
    whole = fields(options=options, zero=0, batch={"micro": 4})
    [expected] = one.run(work.trained, base, whole, data, tmp_path)
    assert any(expected["loss"])
    found = two.run(work.trained, base, fields(options=options), data, tmp_path)[0]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(found["steps"], expected["steps"], strict=True):
        for name in ("reward", "reward_std", "completions/mean_length", "clip_ratio"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert found["steps"][0]["rewards/early_letters/mean"] == found["steps"][0]["reward"]
    assert found["after"] == pytest.approx(expected["after"], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("adapter", "options"),
    [(None, {}), ({"kind": "lora", "r": 8, "alpha": 16.0}, {"beta": 0.02})],
    ids=["full", "lora-with-reference"],
)
def test_tc25_what_is_rewarded_is_learnt(
    one: Ranks, base: Path, data: Dataset, tmp_path: Path, adapter: Any, options: dict[str, Any]
) -> None:
    some = fields(
        options=options,
        adapter=adapter,
        optim={"lr": 2e-2 if adapter else 5e-3},
        run={"steps": 25},
        batch={"total": 4},
    )
    [found] = one.run(work.trained, base, some, data, tmp_path)
    rewards = [step["reward"] for step in found["steps"]]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.15
    if adapter:
        assert found["steps"][0]["kl"] == pytest.approx(0, abs=1e-6)
        assert found["steps"][-1]["kl"] > 0


def test_what_is_generated_depends_on_its_seed_alone(base: Path, data: Dataset) -> None:
    class Engine:
        module = load_decoder(base, torch.float32)

    text = ChatText.load(base)
    objective = GroupRelative(GRPO.model_validate(fields()["objective"]))
    objective.load(base, torch.float32)
    objective.prepare(Engine.module)
    ids = data.rows[0][0].documents[0].ids
    state = torch.get_rng_state()
    with own_attention(Engine) as module:
        first, again, other = (
            continued(module, ids, 3, 8, text.eos_ids, seed) for seed in (1, 1, 2)
        )
        likeliest = continued(module, ids, 1, 8, text.eos_ids, 1, temperature=0.0)
    assert first == again != other
    assert len({sample.ids for sample in first}) > 1
    assert torch.equal(state, torch.get_rng_state())
    plain = load_decoder(base, torch.float32)
    so_far = list(ids)
    for token in likeliest[0].ids:
        logits = plain(input_ids=torch.tensor([so_far]), use_cache=False).logits[0, -1]
        assert token == int(logits.argmax())
        so_far.append(token)


class Told:
    """A sampler that says fixed answers with fixed log-probabilities."""

    def __init__(self, logprob: float) -> None:
        self.logprob, self.asks = logprob, list[Ask]()

    def ask(self, asks: Sequence[Ask]) -> list[Answered]:
        self.asks += asks
        answers = [Sample((97 + 8 * k, 122), (self.logprob,) * 2, k % 2 == 0) for k in range(4)]
        return [Answered("policy@1", tuple(answers)) for _ in asks]


def test_a_served_sampler_is_clipped_against_its_own_probabilities(
    base: Path, data: Dataset
) -> None:
    sampler = Told(-9.0)
    said = GRPO.model_validate(fields()["objective"])
    objective = GroupRelative(said, sampler)
    model = objective.load(base, torch.float32)
    objective.prepare(model)
    examples: list[Example] = [row[0] for row in data.rows[:2]]
    [batch] = objective.step(model, [objective.collate(examples, ["0/0/0/0", "0/0/1/0"])], [1.0])
    assert [ask.n for ask in sampler.asks] == [4, 4]
    assert len({ask.seed for ask in sampler.asks}) == 2
    assert turn_end(ChatText.load(base)) in sampler.asks[0].stop_ids
    loss = objective.loss(model, batch)
    tokens = 2 * (2 + 1 + 2 + 2 + 1 + 2)
    assert batch.weight == loss.figures["clip_ratio"][1] == tokens
    # about 1 in 258 against e^-9: every ratio is far above its bound, so good answers are cut off
    good = [k for k in range(4) if batch.advantages_K[batch.packed.owners_K == k][0] > 0]
    assert good
    assert loss.figures["clip_ratio"][0] > 0
    assert all(math.isfinite(total) for total, _ in loss.figures.values())


@pytest.mark.parametrize(
    "adapter",
    [
        None,
        {"kind": "lora", "r": 4, "alpha": 8.0},
        {"kind": "lora", "r": 4, "alpha": 8.0, "dora": True},
    ],
)
def test_the_app_is_given_the_weights_that_were_learnt(
    one: Ranks, base: Path, data: Dataset, tmp_path: Path, adapter: Any
) -> None:
    """Every other step, as a version under the app's name; the ones before are taken away."""
    some = fields(options={"app": "policy", "sync_every": 2}, adapter=adapter, run={"steps": 4})
    [found] = one.run(work.refreshed, base, some, data, tmp_path)
    assert found["same"]
    assert found["moved"]
    assert found["trained"]
    assert found["card"].startswith("# policy\n\nMade from `policy@1`: a policy in training")
    assert found["versions"] == [1, found["champion"]]  # the base's own stays
    assert list(dict.fromkeys(found["said"])) == ["policy@2", "policy@3", "policy@4"]
    assert found["staleness"] == [0, 1, 0, 1]
