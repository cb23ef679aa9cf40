"""Answers that must have a form: JSON schemas, regular expressions, grammars, by llguidance.

The replica's front calls `compile_check` before it admits a request, so that a client hears at
once what is wrong. Rank 0 keeps one `Grammars` per version and calls ``matcher`` on the thread
that reads admissions, never in the step loop: compiling takes milliseconds. It hands the
`Matcher` to `sampler.Picker.add`; from then on the picker's thread alone touches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from serve_apps.engine.interface import Grammar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def compile_check(grammar: Grammar, tokenizer: Any | None = None) -> None:
    """Raise RequestError (400, ``invalid_grammar``) for a grammar that cannot be enforced."""


class Matcher:
    """Where one answer stands in its grammar. Not safe for two threads at once."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill(self, words: NDArray[np.int32], stop_ids: Sequence[int] = ()) -> bool:
        """Write one bit per token that may come next; False when there is none."""
        raise NotImplementedError

    def accept(self, token: int) -> bool:
        """Take a token of the answer; True when the answer is complete."""
        raise NotImplementedError


class Grammars:
    """The token table of one version's tokenizer, built at the first grammar, and its matchers."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def matcher(self, grammar: Grammar) -> Matcher:
        """Compile ``grammar`` for this version. Any thread. EngineError ends that request only."""
        raise NotImplementedError
