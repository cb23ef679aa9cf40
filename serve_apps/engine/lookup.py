"""Guessing how an answer goes on from what was said before: prompt-lookup decoding. Pure.

Summaries, code edits and answers about a document repeat what they were given. The continuation
of the last place where the newest tokens stood before is put into the next step beside the newest
token, and the model says of each guess whether it would have picked it (Saxena, "Prompt Lookup
Decoding", 2023; the check is that of Leviathan et al., 2023, for a draft without probabilities).
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2
"""Tokens that must repeat for a guess; the longer match is asked first."""


class Lookup:
    """The text of one request, indexed by its runs of a few tokens.

    ``most`` bounds a guess. A guess that fails makes the next one shorter, one that comes true
    longer again: each wrong token costs a row of the step.
    """

    def __init__(self, most: int) -> None:
        self.most = self._reach = most
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def guess(self, ids: Sequence[int], room: int) -> tuple[int, ...]:
        """Return what may follow ``ids``, at most ``room`` tokens; ``ids`` only ever grows."""
        self._index(ids)
        count = min(self._reach, room)
        if count < 1:
            return ()
        for length in range(min(LONGEST, len(ids) - 1), SHORTEST - 1, -1):
            at = self._after.get(tuple(ids[-length:]))
            if at is not None:
                return _going_on(ids, at, count)
        return ()

    def learn(self, guessed: int, right: int) -> None:
        """Take note of how many tokens of the last guess came true."""
        if guessed:
            self._reach = min(self.most, 2 * right + 1)

    def _index(self, ids: Sequence[int]) -> None:
        # Runs that end before the last token: the newest run must find an older one, not itself.
        for end in range(max(self._indexed, SHORTEST), len(ids)):
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(ids[end - length : end])] = end
        self._indexed = max(self._indexed, len(ids))


def _going_on(ids: Sequence[int], at: int, count: int) -> tuple[int, ...]:
    """Return what follows from ``at`` on; a text that is used up repeats itself."""
    guess = list(ids[at : at + count])
    period = len(ids) - at
    while len(guess) < count:
        guess.append(guess[len(guess) - period])
    return tuple(guess)
