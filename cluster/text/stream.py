"""Token ids to text while they arrive, never half a character."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from tokenizers import Tokenizer

UNKNOWN = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's character for each byte, reversed: printable ones stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {chr(256 + n): b for n, b in enumerate(moved)}


BYTE_OF = _byte_alphabet()


class Detokenizer:
    """What all streams of one tokenizer share."""

    def __init__(self, tokenizer: Tokenizer, byte_level: bool, skip: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._byte_level = byte_level
        self.skip = skip

    def text(self, ids: Sequence[int]) -> str:
        """Decode ``ids`` at once, an incomplete last character as U+FFFD."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def incomplete(self, ids: Sequence[int]) -> bool:
        """Say whether the bytes of ``ids`` stop inside a character that could still be ended."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for number in ids:
            token = self._tokenizer.id_to_token(number) or ""
            if self._byte_level:
                decoder.decode(bytes(BYTE_OF[char] for char in token if char in BYTE_OF))
            elif byte := _BYTE_TOKEN.fullmatch(token):
                decoder.decode(bytes.fromhex(byte[1]))
            else:
                decoder.reset()
        return bool(decoder.getstate()[0])


class TextStream:
    """The text of one answer. What ``feed`` and ``flush`` return, joined, is the whole text.

    Special tokens are left out. Bytes that cannot be a character become U+FFFD as soon as that is
    certain; bytes that wait for the rest of their character wait, and are dropped at the end.
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        # the last tokens shown, for context (a leading space depends on it), then those that wait
        self._window: list[int] = []
        self._num_shown = 0
        self._shown = ""

    def feed(self, ids: Sequence[int]) -> str:
        """Add tokens; return the text that became certain, perhaps none."""
        return "".join(self._feed(n) for n in ids if n not in self._detokenizer.skip)

    def flush(self) -> str:
        """Return what is left at the end of the answer, without an unfinished character."""
        text = self._detokenizer.text(self._window)[len(self._shown) :]
        waits = text.endswith(UNKNOWN) and self._detokenizer.incomplete(self._window)
        self._window, self._num_shown, self._shown = [], 0, ""
        return text.rstrip(UNKNOWN) if waits else text

    def _feed(self, number: int) -> str:
        self._window.append(number)
        text = self._detokenizer.text(self._window)
        if text.endswith(UNKNOWN) and self._detokenizer.incomplete(self._window):
            return ""
        new = text[len(self._shown) :]
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        self._shown = self._detokenizer.text(self._window)
        return new
