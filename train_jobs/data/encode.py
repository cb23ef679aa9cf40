"""From records to examples: which encoder an objective has. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.text.chat import ChatText
from train_jobs.data.encoders import labels, masked, pairs
from train_jobs.data.encoders.asked import asked
from train_jobs.data.encoders.distillation import check_teacher
from train_jobs.data.encoders.preference import judged, preference
from train_jobs.data.encoders.tooled import require_whole
from train_jobs.data.example import Document, Example
from train_jobs.data.records import (
    Asked,
    Completion,
    Dialogue,
    Judged,
    Labelled,
    Pair,
    Preference,
    Record,
    Tagged,
    Text,
)
from train_jobs.objectives.settings import (
    DPO,
    GRPO,
    KTO,
    ORPO,
    CausalLM,
    Distillation,
    MaskedLM,
    Objective,
    PromptCompletion,
    Reward,
    Seq2Seq,
    SequenceClassification,
    SimPO,
    TokenClassification,
)

Encode = Callable[[Any], Example]
"""Turns one record into an example; ConfigError says why it cannot, without its place."""


def open_encoder(objective: Objective, base: Path) -> tuple[Encode, tuple[type[Record], ...]]:
    """Return what encodes records for an objective on a base, and which kinds it takes."""
    text = ChatText.load(base)
    match objective:
        case CausalLM():
            return lambda record: running(record, text), (Text,)
        case PromptCompletion():
            return lambda record: completion(record, text), (Completion,)
        case DPO() | ORPO() | SimPO() | Reward():
            return lambda record: preference(record, text), (Preference,)
        case GRPO():
            return lambda record: asked(record, text), (Asked,)
        case KTO():
            return lambda record: judged(record, text), (Judged,)
        case Distillation():
            check_teacher(objective, text)
            return lambda record: anything(record, text), (Dialogue, Completion, Text)
        case SequenceClassification():
            return lambda record: labels.labelled(record, text, objective), (Labelled,)
        case TokenClassification():
            return lambda record: labels.tagged(record, text), (Tagged,)
        case Seq2Seq():
            start = start_of(base)
            return lambda record: pairs.translated(record, text, objective, start), (Pair,)
        case MaskedLM():
            parts = masked.sentences if objective.next_sentence else masked.whole
            return lambda record: parts(record, text), (Text,)
        case _:
            return lambda record: dialogue(record, text), (Dialogue,)


def anything(record: Dialogue | Completion | Text, text: ChatText) -> Example:
    """Encode a record of either kind, as the objective of that kind would."""
    match record:
        case Text():
            return running(record, text)
        case Completion():
            return completion(record, text)
        case _:
            return dialogue(record, text)


def dialogue(record: Dialogue, text: ChatText) -> Example:
    """Encode a conversation with the model's template; what the assistant says is trained."""
    require_whole(text, record.messages, record.tools)
    ids, trained = text.encode_training(record.messages, record.tools)
    return Example((Document(record.where, tuple(ids), tuple(trained)),))


def running(record: Text, text: ChatText) -> Example:
    """Encode running text, ended by the model's end of text; every token is trained."""
    ids = (*text.encode(record.text), end_of(text))
    return Example((Document(record.where, ids, (True,) * len(ids)),))


def completion(record: Completion, text: ChatText) -> Example:
    """Encode a prompt and a completion, each by itself: so the model will see them."""
    prompt, answer = text.encode(record.prompt), text.encode(record.completion, begin=False)
    ids = (*prompt, *answer, end_of(text))
    trained = (False,) * len(prompt) + (True,) * (len(answer) + 1)
    return Example((Document(record.where, ids, trained),))


def end_of(text: ChatText) -> int:
    """Return the token that ends a text. Raises ConfigError where the model names none."""
    if not text.eos_ids:
        raise ConfigError(
            "this model names no eos_token, which must end each text; name one in its "
            "tokenizer_config.json and import it again"
        )
    return text.eos_ids[0]


def start_of(base: Path) -> int:
    """Return the token that a decoder beside an encoder is given first.

    Raises ConfigError where the base has no such decoder.
    """
    config = json.loads((base / "config.json").read_text())
    start = config.get("decoder_start_token_id")
    if not config.get("is_encoder_decoder") or not isinstance(start, int):
        raise ConfigError(
            f"objective: seq2seq: a {config.get('model_type')} model has no decoder beside an "
            "encoder, or its config.json names no decoder_start_token_id; choose a T5 or BART"
        )
    return start
