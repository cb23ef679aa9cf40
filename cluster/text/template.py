"""Chat templates, rendered in a sandbox with bounds on time and size.

A template is a program that came with the weights. It sees the messages and nothing else, cannot
reach an attribute that leads out, cannot loop past a deadline or grow a text past a limit. What it
renders equals what transformers renders (same Jinja options, filters and globals).
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.errors import ConfigError

MAX_SECONDS = 2.0
MAX_TEMPLATE_CHARS = 1_000_000
SPARE_CHARS = 1_000_000
"""What a template may write beside eight times the text of the messages."""

_deadline: ContextVar[float] = ContextVar("deadline")
_Render = Callable[..., Iterable[str]]


class TooMuch(TemplateError):
    """The template ran past its time or its size."""


class ChatTemplate:
    """One compiled template. ``render`` is safe to call from several threads."""

    def __init__(self, source: str, variables: Mapping[str, str], where: str) -> None:
        """Compile ``source``; ``variables`` are special tokens such as ``bos_token``.

        Raises ConfigError, with ``where`` and the line, when it is not a Jinja template.
        """
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ConfigError(f"{where}: a chat template of {len(source)} characters is refused")
        self._where = where
        self._variables = dict(variables)
        # What brackets a {% generation %} block in the output until render() takes it out again.
        # Digits only, so that no filter changes it; random, so that no message can spell it.
        self._open, self._close = (str(secrets.randbits(128) | 1 << 128) for _ in range(2))
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters.update(tojson=_tojson, _bounded=_bounded)
        environment.globals.pop("lipsum", None)
        environment.globals.update(
            raise_exception=_raise,
            strftime_now=lambda form: datetime.now().strftime(form),
            _generation_marks=(self._open, self._close),
        )
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            at = f"{where}:{line}" if line else where
            raise ConfigError(f"{at}: not a chat template: {error}") from None

        self.knows_tools = "tools" in find_undeclared_variables(environment.parse(source))
        """Whether the template has a place for tools."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the (start, end) of each ``{% generation %}`` block in it.

        ``extra`` are variables of the template's own, as ``enable_thinking``. Raises ConfigError
        with the template's own words when it refuses the conversation.
        """
        limit = SPARE_CHARS + 8 * (_chars(messages) + _chars(tools))
        token = _deadline.set(time.monotonic() + MAX_SECONDS)
        blocks, size = [], 0
        try:
            variables: dict[str, Any] = {
                **(extra or {}),
                **self._variables,
                "messages": [dict(message) for message in messages],
                "tools": [dict(tool) for tool in tools] if tools else None,
                "documents": None,
                "add_generation_prompt": generation_prompt,
            }
            for block in self._template.generate(variables):
                blocks.append(block)
                size += len(block)
                _tick()
                if size > limit:
                    raise TooMuch(f"it wrote more than {limit} characters")
        except TemplateError as error:
            raise ConfigError(f"{self._where}: the chat template refuses: {error}") from None
        except RecursionError:
            raise ConfigError(f"{self._where}: the chat template recurses without end") from None
        except (ArithmeticError, LookupError, TypeError, ValueError, MemoryError) as error:
            raise ConfigError(f"{self._where}: the chat template fails: {error}") from None
        finally:
            _deadline.reset(token)
        return self._take_marks("".join(blocks))

    def _take_marks(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        head, *rest = text.split(self._open)
        parts, spans, at = [head], [], len(head)
        for part in rest:
            inside, _, after = part.partition(self._close)
            spans.append((at, at + len(inside)))
            parts += [inside, after]
            at += len(inside) + len(after)
        return "".join(parts), spans


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses what the sandbox forbids, and what takes too long or too much memory."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        # every loop counts its turns: calls alone would not notice nested loops over lists
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "_bounded", [], [], None, None)
        tree.set_environment(self)
        return tree

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _tick()
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and abs(value) > SPARE_CHARS:
                raise TooMuch(f"a call with the number {value}")
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _tick()
        if operator == "*" and not (
            isinstance(left, int | float) and isinstance(right, int | float)
        ):
            times, what = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and times * len(what) > SPARE_CHARS:
                raise TooMuch(f"a text repeated {times} times")
        if operator == "**" and abs(right) > 64:
            raise TooMuch(f"a power of {right}")
        if operator == "%" and isinstance(left, str) and any(c.isdigit() or c == "*" for c in left):
            raise TooMuch(f"the format {left!r:.40}, which names a width")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``: what the assistant said, for training."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = nodes.Name("_generation_marks", "load")
        call = self.call_method("_bracket", [marks])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _bracket(self, marks: tuple[str, str], caller: Callable[[], str]) -> str:
        return f"{marks[0]}{caller()}{marks[1]}"


def _chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_chars(key) + _chars(below) for key, below in value.items())
    return sum(map(_chars, value)) if isinstance(value, Sequence) else 8


def _tick() -> None:
    if time.monotonic() > _deadline.get():
        raise TooMuch(f"it ran for more than {MAX_SECONDS:g} s")


@pass_context  # so that Jinja does not run it while it compiles
def _bounded(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _tick()
        yield item


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which no model was trained on
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
