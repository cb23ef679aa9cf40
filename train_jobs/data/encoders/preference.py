"""Answers that are compared or judged: what follows the prompt counts, nothing before. No torch."""

from __future__ import annotations

from cluster.errors import ConfigError
from cluster.text.chat import ChatText
from train_jobs.data.encoders.tooled import require_whole
from train_jobs.data.example import Document, Example
from train_jobs.data.records import Judged, Messages, Preference


def preference(record: Preference, text: ChatText) -> Example:
    """Encode a pair: the chosen document, then the rejected one."""
    chosen = answered(record.where, record.prompt, record.chosen, text)
    rejected = answered(record.where, record.prompt, record.rejected, text)
    if chosen.ids == rejected.ids:
        raise ConfigError("chosen and rejected are the same text; remove the row")
    return Example((chosen, rejected))


def judged(record: Judged, text: ChatText) -> Example:
    """Encode one answer; the label says whether it is wanted."""
    return Example((answered(record.where, record.prompt, record.completion, text),), record.good)


def answered(where: str, prompt: Messages, answer: Messages, text: ChatText) -> Document:
    """Encode a conversation in which only the assistant's part of ``answer`` is trained.

    Raises ConfigError where the template writes the prompt differently once it is answered.
    """
    require_whole(text, (*prompt, *answer))
    ids, trained = text.encode_training((*prompt, *answer))
    start = _end_of_earlier_turns(prompt, ids, text)
    trained = [place >= start and counted for place, counted in enumerate(trained)]
    if not any(trained[1:]):
        raise ConfigError("the answer has no token of the assistant; its last message must be one")
    return Document(where, tuple(ids), tuple(trained))


def _end_of_earlier_turns(prompt: Messages, ids: list[int], text: ChatText) -> int:
    """Return the place behind the prompt's last trained token: those turns are not judged."""
    if not any(message["role"] == "assistant" for message in prompt):
        return 0
    before, trained = text.encode_training(prompt)
    end = max((place + 1 for place, counted in enumerate(trained) if counted), default=0)
    if before[:end] != ids[:end]:
        raise ConfigError(
            "the chat template writes the earlier turns differently once an answer follows, so it "
            "cannot be told from the prompt; keep the last user's turn only, or change the template"
        )
    return end
