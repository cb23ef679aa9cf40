"""Log-probabilities of tokens as clients read them: with text, bytes and place."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.text.chat import ChatText
from serve_apps.calls import Score
from serve_apps.engine.interface import Logprob

LEAST = -9999.0
"""What stands for minus infinity, which JSON does not know; OpenAI's choice."""


class Scorer:
    """Scores of one answer, and of its prompt where that is echoed."""

    def __init__(self, text: ChatText, prompt_ids: Sequence[int] = ()) -> None:
        """Score with the text's vocabulary; ``prompt_ids`` are those of an echoed prompt."""
        self._text, self._prompt_ids = text, prompt_ids

    def score(self, found: Logprob, offset: int) -> Score:
        """Return the score of a token that stands at ``offset``."""
        top = tuple((*self._spell(number), max(logprob, LEAST)) for number, logprob in found.top)
        return Score(*self._spell(found.token_id), max(found.logprob, LEAST), top, offset)

    def prompt(self, found: Sequence[Logprob]) -> list[Score]:
        """Return the scores of the echoed prompt; nothing predicts its first token."""
        if not self._prompt_ids:
            return []
        places, at, stream = [], 0, self._text.stream()
        for number in self._prompt_ids:
            places.append(at)
            at += len(stream.feed((number,)))
        first = Score(*self._spell(self._prompt_ids[0]), None, (), 0)
        rest = zip(found, places[1:], strict=False)
        return [first, *(self.score(one, place) for one, place in rest)]

    def _spell(self, number: int) -> tuple[str, bytes]:
        raw = self._text.piece(number)
        return raw.decode("utf-8", "replace"), raw
