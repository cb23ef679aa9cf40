"""From messages to token ids and back: the one place where trainer and gateway get their tokens."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from cluster.errors import ConfigError
from cluster.text.mask import assistant_spans, mask_of
from cluster.text.special import SpecialTokens
from cluster.text.stream import UNKNOWN, Detokenizer, TextStream
from cluster.text.template import ChatTemplate

Messages = Sequence[Mapping[str, Any]]
"""Turns with role and content, both text; an assistant's may hold ``tool_calls``."""
Tools = Sequence[Mapping[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool")
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
"""All that is read of a directory."""
SHARED = 4
"""Texts that a process keeps for directories which say the same."""
_shared: OrderedDict[str, ChatText] = OrderedDict()


class ChatText:
    """The tokenizer and the chat template of one model directory; safe to share among threads.

    Text that spells a special token is encoded as plain text, in every method.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None = None,
        named_tokens: Mapping[str, str] | None = None,
        eos_ids: Sequence[int] = (),
        where: str = "chat template",
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        """Build from parts; ``named_tokens`` is what the template sees, as ``bos_token``."""
        named = dict(named_tokens or {})
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # a token that the tokenizer's config calls special is special, whatever tokenizer.json says
        known = [text for text in named.values() if tokenizer.token_to_id(text) is not None]
        tokenizer.add_special_tokens(sorted(set(known)))
        self._tokenizer = tokenizer
        raw = json.loads(tokenizer.to_str())
        decoder = raw["decoder"]
        self._special = SpecialTokens(tokenizer, raw, known)
        self._template = ChatTemplate(template, named, where) if template is not None else None
        self._where = where
        self.named_ids: Mapping[str, int] = {
            name: number
            for name, text in named.items()
            if (number := tokenizer.token_to_id(text)) is not None
        }
        """Ids of ``mask_token``, ``cls_token`` and their like, as far as the model names them."""
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_ids = tuple(dict.fromkeys(n for n in eos_ids if 0 <= n < self.vocab_size))
        self.generation: Mapping[str, Any] = dict(generation or {})
        """The model's ``generation_config.json``."""
        self.template_source = template or ""
        self._detokenizer = Detokenizer(tokenizer, decoder, self._special.all_ids)

    @classmethod
    def load(cls, directory: Path | str) -> ChatText:
        """Read tokenizer, template and end-of-turn ids of a model directory.

        Raises ConfigError when ``tokenizer.json`` is missing or a file cannot be read.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{path}: no such file; Roundhouse needs a fast tokenizer: save one with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...), then import again"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise ConfigError(f"{path}: not a tokenizer: {error}") from None
        config = _read_json(directory / "tokenizer_config.json")
        named = {key: text for key in _NAMED if (text := _content(config.get(key)))}
        ends: list[int] = []
        for name in ("generation_config.json", "config.json"):
            end = _read_json(directory / name).get("eos_token_id")
            ends += [n for n in (end if isinstance(end, list) else [end]) if isinstance(n, int)]
        if (end := tokenizer.token_to_id(named.get("eos_token", ""))) is not None:
            ends.append(end)
        template, where = _read_template(directory, config)
        generation = _read_json(directory / "generation_config.json")
        return cls(tokenizer, template, named, ends, where, generation)

    @classmethod
    def shared(cls, directory: Path | str) -> ChatText:
        """Return what ``load`` does, the same object for all directories whose files are the same.

        The versions of one model nearly always are. Raises what ``load`` raises.
        """
        files = [Path(directory) / name for name in FILES]
        told = [(path.name, path.read_bytes()) for path in files if path.is_file()]
        key = hashlib.sha256(repr(told).encode()).hexdigest()
        # two threads may both read it; what counts is that one of them is kept
        text = _shared.get(key) or cls.load(directory)
        _shared[key] = text
        while len(_shared) > SHARED:
            _shared.popitem(last=False)
        return text

    @property
    def has_template(self) -> bool:
        """Whether ``encode_chat`` and ``encode_training`` can work."""
        return self._template is not None

    def tokenizer_json(self) -> str:
        """Return the tokenizer as text, with what its config calls special marked so."""
        return str(self._tokenizer.to_str())

    def is_as(self, other: ChatText) -> bool:
        """Say whether both encode and decode alike; a fraction of a second for two objects."""
        if self is other:
            return True
        mine, theirs = (
            (text.template_source, text.named_ids, text.eos_ids) for text in (self, other)
        )
        return mine == theirs and self.tokenizer_json() == other.tokenizer_json()

    @property
    def knows_tools(self) -> bool:
        """Whether the chat template has a place for tools."""
        return self._template is not None and self._template.knows_tools

    @property
    def where(self) -> str:
        """The file that the chat template is from."""
        return self._where

    def left_out(self, messages: Messages, tools: Tools | None = None) -> str | None:
        """Say what of a conversation's tools, calls and tools' answers the template leaves out.

        None where all of them are rendered. Each is tried with a name that nothing else has: a
        template that declares ``tools`` may still write an assistant's content alone. Raises
        ConfigError for what the template refuses.
        """
        marks: dict[str, str] = {}

        def mark(what: str) -> str:
            text = str(secrets.randbits(128) | 1 << 128)  # digits: no filter changes them
            marks[text] = what
            return text

        def named(one: Mapping[str, Any], what: str) -> dict[str, Any]:
            inner = one.get("function")
            if isinstance(inner, Mapping):
                return {**one, "function": named(inner, what)}
            return {**one, "name": mark(f"{what} {one.get('name')!r:.40}")}

        offered = [named(tool, "tools: the tool") for tool in tools or ()]
        turns = []
        for message in messages:
            turn = dict(message)
            if turn["role"] == "tool":
                turn["content"] = mark("what a tool has answered")
            if calls := turn.get("tool_calls"):
                turn["tool_calls"] = [named(call, "tool_calls: the call of") for call in calls]
            turns.append(turn)
        if not marks:
            return None
        rendered, _ = self._render(turns, False, offered)
        return next((what for text, what in marks.items() if text not in rendered), None)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer as it is, special tokens and all: for what reads its vocabulary."""
        return self._tokenizer

    def encode(self, text: str, begin: bool = True) -> tuple[int, ...]:
        """Encode raw text; where it begins one, with the special tokens that the tokenizer adds."""
        spelt = self._special.spelt_in(text)
        tokenizer = self._special.guarded if spelt else self._tokenizer
        return tuple(tokenizer.encode(text, add_special_tokens=begin).ids)

    def encoding(self, text: str, other: str | None = None) -> Encoding:
        """Encode one text or a pair as `encode` does; with the offsets and types of its tokens."""
        spelt = self._special.spelt_in(text) or (other and self._special.spelt_in(other))
        tokenizer = self._special.guarded if spelt else self._tokenizer
        return tokenizer.encode(text, other)

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that no text can spell."""
        return self._special.all_ids

    def encode_chat(
        self,
        messages: Messages,
        generation_prompt: bool = True,
        tools: Tools | None = None,
        extra: Mapping[str, Any] | None = None,
        continued: bool = False,
    ) -> tuple[int, ...]:
        """Render and encode a conversation, ready for the assistant's turn.

        ``extra`` are variables of the template's own. With ``continued`` the text stops where the
        last message's content does. Raises ConfigError for messages that are not ones and for
        what the template refuses.
        """
        checked = [_check(n, message) for n, message in enumerate(messages)]
        mark = str(secrets.randbits(128) | 1 << 128) if continued and checked else ""
        if mark:
            checked[-1] = {**checked[-1], "content": checked[-1]["content"] + mark}
        given: dict[str, Any] = {"tools": list(tools or ()), "extra": dict(extra or {})}
        guard, checked, given = self._prepare(checked, given)
        rendered, _ = self._render(checked, generation_prompt and not mark, **given)
        if mark:
            if mark not in rendered:
                raise ConfigError(f"{self._where}: the chat template drops the last message")
            rendered = rendered[: rendered.rindex(mark)]
        return tuple(self._encode_rendered(rendered, guard).ids)

    def encode_training(
        self, messages: Messages, tools: Tools | None = None
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a whole conversation, and for each whether it is trained.

        Trained is what the assistant says and the token that ends its turn, not the white space
        after it. The ids equal ``encode_chat(messages, generation_prompt=False)``. Raises
        ConfigError when the template cannot say which part is the assistant's.
        """
        checked = [_check(n, message) for n, message in enumerate(messages)]
        given: dict[str, Any] = {"tools": list(tools or ())}
        guard, messages, given = self._prepare(checked, given)
        rendered, marked = self._render(messages, False, **given)
        spans = marked or assistant_spans(
            messages,
            rendered,
            lambda part, prompt: self._render(part, prompt, **given)[0],
            self._where,
        )
        encoding = self._encode_rendered(rendered, guard)
        if guard:  # offsets are those of the protected text
            spans = [
                (len(self._special.protect(rendered[:a])), len(self._special.protect(rendered[:b])))
                for a, b in spans
            ]
        ends = self._special.all_ids | set(self.eos_ids)
        return list(encoding.ids), mask_of(
            encoding.ids, encoding.offsets, spans, ends, bool(marked)
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids`` without special tokens and without an unfinished character."""
        ids = [n for n in ids if n not in self._detokenizer.skip]
        text = self._detokenizer.text(ids)
        if UNKNOWN not in text:
            return text
        stream = self.stream()
        return stream.feed(ids) + stream.flush()

    def stream(self, shown: Iterable[str] = ()) -> TextStream:
        """Start decoding one answer token by token; ``shown`` special tokens come out as text."""
        ids = self._special.ids
        return TextStream(self._detokenizer, {ids[text]: text for text in shown if text in ids})

    def piece(self, number: int) -> bytes:
        """Return the bytes that one token stands for by itself, special ones included."""
        return self._detokenizer.piece(number)

    def _prepare(
        self, checked: list[dict[str, Any]], given: dict[str, Any] | None = None
    ) -> tuple[bool, list[dict[str, Any]], dict[str, Any]]:
        """Quote what people wrote wherever it spells a special token; say whether it does."""
        if not checked:
            raise ConfigError("messages: empty; a conversation has at least one message")
        given = given or {}
        if not any(map(self._special.spelt_in, _texts([checked, given]))):
            return False, checked, given
        quote = self._special.quote
        return (
            True,
            [
                {key: value if key == "role" else _map(value, quote) for key, value in m.items()}
                for m in checked
            ],
            {key: _map(value, quote) for key, value in given.items()},
        )

    def _render(
        self,
        messages: Messages,
        prompt: bool,
        tools: Tools | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        if self._template is None:
            raise ConfigError(
                f"{self._where}: this model has no chat template; put a chat_template.jinja beside "
                "its tokenizer.json, or use plain completions"
            )
        return self._template.render(messages, prompt, tools, extra)

    def _encode_rendered(self, rendered: str, guard: bool) -> Any:
        if guard:
            text = self._special.protect(rendered)
            return self._special.guarded.encode(text, add_special_tokens=False)
        return self._tokenizer.encode(rendered, add_special_tokens=False)


def _check(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    where = f"messages[{number}]"
    if not isinstance(message, Mapping):
        raise ConfigError(f"{where}: {message!r:.40} is not a message with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise ConfigError(f"{where}: role {role!r:.40} is not one of {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
        raise ConfigError(f"{where}: content must be text, not {message.get('content')!r:.40}")
    for key, value in message.items():
        if key == "tool_calls" and isinstance(value, list):
            continue
        if not isinstance(key, str) or not isinstance(value, str):
            raise ConfigError(f"{where}: {key!r:.40} must be text, not {value!r:.40}")
    return dict(message)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, below in value.items():
            yield from _texts(key)
            yield from _texts(below)
    elif isinstance(value, Sequence):
        for below in value:
            yield from _texts(below)


def _map(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map(key, change): _map(below, change) for key, below in value.items()}
    return [_map(below, change) for below in value] if isinstance(value, Sequence) else value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: the top level must be an object, not {value!r:.40}")
    return value


def _content(token: Any) -> str | None:
    """Return the text of a token that a tokenizer config writes as text or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_template(directory: Path, config: Mapping[str, Any]) -> tuple[str | None, str]:
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    path = directory / "tokenizer_config.json"
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {item.get("name"): item.get("template") for item in template}
        template = named.get("default")
    if template is None:
        return None, str(directory)
    if not isinstance(template, str):
        raise ConfigError(f"{path}: chat_template must be text, not {template!r:.40}")
    return template, str(path)
