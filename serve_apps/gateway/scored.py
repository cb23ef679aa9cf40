"""Log-probabilities on the wire: OpenAI's form for chat, its older one for completions. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve_apps.calls import Score


def chat_logprobs(scores: Sequence[Score]) -> dict[str, Any]:
    """Return ``choices[].logprobs`` of a chat: one object per token."""
    content = [
        {
            **_one(score.token, score.raw, score.logprob),
            "top_logprobs": [_one(*likely) for likely in score.top],
        }
        for score in scores
    ]
    return {"content": content, "refusal": None}


def text_logprobs(scores: Sequence[Score]) -> dict[str, Any]:
    """Return ``choices[].logprobs`` of a completion: one list per kind of value.

    The chosen token is always among ``top_logprobs``; the first token of an echoed prompt has null
    in its place and in that of its log-probability.
    """
    return {
        "tokens": [_key(score.token, score.raw) for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [_top(score) for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def _one(token: str, raw: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(raw)}


def _top(score: Score) -> dict[str, float] | None:
    if score.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, raw, logprob in score.top:
        found.setdefault(_key(token, raw), logprob)
    found.setdefault(_key(score.token, score.raw), score.logprob)
    return found


def _key(token: str, raw: bytes) -> str:
    """Return a token's text; where it is no text of its own, its bytes, so that keys differ."""
    if "\ufffd" not in token:
        return token
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
