"""Templates come with the weights: they run in a sandbox, and not for long."""

from __future__ import annotations

import time

import pytest

from cluster.errors import ConfigError
from cluster.text import template as module
from cluster.text.template import ChatTemplate

USER = [{"role": "user", "content": "hello"}]


def render(source: str) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}, "chat_template.jinja").render(USER, True)[0]


@pytest.mark.parametrize(
    "source",
    [
        "{% set l = range(100000)|list %}{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in range(100000) %}{% for b in range(100000) %}xxxxxxxxxxxxxxxx{% endfor %}"
        "{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ [1] * 1000000000 }}",
        "{{ 9 ** 999999999 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_t22_endless_and_huge_templates_end(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(ConfigError, match="chat template"):
        render(source)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ strftime_now.__globals__['secrets'].token_hex() }}",
        "{% include '/etc/hostname' %}",
    ],
)
def test_t22_template_cannot_reach_out(source: str) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        render(source)


def test_template_refuses_in_its_own_words() -> None:
    with pytest.raises(ConfigError, match="chat_template.jinja: .*roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_template_gets_what_transformers_gives() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}\n  {% if m.nope is defined %}no{% endif %}"
        "{{ m.content|tojson }}{% break %}{% endfor %}{{ strftime_now('%Y')|length }}"
        "{{ tools is none }}{{ add_generation_prompt }}"
    )
    assert render(source) == '<s>"hello"4TrueTrue'


def test_loop_variables_work_although_loops_are_counted() -> None:
    source = "{% for m in messages %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{% endfor %}"
    assert render(source) == "0True1"
    assert render("{% for x in [1, 2] %}{{ x }}{% endfor %}") == "12"
    assert render("{% for x in nothing %}{{ x }}{% else %}none{% endfor %}") == "none"
    assert render("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}") == "a1"
    nested = "{% for x in [[1, [2]]] recursive %}{{ loop(x) if x is sequence else x }}{% endfor %}"
    assert render(nested) == "12"


def test_generation_blocks_come_back_as_spans() -> None:
    source = "a{% generation %}bc{% endgeneration %}d{% generation %}{% endgeneration %}"
    text, spans = ChatTemplate(source, {}, "x").render(USER, False)
    assert (text, spans) == ("abcd", [(1, 3), (4, 4)])
