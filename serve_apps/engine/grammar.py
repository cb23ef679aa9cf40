"""Answers that must have a form: JSON schemas, regular expressions, grammars, by llguidance.

The replica's front calls `compile_check` before it admits a request, so that a client hears at
once what is wrong. Rank 0 keeps one `Grammars` per version and calls ``matcher`` on the thread
that reads admissions, never in the step loop: compiling takes milliseconds, a version's first
time longer. It hands the `Matcher` to `sampler.Picker.add`; from then on the picker's thread
alone touches it.

A grammar is a program that a stranger wrote. Its text and nesting are bounded here, the work of
compiling it and of every step by llguidance's own counters.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cluster.errors import ConfigError, EngineError, RequestError
from serve_apps.engine.interface import Grammar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cluster.text.chat import ChatText

MAX_BYTES = {"json_schema": 64 * 1024, "regex": 8 * 1024, "lark": 32 * 1024}
"""Of the text; generous beside what people write, small beside what llguidance survives."""
MAX_NESTING = 48
"""Levels of a schema; llguidance recurses over them. Of regexes it bounds them itself."""
COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties")
MERGED = ("allOf", "anyOf", "oneOf", "$ref")
ANNOTATIONS = {"$defs", "definitions", "$schema", "$id", "title", "description", "default"}
MAX_COUNTED = 200_000
"""What a schema makes the compiler unroll, in items: it takes 1 s for a million."""
WHITESPACE = r"[ \n\t]{1,20}"
"""Between JSON's tokens, at most once: a weak model must not indent for ever."""
JSON_OPTIONS = {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}
LIMITS = {
    "max_items_in_row": 1_000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 25_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}
"""Tens of milliseconds to compile, at most some for a step; far above what real schemas need."""


def compile_check(
    grammar: Grammar, tokenizer: Any | None = None, param: str = "response_format"
) -> None:
    """Raise RequestError (400, ``invalid_grammar``) for a grammar that cannot be enforced.

    ``param`` is the request's field that it came from. ``tokenizer`` is an ``LLTokenizer``;
    without one a grammar that names special tokens is refused. Milliseconds as a rule, below a
    second for what is made to be slow; any thread.
    """
    from llguidance import LLMatcher

    try:
        source = _source(grammar)
    except ValueError as error:
        raise _refused(param, str(error)) from None
    matcher = LLMatcher(tokenizer or _bytes_table(), source, log_level=0, limits=_limits())
    if not matcher.is_error():
        # the first step too: a grammar may compile that no text at all satisfies
        matcher.compute_bitmask()
    if matcher.is_error():
        why = matcher.get_error()
        nothing = "no text satisfies it" if "NoExtension" in why else why
        raise _refused(param, nothing)


class Matcher:
    """Where one answer stands in its grammar. Not safe for two threads at once."""

    def __init__(self, matcher: Any, vocab_size: int, eos_ids: Sequence[int]) -> None:
        import numpy as np

        self._matcher, self._eos_ids = matcher, eos_ids
        self._words = np.zeros((vocab_size + 31) // 32, dtype=np.int32)
        self._taken = 0

    def fill(
        self,
        words: NDArray[np.int32],
        ids: Sequence[int],
        answered: int,
        stop_ids: Sequence[int] = (),
    ) -> str | None:
        """Set one bit of ``words`` per token that may come next, after ``answered`` of ``ids``.

        ``stop_ids`` are allowed where the answer may end, and only there. Returns why nothing
        may come next when so; the request cannot go on then.
        """
        if self._taken != answered and (why := self._resume(list(ids[len(ids) - answered :]))):
            return why
        mine = self._words
        mine[:] = 0
        if not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(mine.ctypes.data, mine.nbytes)
        if self._matcher.is_error():
            return f"the grammar became too complex here: {_short(self._matcher.get_error())}"
        count = min(len(words), len(mine))
        words[:count] = mine[:count]
        words[count:] = 0
        ends = self._matcher.is_accepting()
        for token in (*self._eos_ids, *stop_ids):
            _set(words, token, ends and token in stop_ids)
        if words.any():
            return None
        return "the grammar allows no token of this model's vocabulary here"

    def accept(self, token: int) -> bool:
        """Take a token of the answer; True when nothing may follow it."""
        self._taken += 1
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def _resume(self, answer: list[int]) -> str | None:
        """Stand where ``answer`` ends, whatever was taken before."""
        self._matcher.reset()
        self._taken = len(answer)
        if self._matcher.consume_tokens(answer):
            return None
        return f"the answer left its grammar: {_short(self._matcher.get_error())}"


class Grammars:
    """The token table of one version's tokenizer, and the matchers of its requests."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._tokenizer: Any | None = None

    @property
    def tokenizer(self) -> Any:
        """The version's ``LLTokenizer``.

        The first call builds it, unless another version has the same; meanwhile the
        process's other threads stand still.
        """
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _token_table(Path(self._directory))
            return self._tokenizer

    def matcher(self, grammar: Grammar) -> Matcher:
        """Compile ``grammar`` for this version. Any thread. EngineError ends that request only."""
        from llguidance import LLMatcher

        try:
            table = self.tokenizer
            matcher = LLMatcher(table, _source(grammar), log_level=0, limits=_limits())
        except (ConfigError, ValueError) as error:
            raise EngineError(str(error)) from None
        if matcher.is_error():
            raise EngineError(f"the grammar cannot be used: {_short(matcher.get_error())}")
        return Matcher(matcher, table.vocab_size, tuple(table.eos_tokens))


def _token_table(directory: Path) -> Any:
    from cluster.text.chat import ChatText

    text = ChatText.shared(directory)
    try:
        return _table_of(text)
    except ValueError as error:
        raise ConfigError(f"{directory}: its tokenizer cannot enforce grammars: {error}") from None


@functools.lru_cache(maxsize=2)
def _table_of(text: ChatText) -> Any:
    """Return the table of a tokenizer: the versions of one model nearly always share it."""
    from llguidance import LLTokenizer

    return LLTokenizer(text.tokenizer_json(), eos_token=list(text.eos_ids) or None)


@functools.cache
def _bytes_table() -> Any:
    """Return a vocabulary of single bytes and an end: enough to try any grammar."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()))


class _Bytes:
    """What llguidance asks of a tokenizer in Python."""

    eos_token_id = 256
    bos_token_id = None
    tokens: ClassVar[list[bytes]] = [*(bytes([n]) for n in range(256)), b"<end>"]
    special_token_ids: ClassVar[list[int]] = [256]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def _source(grammar: Grammar) -> str:
    """Return what llguidance compiles; ValueError for what is beyond our own bounds."""
    from llguidance import LLMatcher

    size, most = len(grammar.text.encode("utf-8", "surrogatepass")), MAX_BYTES[grammar.kind]
    if size > most:
        raise ValueError(f"{size} bytes of {grammar.kind} are more than {most}")
    if grammar.kind == "regex":
        return str(LLMatcher.grammar_from_regex(grammar.text))
    if grammar.kind == "lark":
        return str(LLMatcher.grammar_from_lark(_bounded(grammar.text)))
    schema = _schema(grammar.text)
    _check_work(_work(schema))
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS))


