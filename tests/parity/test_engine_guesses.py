"""Prompt-lookup decoding: fewer steps, the same answers to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from serve_apps.engine.interface import EngineRequest, Sampling
from serve_apps.engine.model import LoadedModel
from tests.parity.engine_fixtures import LocalRank, local_model, prompts, save_tiny

pytestmark = pytest.mark.parity
RULES = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.0, logprobs=3),
    Sampling(temperature=0.9, top_p=0.9, seed=5),
    Sampling(temperature=0.0, min_tokens=20, logit_bias=((7, 1.5),)),
    Sampling(temperature=0.0, logit_bias=((9, 100.0),)),
    Sampling(temperature=0.0, frequency_penalty=0.7),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return local_model(save_tiny(tmp_path_factory.mktemp("native"), head_dim=16))


def requests(stops: Sequence[int] = ()) -> list[EngineRequest]:
    texts = [p + p for p in prompts(10, longest=25)]
    return [
        EngineRequest(f"r{i}", tuple(ids), 40 + i, RULES[i % len(RULES)], tuple(stops))
        for i, ids in enumerate(texts)
    ]


@pytest.mark.parametrize("stops", [(), (3, 11, 40, 77)])
@pytest.mark.parametrize("blocks", [64, 12])
def test_guesses_change_nothing_but_the_number_of_steps_sc14(
    model: LoadedModel, stops: tuple[int, ...], blocks: int
) -> None:
    plain = LocalRank(model, blocks=blocks, running=4)
    alone = plain.run(requests(stops))
    rank = LocalRank(model, blocks=blocks, running=4, guesses=5)
    guessed = rank.run(requests(stops))
    assert [a.ids for a in guessed] == [a.ids for a in alone]
    assert [a.finish for a in guessed] == [a.finish for a in alone]
    assert [a.logprobs for a in guessed] == [a.logprobs for a in alone]
    assert rank.scheduler.guessed > 0
    if blocks == 64:
        assert 0 < rank.scheduler.guessed_right < rank.scheduler.guessed


def test_an_answer_that_repeats_itself_takes_fewer_steps(model: LoadedModel) -> None:
    # Bias leaves one token: the surest repetition there is.
    sure = Sampling(temperature=0.0, logit_bias=((9, 100.0),))
    request = EngineRequest("r", (1, 2, 3), 60, sure)
    plain, rank = LocalRank(model), LocalRank(model, guesses=4)
    assert plain.run([request])[0].ids == rank.run([request])[0].ids == [9] * 60
    assert plain.scheduler.steps == 60
    assert rank.scheduler.steps < 20
    assert rank.scheduler.guessed_right > 40


def test_rules_that_look_at_the_answer_so_far_are_not_guessed_for(model: LoadedModel) -> None:
    rank = LocalRank(model, guesses=4)
    text = tuple(prompts(1, longest=20)[0] * 4)
    rank.run(
        [
            replace(EngineRequest("a", text, 30), sampling=Sampling(presence_penalty=0.1)),
            replace(EngineRequest("b", text, 30), sampling=Sampling(repetition_penalty=1.1)),
        ]
    )
    assert rank.scheduler.guessed == 0


def test_budget_is_kept_and_prompts_do_not_starve(model: LoadedModel) -> None:
    rank = LocalRank(model, guesses=8, budget=8, running=8)
    sure = Sampling(temperature=0.0, logit_bias=((9, 100.0),))
    for i in range(3):
        rank.add(EngineRequest(f"d{i}", (9, 9, 9), 50, sure))
    for _ in range(6):
        rank.step()
    rank.add(EngineRequest("long", tuple(range(3, 60)), 4, sure))
    sizes = []
    while step := rank.step():
        sizes.append(sum(work.count + len(work.guess) for work in step.work))
    assert max(sizes) <= 8
    assert len(rank.answers["long"].ids) == 4
    assert torch.tensor(rank.answers["d0"].ids).eq(9).all()
