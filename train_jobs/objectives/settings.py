"""What ``objective:`` may say: one class for each way to learn, named as TRL names it. Pure."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from cluster.config import Frozen

Family = Literal["decoder", "encoder", "seq2seq"]
SERVED = "serve:"
SERVED_TOP = 100
"""Likely tokens that a served teacher may be asked for at each place."""


class Settings(Frozen):
    """What all objectives have."""

    family: ClassVar[Family] = "decoder"
    """Which kind of model it trains."""
    packed: ClassVar[bool] = True
    """Whether several examples share a row without padding, each attending to itself alone."""
    sliced: ClassVar[bool] = False
    """Whether several ranks can hold slices of one sequence: what it needs of them adds up."""
    head: ClassVar[bool] = False
    """Whether the model gets an output layer of its own: it is then another kind than its base."""

    @property
    def others(self) -> dict[str, str]:
        """References to other models of the library, by the field that names them."""
        return {}


class CausalLM(Settings):
    """Continued pre-training on running text: the loss is on every token."""

    sliced: ClassVar[bool] = True
    kind: Literal["causal_lm"]


class ChatSFT(Settings):
    """Supervised fine-tuning on dialogues: the loss is on the assistant's tokens only."""

    sliced: ClassVar[bool] = True
    kind: Literal["sft"] = "sft"


class PromptCompletion(Settings):
    """Raw prompts and completions, without a chat template: the loss is on the completion."""

    sliced: ClassVar[bool] = True
    kind: Literal["prompt_completion"]


class DPO(Settings):
    """Direct preference optimisation (arXiv:2305.18290)."""

    sliced: ClassVar[bool] = True
    kind: Literal["dpo"]
    beta: PositiveFloat = 0.1
    """How near the policy stays to the reference, which is the base: higher is nearer."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The paper's; SLiC's hinge (arXiv:2305.10425); IPO's square (arXiv:2310.12036)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs that are thought to be the wrong way round; with ``sigmoid`` only."""

    @model_validator(mode="after")
    def _smooth(self) -> DPO:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(
                f"label_smoothing={self.label_smoothing:g} has no meaning with loss_type: "
                f"{self.loss_type}; use loss_type: sigmoid, or leave it out"
            )
        return self


class ORPO(Settings):
    """Odds-ratio preference optimisation, without a reference (arXiv:2403.07691)."""

    sliced: ClassVar[bool] = True
    kind: Literal["orpo"]
    beta: PositiveFloat = 0.1
    """Weight of the odds ratio beside the likelihood of what was chosen; lambda in the paper."""


class KTO(Settings):
    """Kahneman-Tversky optimisation: answers wanted or not, unpaired (arXiv:2402.01306)."""

    kind: Literal["kto"]
    beta: PositiveFloat = 0.1
    """How near the policy stays to the reference, which is the base: higher is nearer."""
    desirable_weight: PositiveFloat = 1.0
    undesirable_weight: PositiveFloat = 1.0


class SimPO(Settings):
    """Preference by mean log-likelihood with a margin, without a reference (arXiv:2405.14734)."""

    sliced: ClassVar[bool] = True
    kind: Literal["simpo"]
    beta: PositiveFloat = 2.0
    gamma: NonNegativeFloat = 0.5
    """The margin in rewards: beta times the difference of the means is to exceed it."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs that are thought to be the wrong way round."""


class SequenceClassification(Settings):
    """One class, several classes or a number for a text or a pair of texts."""

    family: ClassVar[Family] = "encoder"
    packed: ClassVar[bool] = False
    head: ClassVar[bool] = True
    kind: Literal["sequence_classification"]
    problem: Literal["single_label", "multi_label", "regression"] = "single_label"
    labels: tuple[str, ...] | None = None
    """Their order is that of the outputs. By default those of the training data, sorted."""

    @model_validator(mode="after")
    def _labelled(self) -> SequenceClassification:
        if self.labels is not None:
            _check_labels(self.labels)
            if self.problem == "regression":
                raise ValueError("labels: a regression has none; leave them out")
        return self


class TokenClassification(Settings):
    """A tag for each word: the first token of a word carries it (arXiv:1810.04805, 5.3)."""

    family: ClassVar[Family] = "encoder"
    packed: ClassVar[bool] = False
    head: ClassVar[bool] = True
    kind: Literal["token_classification"]
    labels: tuple[str, ...] | None = None
    """Their order is that of the outputs. By default those of the training data, sorted."""

    @model_validator(mode="after")
    def _labelled(self) -> TokenClassification:
        if self.labels is not None:
            _check_labels(self.labels)
        return self


class Seq2Seq(Settings):
    """Translation and summarisation with an encoder and a decoder (T5, BART)."""

    family: ClassVar[Family] = "seq2seq"
    packed: ClassVar[bool] = False
    kind: Literal["seq2seq"]
    prefix: str = ""
    """Put before every source, as T5's ``translate English to German: ``."""
    max_target_len: PositiveInt = 128
    """Tokens of a target. A longer one is an error that names its line; generation ends there."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each target's probability that is spread over the vocabulary (arXiv:1512.00567)."""
    num_beams: PositiveInt = 1
    """Of the generation that evaluation scores; 1 is greedy."""


class MaskedLM(Settings):
    """BERT's objective: guess the tokens that were hidden (arXiv:1810.04805)."""

    family: ClassVar[Family] = "encoder"
    packed: ClassVar[bool] = False
    head: ClassVar[bool] = True
    kind: Literal["masked_lm"]
    share: float = Field(0.15, gt=0, lt=1)
    """Of the tokens that are hidden: 80 % as the mask, 10 % as another token, 10 % as they are."""
    next_sentence: bool = False
    """Also say whether a sentence followed the one before it: half of the pairs are neighbours."""