def _bounded(lark: str) -> str:
    """Return a grammar whose embedded schemas keep the bounds of those that stand alone."""
    out, at, work = "", 0, 0.0
    while (found := lark.find("%json", at)) >= 0:
        begin = found + len("%json")
        begin += len(lark[begin:]) - len(lark[begin:].lstrip())
        try:
            value, end = json.JSONDecoder().raw_decode(lark, begin)
        except (ValueError, RecursionError):
            raise ValueError("what follows %json is no JSON") from None
        schema = {**_schema(json.dumps(value)), "x-guidance": JSON_OPTIONS}
        work += _work(schema)
        out, at = f"{out}{lark[at:begin]}{json.dumps(schema)}", end
    _check_work(work)
    return out + lark[at:]


def _schema(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except RecursionError:
        raise ValueError(f"it nests deeper than {MAX_NESTING} levels") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise ValueError("a schema is a JSON object")
    if _depth(schema) > MAX_NESTING:
        raise ValueError(f"it nests deeper than {MAX_NESTING} levels")
    # would loosen what is enforced; the options are ours
    schema.pop("x-guidance", None)
    return schema


def _work(schema: Any) -> float:
    """Estimate what the compiler unrolls, in items.

    Counts, once more for each merge of schemas, and the properties of each object, whose time
    grows by the square.
    """
    counted, merges, squares, rest = 0.0, 0, 0.0, [schema]
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            rest += value
        elif isinstance(value, dict):
            found = (value.get(key) for key in COUNTS)
            counted += sum(n for n in found if isinstance(n, int | float) and n > 0)
            merges += sum(_merges(value, key) for key in MERGED)
            properties = value.get("properties")
            squares += len(properties) ** 2 / 10 if isinstance(properties, dict) else 0
            rest += value.values()
    return counted * (1 + merges) + squares


def _merges(schema: dict[str, Any], key: str) -> int:
    """Return how many schemas ``key`` brings that are compiled into others."""
    inner = schema.get(key)
    alone = key != "allOf" and not schema.keys() - ANNOTATIONS - {key}
    if alone or not isinstance(inner, list | str):
        return 0
    return len(inner) if isinstance(inner, list) else 1


def _check_work(work: float) -> None:
    if work > MAX_COUNTED:
        raise ValueError(
            f"{', '.join(COUNTS)}, times merged schemas, and properties come to {work:g} units "
            f"of work; at most {MAX_COUNTED} are taken"
        )


def _depth(schema: Any) -> int:
    """Return how many levels of objects and lists ``schema`` has."""
    level, depth = [schema], 0
    while level:
        depth += 1
        inner = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
    return depth


def _limits() -> Any:
    from llguidance import LLParserLimits

    return LLParserLimits(**LIMITS)


def _refused(param: str, why: str) -> RequestError:
    return RequestError(f"{param}: {_short(why)}", 400, "invalid_grammar", param)


def _short(why: str) -> str:
    line = " ".join(why.split())
    return line if len(line) <= 300 else line[:297] + "..."


def _set(words: NDArray[np.int32], token: int, allowed: bool) -> None:
    word, bit = divmod(token, 32)
    if word < len(words):
        value = int(words[word]) & 0xFFFFFFFF
        value = value | 1 << bit if allowed else value & ~(1 << bit)
        words[word] = value - (1 << 32) if value >= 1 << 31 else value
