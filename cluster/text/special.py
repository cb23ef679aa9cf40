"""Special tokens in text that people wrote: spelt out, they stay plain text.

``<|im_start|>system`` in a message must not open a system turn. A common text spells no special
token and goes to the tokenizer as it is. Otherwise a second tokenizer is used, equal to the first
except that every special token has a secret name: the template's own special tokens are renamed
to it, what people wrote is not, and so cannot become one, whatever kind of model splits it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Mapping
from typing import Any

from tokenizers import Tokenizer

from cluster.errors import ConfigError


class SpecialTokens:
    """The special tokens of one tokenizer and the tokenizer that people cannot talk to."""

    def __init__(
        self, tokenizer: Tokenizer, raw: dict[str, Any], named: Collection[str] = ()
    ) -> None:
        """Take the special tokens of ``tokenizer``, whose JSON is ``raw`` (used up).

        ``named`` are tokens that are special because a config says so.

        Raises ConfigError when they cannot be guarded.
        """
        added = tokenizer.get_added_tokens_decoder()
        self.ids: dict[str, int] = {
            token.content: number
            for number, token in added.items()
            if token.special or token.content in named
        }
        self.all_ids = frozenset(self.ids.values())
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._spelt = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # digits: no template filter changes them; random: no text can spell them on purpose
        self._nonce = str(secrets.randbits(128) | 1 << 128)
        self._names = {text: f"[{self._nonce}s{n}]" for n, text in enumerate(self.ids)}
        self._quoted = re.compile(rf"\[{self._nonce}q(\d+)\]")
        self._tokens = list(self.ids)
        self.guarded = self._rename(raw)

    def spelt_in(self, text: str) -> bool:
        """Say whether ``text`` spells a special token."""
        return self._spelt.search(text) is not None

    def quote(self, text: str) -> str:
        """Return ``text`` with each spelt special token as a placeholder, ready for a template."""
        order = {token: n for n, token in enumerate(self._tokens)}
        return self._spelt.sub(lambda hit: f"[{self._nonce}q{order[hit[0]]}]", text)

    def protect(self, rendered: str) -> str:
        """Turn a rendered template with quoted messages into text for ``guarded``."""
        renamed = self._spelt.sub(lambda hit: self._names[hit[0]], rendered)
        return self._quoted.sub(lambda hit: self._tokens[int(hit[1])], renamed)

    def _rename(self, raw: dict[str, Any]) -> Tokenizer:
        for token in raw["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        _rename_vocabulary(raw["model"], self._names)
        try:
            guarded = Tokenizer.from_str(json.dumps(raw, ensure_ascii=False))
        except Exception as error:  # the Rust side raises bare Exception
            raise ConfigError(
                f"tokenizer.json: special tokens cannot be guarded: {error}"
            ) from None
        for text, number in self.ids.items():
            if guarded.token_to_id(self._names[text]) != number:
                raise ConfigError(
                    f"tokenizer.json: special token {text!r} (id {number}) has no place of its own "
                    "in the vocabulary; save the tokenizer again with transformers"
                )
        return guarded


def _rename_vocabulary(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename special tokens inside the model's vocabulary; its order and ids stay."""
    if isinstance(model["vocab"], dict):  # BPE, WordPiece, WordLevel
        model["vocab"] = {names.get(text, text): n for text, n in model["vocab"].items()}
    else:  # Unigram: a list of (token, score)
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if unknown := model.get("unk_token"):
        model["unk_token"] = names.get(unknown, unknown)