class Reward(Settings):
    """A model that gives a conversation a number: higher for what was chosen (arXiv:2203.02155)."""

    packed: ClassVar[bool] = False
    head: ClassVar[bool] = True
    kind: Literal["reward"]
    center_rewards_coefficient: NonNegativeFloat = 0.0
    """Pulls the sum of a pair's rewards towards zero (arXiv:2312.09244)."""


def _check_labels(labels: tuple[str, ...]) -> None:
    """Refuse a list that does not name at least two different labels."""
    if len(labels) < 2:
        raise ValueError(f"labels: at least two are needed to tell apart, not {list(labels)}")
    twice = [label for label, times in Counter(labels).items() if times > 1]
    if twice:
        raise ValueError(f"labels: {twice[0]!r:.60} is named twice; each label has one output")


class Distillation(Settings):
    """Learn a teacher's distributions, token by token (arXiv:2306.13649; TRL's GKD)."""

    kind: Literal["distillation"]
    teacher: str
    """A library reference, to a model with the same tokens; or ``serve:NAME``, one that the cluster
    serves under that name, which needs ``top_k``."""
    beta: float = Field(0.0, ge=0, le=1)
    """0: forward KL(teacher, student); 1: reverse KL(student, teacher); between: the generalised
    Jensen-Shannon divergence."""
    temperature: PositiveFloat = 1.0
    """Divides the logits of both."""
    top_k: PositiveInt | None = None
    """Compare the teacher's most likely tokens one by one, and all others together."""
    nll: NonNegativeFloat = 0.0
    """Weight of the data's own next token beside the teacher's distribution."""
    lmbda: float = Field(0.0, ge=0, le=1)
    """Share of the examples whose last answer the student gives itself, at ``temperature``, and
    then learns what the teacher would have said at each of its tokens."""
    max_completion_length: PositiveInt = 128
    """Tokens of such an answer."""

    @property
    def served(self) -> str | None:
        """The name of a served teacher."""
        return self.teacher.removeprefix(SERVED) if self.teacher.startswith(SERVED) else None

    @property
    def others(self) -> dict[str, str]:
        """The teacher; which version a served one is only its answers say."""
        return {} if self.served else {"teacher": self.teacher}

    @model_validator(mode="after")
    def _can_be_asked(self) -> Distillation:
        if self.served is None:
            return self
        if self.top_k is None or self.top_k > SERVED_TOP:
            raise ValueError(
                f"teacher={self.teacher} with top_k={self.top_k}: a served model names its most "
                f"likely tokens only; set top_k to 1 ... {SERVED_TOP}, or take the teacher from "
                "the library"
            )
        if self.temperature != 1:
            raise ValueError(
                f"teacher={self.teacher} with temperature={self.temperature:g}: a served model "
                "reports probabilities at temperature 1; leave temperature out, or take the "
                "teacher from the library"
            )
        return self


class GRPO(Settings):
    """Group-relative policy optimisation (arXiv:2402.03300).

    Answers are generated, scored by functions, and compared with the others to the same prompt.
    """

    packed: ClassVar[bool] = False
    kind: Literal["grpo"]
    rewards: Annotated[tuple[str, ...], Field(min_length=1)]
    """Functions as ``package.module:name``. Each is called with ``prompts``, ``completions`` and
    the row's other columns by name, and returns a number for each completion."""
    reward_weights: tuple[float, ...] | None = None
    """One for each reward; by default 1."""
    app: str | None = None
    """The model of the cluster that generates, by name; where it is deployed as ``NAME@live``, and
    called so here, it gets the run's weights in memory. Without one the run's own processes do."""
    num_generations: int = Field(8, ge=2)
    """Answers to each prompt."""
    max_completion_length: PositiveInt = 128
    temperature: PositiveFloat = 1.0
    epsilon: float = Field(0.2, gt=0, lt=1)
    """How far a token's probability may move from the sampler's before its gradient ends."""
    beta: NonNegativeFloat = 0.0
    """Weight of the KL divergence from the base; needs an adapter, which can be taken off."""
    scale_rewards: bool = True
    """Divide a group's advantages by their standard deviation."""
    loss_type: Literal["dapo", "grpo"] = "dapo"
    """The mean over all tokens of the batch (arXiv:2503.14476), or over answers of their means."""
    sync_every: PositiveInt = 8
    """Optimiser steps until the app is given the run's weights, as a new version under its name."""

    @model_validator(mode="after")
    def _fits(self) -> GRPO:
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} "
                "rewards; give one for each"
            )
        twice = [name for name, times in Counter(self.rewards).items() if times > 1]
        if twice:
            raise ValueError(
                f"rewards: {twice[0]!r:.80} is named twice; name it once, with its weight in "
                "reward_weights"
            )
        for name in self.rewards:
            module, colon, function = name.partition(":")
            if not (colon and function.isidentifier() and module.replace(".", "_").isidentifier()):
                raise ValueError(f"rewards: {name!r:.80} is not of the form package.module:name")
        if self.app and self.app.partition("@")[2] not in ("", "live"):
            raise ValueError(
                f"app: {self.app!r:.80} is neither NAME nor NAME@live; a run gives new weights to "
                "what is deployed under one of these"
            )
        if self.app and self.temperature != 1:
            raise ValueError(
                f"temperature={self.temperature:g} with app: a served model reports probabilities "
                "at temperature 1, which the loss compares with; leave temperature out"
            )
        return self


Objective = Annotated[
    CausalLM
    | ChatSFT
    | PromptCompletion
    | DPO
    | ORPO
    | KTO
    | SimPO
    | Distillation
    | GRPO
    | SequenceClassification
    | TokenClassification
    | Seq2Seq
    | MaskedLM
    | Reward,
    Field(discriminator="kind"),
]
