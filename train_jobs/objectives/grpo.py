"""Group-relative policy optimisation, arXiv:2402.03300; the names are TRL's.

Each step generates several answers to each of its prompts, asks the reward functions about them,
and makes those likelier that were better than the others to the same prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cluster.generation import Ask, Sample, Sampler
from cluster.text.chat import ChatText
from train_jobs.data.encoders.asked import turn_end
from train_jobs.data.example import Example
from train_jobs.objectives import rewards
from train_jobs.objectives.base import Loss
from train_jobs.objectives.decoder import Decoder
from train_jobs.objectives.generate import continued, own_attention, seed_of
from train_jobs.objectives.refresh import Refresh
from train_jobs.objectives.rollout import (
    Prompts,
    Rollout,
    answer_document,
    build,
    deviation,
    group_advantages,
    sampled_logprobs,
)
from train_jobs.objectives.settings import GRPO
from train_jobs.outcome import Outcome, mean_loss

Groups = list[list[Sample]]


class GroupRelative(Decoder):
    """The policy gradient of group-relative advantages, clipped around the sampler."""

    _text: ChatText

    def __init__(
        self, settings: GRPO, sampler: Sampler | None = None, refresh: Refresh | None = None
    ) -> None:
        """Without a ``sampler`` the model generates in this process; ``refresh`` renews it."""
        self.settings, self._sampler, self._refresh = settings, sampler, refresh
        self._rewards = [(name, rewards.find(name)) for name in settings.rewards]
        self.figures: tuple[str, ...] = (
            "reward",
            "reward_std",
            "completions/mean_length",
            "completions/clipped_ratio",
            "clip_ratio",
            *(("kl",) if settings.beta else ()),
            *(("staleness",) if sampler else ()),
            *(f"rewards/{name.rpartition(':')[2]}/mean" for name in settings.rewards),
        )

    def load(self, base: Path, dtype: torch.dtype) -> Any:
        """See :class:`train_jobs.objectives.base.Objective`."""
        self._text = ChatText.load(base)
        self._end = turn_end(self._text)
        first = () if self._end is None else (self._end,)
        self._stops = tuple(dict.fromkeys((*first, *self._text.eos_ids)))
        return super().load(base, dtype)

    def collate(
        self, examples: Sequence[Example], keys: Sequence[str] = (), device: Any = "cpu"
    ) -> Prompts:
        """Keep the prompts: what is learnt from them is yet to be generated."""
        return Prompts(tuple(examples), tuple(keys), device)

    def step(
        self, model: Any, batches: Sequence[Prompts], shares: Sequence[float]
    ) -> list[Rollout]:
        """Generate and score the answers of a step."""
        if self._refresh:
            self._refresh.step(model)
        prompts = [(e, key) for b in batches for e, key in zip(b.examples, b.keys, strict=True)]
        count = self.settings.num_generations
        groups, ages = self._generate(model, prompts, count, self.settings.temperature)
        rollouts, at = [], 0
        for batch in batches:
            these = slice(at, at := at + len(batch.examples))
            rollouts.append(self._rollout(batch, groups[these], ages[these]))
        return rollouts

    def loss(self, model: Any, batch: Rollout) -> Loss:
        """Sum over the tokens, each with its share."""
        logps_K = self._logps(model, batch)
        reference_K = None
        if self.settings.beta:
            with torch.no_grad(), model.module.disable_adapter():
                reference_K = self._logps(model, batch)
        terms_K, clipped_K, kl_K = grpo_loss(
            logps_K, batch.sampled_K, batch.advantages_K, reference_K, self.settings
        )
        tokens, figures = float(len(terms_K)), dict(batch.figures)
        figures["clip_ratio"] = (float(clipped_K.sum()), tokens)
        if kl_K is not None:
            figures["kl"] = (float(kl_K.detach().sum()), tokens)
        return Loss((terms_K * batch.shares_K).sum(), figures)

    @property
    def on_shelf(self) -> str | None:
        """See :class:`train_jobs.objectives.base.Shelving`."""
        return self._refresh.prefix if self._refresh else None

    def outcomes(self, model: Any, batch: Prompts, examples: Sequence[Example]) -> list[Outcome]:
        """Return the reward of the likeliest answer to each prompt, as this model gives it."""
        prompts = list(zip(batch.examples, batch.keys, strict=True))
        groups = self._in_process(model, prompts, 1, 0.0)
        _, totals = self._rewarded(examples, groups)
        return [
            Outcome(example.where, -total, 1.0, said=self._text.decode(group[0].ids), meant=total)
            for example, total, group in zip(examples, totals, groups, strict=True)
        ]

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Return the mean reward; the loss is what it lacks."""
        loss = mean_loss(outcomes)
        return {"loss": loss, "reward": -loss}

    def _generate(
        self, model: Any, prompts: Sequence[tuple[Example, str]], count: int, heat: float
    ) -> tuple[Groups, list[int]]:
        """Return the answers to each prompt, and how many steps old the weights are they are of."""
        if self._sampler is None:
            return self._in_process(model, prompts, count, heat), [0] * len(prompts)
        asks = [
            Ask(
                prompt_ids=example.documents[0].ids,
                max_tokens=self.settings.max_completion_length,
                n=count,
                temperature=heat,
                seed=seed_of(key),
                stop_ids=self._stops,
            )
            for example, key in prompts
        ]
        refresh = self._refresh
        found = (refresh or self._sampler).ask(asks)
        ages = [refresh.age(one.version) if refresh else 0 for one in found]
        return [list(one.samples) for one in found], ages

    def _in_process(
        self, model: Any, prompts: Sequence[tuple[Example, str]], count: int, heat: float
    ) -> Groups:
        length = self.settings.max_completion_length
        with own_attention(model) as module:
            return [
                continued(
                    module,
                    example.documents[0].ids,
                    count,
                    length,
                    self._stops,
                    seed_of(key),
                    heat,
                )
                for example, key in prompts
            ]

    def _rollout(self, batch: Prompts, groups: Groups, ages: Sequence[int]) -> Rollout:
        named, totals = self._rewarded(batch.examples, groups)
        size = self.settings.num_generations
        by_group = [totals[at : at + size] for at in range(0, len(totals), size)]
        advantages = [
            one
            for group in by_group
            for one in group_advantages(group, self.settings.scale_rewards)
        ]
        documents, sampled = [], []
        for example, group in zip(batch.examples, groups, strict=True):
            for sample in group:
                documents.append(answer_document(example.documents[0], sample, self._end))
                sampled.append(sampled_logprobs(sample, documents[-1]))
        answers = float(len(totals))
        figures = {
            "reward": (sum(totals), answers),
            "reward_std": (sum(map(deviation, by_group)), float(len(by_group))),
            "completions/mean_length": (float(sum(d.trained_tokens for d in documents)), answers),
            "completions/clipped_ratio": (
                float(sum(not sample.ended for group in groups for sample in group)),
                answers,
            ),
            **({"staleness": (float(sum(ages)), float(len(ages)))} if self._sampler else {}),
            **{
                f"rewards/{name.rpartition(':')[2]}/mean": (sum(found), answers)
                for name, found in named.items()
            },
        }
        by_token = self.settings.loss_type == "dapo"
        return build(documents, sampled, advantages, by_token, figures, batch.device)

    def _rewarded(
        self, examples: Sequence[Example], groups: Groups
    ) -> tuple[Mapping[str, list[float]], list[float]]:
        """Return each function's numbers, and their weighed sums, for all answers in order."""
        told = [e.label for e, group in zip(examples, groups, strict=True) for _ in group]
        completions = [self._text.decode(sample.ids) for group in groups for sample in group]
        prompts = [one["prompt"] for one in told]
        names = sorted({name for one in told for name in one["facts"]})
        columns = {name: [one["facts"].get(name) for one in told] for name in names}
        named = {
            name: rewards.scores(name, function, prompts, completions, columns)
            for name, function in self._rewards
        }
        weights = self.settings.reward_weights or (1.0,) * len(named)
        totals = [
            sum(w * number for w, number in zip(weights, numbers, strict=True))
            for numbers in zip(*named.values(), strict=True)
        ]
        return named, totals

    def _logps(self, model: Any, batch: Rollout) -> torch.Tensor:
        heat = self.settings.temperature

        def logp(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
            return -F.cross_entropy(logits_CV / heat, targets_C, reduction="none")

        packed = batch.packed
        return self._head.rows(model, packed.inputs, logp, packed.targets_K)[:, 0]


def grpo_loss(
    logps_K: torch.Tensor,
    sampled_K: torch.Tensor,
    advantages_K: torch.Tensor,
    reference_K: torch.Tensor | None,
    settings: GRPO,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return each token's loss, whether its gradient was cut off, and its KL from the reference.

    Where the sampler named no probability (nan) it was the policy: the ratio is 1.
    """
    old_K = torch.where(sampled_K.isnan(), logps_K.detach(), sampled_K)
    ratio_K = torch.exp(logps_K - old_K)
    bounded_K = ratio_K.clamp(1 - settings.epsilon, 1 + settings.epsilon)
    free_K, held_K = ratio_K * advantages_K, bounded_K * advantages_K
    terms_K = -torch.minimum(free_K, held_K)
    if reference_K is None:
        return terms_K, (held_K < free_K).float(), None
    apart_K = reference_K - logps_K
    kl_K = torch.exp(apart_K) - apart_K - 1  # Schulman's estimator: unbiased and never negative
    return terms_K + settings.beta * kl_K, (held_K < free_K).float(), kl_K
