"""Sources with targets. No torch."""

from __future__ import annotations

from cluster.errors import ConfigError
from cluster.text.chat import ChatText
from train_jobs.data.example import Document, Example
from train_jobs.data.records import Pair
from train_jobs.objectives.settings import Seq2Seq


def translated(record: Pair, text: ChatText, objective: Seq2Seq, start: int) -> Example:
    """Encode a source for the encoder and a target for the decoder.

    The target begins with ``start``, which the decoder is always given, so that each of its other
    tokens is predicted by the one before it; the last of them ends it.
    """
    source = text.encode(objective.prefix + record.source)
    target = text.encode(record.target)
    if not target or target[-1] not in text.eos_ids:
        if not text.eos_ids:
            raise ConfigError(
                "this model names no eos_token, which must end each target; name one in its "
                "tokenizer_config.json and import it again"
            )
        target = (*target, text.eos_ids[0])
    if not source:
        raise ConfigError("source: empty; there is nothing to read")
    if len(target) > objective.max_target_len:
        raise ConfigError(
            f"target: {len(target)} tokens, objective.max_target_len is "
            f"{objective.max_target_len}; shorten it or raise max_target_len"
        )
    return Example(
        (
            Document(record.where, source, (False,) * len(source)),
            Document(record.where, (start, *target), (False, *(True,) * len(target))),
        ),
        record.target,
    )
