"""Token ids to text while they arrive, never half a character."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

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

    def __init__(
        self, tokenizer: Tokenizer, decoder: Mapping[str, Any] | None, skip: frozenset[int]
    ) -> None:
        """Take that part of ``tokenizer.json``, and the ids that have no text."""
        self._tokenizer = tokenizer
        told = json.dumps(decoder)
        self._byte_level = '"ByteLevel"' in told
        self._spaced = '"Metaspace"' in told or "\\u2581" in told
        self.bytewise = decoder is not None and decoder.get("type") == "ByteLevel"
        """Whether a text is the bytes of its tokens one after the other, and nothing else."""
        self.skip = skip
        self._pieces: dict[int, bytes] = {}

    def text(self, ids: Sequence[int]) -> str:
        """Decode ``ids`` at once, an incomplete last character as U+FFFD."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def piece(self, number: int) -> bytes:
        """Return the bytes that one token stands for by itself."""
        found = self._pieces.get(number)
        if found is None:
            found = self._pieces[number] = self._piece(number)
        return found

    def _piece(self, number: int) -> bytes:
        token = self._tokenizer.id_to_token(number) or ""
        if self._byte_level:
            known = [BYTE_OF.get(char) for char in token]
            return token.encode() if None in known else bytes(b for b in known if b is not None)
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(byte[1])
        return (token.replace("\u2581", " ") if self._spaced else token).encode()

    def incomplete(self, ids: Sequence[int]) -> bool:
        """Say whether the bytes of ``ids`` stop inside a character that could still be ended."""
        decoder = _utf8()
        for number in ids:
            token = self._tokenizer.id_to_token(number) or ""
            if self._byte_level:
                decoder.decode(bytes(BYTE_OF[char] for char in token if char in BYTE_OF))
            elif byte := _BYTE_TOKEN.fullmatch(token):
                decoder.decode(bytes.fromhex(byte[1]))
            else:
                decoder.reset()
        return bool(decoder.getstate()[0])


def _utf8() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")(errors="replace")


class TextStream:
    """The text of one answer. What ``feed`` and ``flush`` return, joined, is the whole text.

    Special tokens are left out. Bytes that cannot be a character become U+FFFD as soon as that is
    certain; bytes that wait for the rest of their character wait, and are dropped at the end.
    """

    def __init__(self, detokenizer: Detokenizer, shown: Mapping[int, str] | None = None) -> None:
        """``shown`` are special tokens that come out as text all the same."""
        self._detokenizer = detokenizer
        self._special = shown or {}
        self._bytes = _utf8() if detokenizer.bytewise else None
        # the last tokens shown, for context (a leading space depends on it), then those that wait
        self._window: list[int] = []
        self._num_shown = 0
        self._shown = ""

    def feed(self, ids: Sequence[int]) -> str:
        """Add tokens; return the text that became certain, perhaps none."""
        out = ""
        for number in ids:
            if number in self._special:
                out += self.flush() + self._special[number]
            elif number in self._detokenizer.skip:
                continue
            elif self._bytes is not None:
                out += self._bytes.decode(self._detokenizer.piece(number))
            else:
                out += self._feed(number)
        return out

    def flush(self) -> str:
        """Return what is left at the end of the answer, without an unfinished character."""
        if self._bytes is not None:
            self._bytes.reset()
            return ""
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
