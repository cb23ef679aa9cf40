"""The forms in which families of models write tool calls, told from their chat templates."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass
from typing import Literal

FormName = Literal["hermes", "llama", "mistral", "json", "generic"]

TAG, END_TAG = "<tool_call>", "</tool_call>"
MISTRAL, MISTRAL_ARGS = "[TOOL_CALLS]", "[ARGS]"
PYTHON = "<|python_tag|>"
_ALNUM = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Form:
    """How calls stand in a model's text."""

    name: FormName
    marks: tuple[tuple[str, str], ...]
    """What opens a call, and what may close it."""
    bare: bool = False
    """Whether a message that begins with JSON is a call."""
    headed: bool = False
    """Whether a mark may be followed by the name, and then by the arguments alone."""
    short_ids: bool = False
    """Whether the template wants ids of nine letters and digits."""

    @property
    def special(self) -> tuple[str, ...]:
        """Texts that may be special tokens of the tokenizer, and are meant all the same."""
        return tuple(text for pair in self.marks for text in pair if text) + (
            (MISTRAL_ARGS,) if self.headed else ()
        )

    def new_id(self) -> str:
        """Return an id for a call."""
        if self.short_ids:
            return "".join(secrets.choice(_ALNUM) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


FORMS: dict[FormName, Form] = {
    "hermes": Form("hermes", ((TAG, END_TAG),)),
    "llama": Form("llama", ((PYTHON, ""),), bare=True),
    "mistral": Form("mistral", ((MISTRAL, ""),), headed=True, short_ids=True),
    "json": Form("json", ((TAG, END_TAG),), bare=True),
    "generic": Form("generic", ((TAG, END_TAG),), bare=True),
}
"""``json`` is for a template that knows tools in a form we do not, ``generic`` for one that knows
no tools: there the convention is ours (see ``serve_apps.tools.convention``)."""


def detect(template: str, knows_tools: bool) -> Form:
    """Return the form that a chat template teaches its model."""
    if not knows_tools:
        return FORMS["generic"]
    if MISTRAL in template:
        return FORMS["mistral"]
    if TAG in template:
        return FORMS["hermes"]
    if PYTHON in template or '"parameters":' in template:
        return FORMS["llama"]
    return FORMS["json"]
