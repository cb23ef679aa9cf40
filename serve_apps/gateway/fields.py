"""Fields of OpenAI's requests that are not served yet: neutral values pass, others are told.

A client library may send every field it knows with its default. Such values change nothing, so
they are dropped; any other value would be ignored silently, so it is refused by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from cluster.errors import RequestError


def _is(*neutral: Any) -> Callable[[Any], bool]:
    # 1 == True in Python, and false is no number of choices
    return lambda value: any(type(value) is type(n) and value == n for n in neutral)


def _any(value: Any) -> bool:
    return True


BOTH: Mapping[str, Callable[[Any], bool]] = {
    "user": _any,
    "metadata": _any,
    # vLLM's
    "detokenize": _is(True),
    "include_stop_str_in_output": _is(False),
    "length_penalty": _is(1, 1.0),
    "skip_special_tokens": _is(True),
    "spaces_between_special_tokens": _is(True),
    "use_beam_search": _is(False),
}
CHAT = {
    **BOTH,
    "audio": _is(),
    "function_call": _is("none"),
    "functions": _is([]),
    "modalities": _is(["text"]),
    "moderation": _is(),
    "prediction": _is(),
    "prompt_cache_key": _any,
    "prompt_cache_options": _any,
    "prompt_cache_retention": _any,
    "safety_identifier": _any,
    "service_tier": _is("auto", "default"),
    "store": _is(True, False),
    "verbosity": _is("medium"),
    "web_search_options": _is(),
}
COMPLETION = {
    **BOTH,
    "best_of": _is(1),
    "suffix": _is(""),
}


def sift(
    given: Mapping[str, Any], known: set[str], neutral: Mapping[str, Callable[[Any], bool]]
) -> dict[str, Any]:
    """Return the fields that are served; ``null`` stands for absent everywhere.

    Raises RequestError (400) that names the first field which is unknown, or known but not
    supported with that value.
    """
    kept = {}
    for name, value in given.items():
        if name in known:
            if value is not None:
                kept[name] = value
        elif name in neutral:
            if value is not None and not neutral[name](value):
                raise RequestError(
                    f"{name!r} with this value is not supported yet; leave it out",
                    400,
                    "unsupported_parameter",
                    name,
                )
        else:
            raise _unknown(name, [*known, *neutral])
    return kept


def _unknown(name: str, known: list[str]) -> RequestError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "; leave it out"
    return RequestError(f"unknown field {name[:64]!r}{hint}", 400, "unknown_parameter", name[:64])
