"""Prompts that a model is to answer by itself. No torch."""

from __future__ import annotations

from cluster.text.chat import ChatText
from train_jobs.data.encoders.tooled import require_whole
from train_jobs.data.example import Document, Example
from train_jobs.data.records import Asked


def asked(record: Asked, text: ChatText) -> Example:
    """Encode a conversation up to the assistant's turn; the label is what rewards are told."""
    require_whole(text, record.prompt)
    ids = text.encode_chat(record.prompt)
    document = Document(record.where, ids, (False,) * len(ids))
    return Example((document,), {"prompt": record.prompt, "facts": dict(record.facts)})


def turn_end(text: ChatText) -> int | None:
    """Return the token that ends an assistant's turn in this template, None where there is none."""
    ids, trained = text.encode_training(
        ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    )
    last = max((place for place, counted in enumerate(trained) if counted), default=-1)
    return ids[last] if last >= 0 and ids[last] in text.eos_ids else None
