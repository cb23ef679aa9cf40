"""Conversations with tools: learnt whole or not at all. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import ConfigError
from cluster.text.chat import ChatText, Messages


def require_whole(
    text: ChatText, messages: Messages, tools: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Refuse a conversation of whose tools the template drops a part, which nobody would notice."""
    lost = text.left_out(messages, tools)
    if lost:
        raise ConfigError(
            f"{lost} has no place in this model's chat template ({text.where}), which leaves it "
            "out: the model would not learn it; choose a model whose template has one, or write "
            "tools and calls into the texts"
        )
