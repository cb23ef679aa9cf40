"""From a configuration to the objective that it names."""

from __future__ import annotations

from train_jobs.config import FinetuneConfig
from train_jobs.objectives.base import Objective
from train_jobs.objectives.settings import (
    DPO,
    GRPO,
    KTO,
    ORPO,
    CausalLM,
    ChatSFT,
    Distillation,
    MaskedLM,
    PromptCompletion,
    Reward,
    Seq2Seq,
    SequenceClassification,
    SimPO,
    TokenClassification,
)


def open_objective(config: FinetuneConfig) -> Objective:
    """Import and build an objective: each module brings torch, and what else it needs."""
    match config.objective:
        case CausalLM() | ChatSFT() | PromptCompletion():
            from train_jobs.objectives.causal_lm import NextToken

            return NextToken()
        case DPO():
            from train_jobs.objectives.dpo import DirectPreference

            return DirectPreference(config.objective)
        case ORPO():
            from train_jobs.objectives.orpo import OddsRatio

            return OddsRatio(config.objective)
        case SimPO():
            from train_jobs.objectives.simpo import SimplePreference

            return SimplePreference(config.objective)
        case KTO():
            from train_jobs.objectives.kto import KahnemanTversky

            return KahnemanTversky(config.objective)
        case Distillation():
            return _distilled(config.objective)
        case SequenceClassification():
            from train_jobs.objectives.sequence_classification import SequenceClassifier

            return SequenceClassifier(config.objective)
        case TokenClassification():
            from train_jobs.objectives.token_classification import TokenClassifier

            return TokenClassifier(config.objective)
        case Seq2Seq():
            from train_jobs.objectives.seq2seq import Translation

            return Translation(config.objective)
        case MaskedLM():
            from train_jobs.objectives.masked_lm import HiddenTokens

            return HiddenTokens(config.objective)
        case Reward():
            from train_jobs.objectives.reward import RewardModel

            return RewardModel(config.objective)
        case GRPO():
            return _group_relative(config, config.objective)


def _distilled(settings: Distillation) -> Objective:
    if settings.served:
        from cluster.generation import ServeSampler
        from train_jobs.objectives.served_teacher import ServedDistilled

        return ServedDistilled(settings, ServeSampler(settings.served))
    from cluster.library.store import Library
    from train_jobs.objectives.distillation import Distilled

    return Distilled(settings, Library().resolve(settings.teacher).path)


def _group_relative(config: FinetuneConfig, settings: GRPO) -> Objective:
    from train_jobs.objectives.grpo import GroupRelative

    if settings.app is None:
        return GroupRelative(settings)
    from cluster.generation import ServeSampler
    from cluster.library.store import Library
    from train_jobs.objectives.refresh import Refresh

    sampler = ServeSampler(settings.app.partition("@")[0])
    base = Library().resolve(config.model)
    return GroupRelative(
        settings, sampler, Refresh(settings.app, base, settings.sync_every, sampler)
    )
