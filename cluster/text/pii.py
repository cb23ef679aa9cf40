"""Personal data in text: find it, and put placeholders in its place.

Patterns look for the shape, checks for what the shape cannot say (check digits, ranges). Every
pattern is linear: each repetition is bounded, or of characters that what follows cannot match.
Names and addresses have no shape: they are not found.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_LETTERS = {chr(ord("A") + n): str(10 + n) for n in range(26)}


@dataclass(frozen=True, slots=True)
class Found:
    """One piece of personal data, ``text[start:end]``."""

    kind: str
    start: int
    end: int

    @property
    def placeholder(self) -> str:
        """What stands in its place, as ``[EMAIL]``."""
        return f"[{self.kind.upper()}]"


def find(text: str) -> list[Found]:
    """Return what is found, in order, none inside another; the surer kind wins."""
    if not _MAY_HOLD.search(text):
        return []
    taken: list[Found] = []
    for kind, pattern, check in _KINDS:
        for hit in pattern.finditer(text):
            start, end = hit.span()
            if check(hit[0]) and not any(start < f.end and f.start < end for f in taken):
                taken.append(Found(kind, start, end))
    return sorted(taken, key=lambda found: found.start)


def scrub(text: str) -> tuple[str, list[str]]:
    """Return ``text`` with placeholders, and the kinds that were replaced, in order."""
    found = find(text)
    if not found:
        return text, []
    return "".join(_pieces(text, found)), [one.kind for one in found]


def _pieces(text: str, found: list[Found]) -> Iterator[str]:
    at = 0
    for one in found:
        yield text[at : one.start]
        yield one.placeholder
        at = one.end
    yield text[at:]


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


def _is_card(text: str) -> bool:
    """Check length and Luhn's check digit (ISO/IEC 7812-1)."""
    digits = [int(d) for d in _digits(text)]
    doubled = [2 * d - 9 * (d > 4) for d in digits[-2::-2]]
    total = sum(digits[-1::-2]) + sum(doubled)
    return 13 <= len(digits) <= 19 and total % 10 == 0 and any(digits)


def _is_iban(text: str) -> bool:
    """Check length and remainder (ISO 13616)."""
    plain = text.replace(" ", "").upper()
    moved = plain[4:] + plain[:4]
    number = "".join(_LETTERS.get(c, c) for c in moved)
    return 15 <= len(plain) <= 34 and int(number) % 97 == 1


def _is_ssn(text: str) -> bool:
    """Check what the administration never issues: area 000, 666, 9xx; group 00; serial 0000."""
    area, group, serial = re.split(r"[- ]", text)
    return area not in {"000", "666"} and area < "900" and group != "00" and serial != "0000"


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_phone(text: str) -> bool:
    """Check the number of digits (ITU-T E.164) and that something says it is a telephone's."""
    digits = _digits(text)
    if text.startswith(("+", "00")):
        return 8 <= len(digits) <= 15 and len(set(digits)) > 2
    return 9 <= len(digits) <= 12 and len(set(digits)) > 2


def _always(text: str) -> bool:
    return True


_MAY_HOLD = re.compile(r"@|\d{3}|\d[.:]|::|[0-9A-Fa-f]:")
_KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    (
        "email",
        re.compile(
            r"(?<![\w.+-])[A-Za-z0-9_%+-][A-Za-z0-9._%+-]{0,63}@"
            r"(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}[A-Za-z]{2,24}(?![\w-])"
        ),
        _always,
    ),
    (
        "iban",
        re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)"),
        _is_iban,
    ),
    (
        "credit_card",
        re.compile(
            # in one piece, in fours, or as American Express writes them; 2 to 6 are card networks
            r"(?<![\w.+-])(?:[2-6]\d{12,18}|[2-6]\d{3}([ -])\d{4}\1\d{4}\1\d{4}"
            r"|3[47]\d{2}([ -])\d{6}\2\d{5})(?![\w-]|[ .]\d)"
        ),
        _is_card,
    ),
    ("ssn", re.compile(r"(?<![\w-])\d{3}([- ])\d{2}\1\d{4}(?![\w-])"), _is_ssn),
    ("ip_address", re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)"), _is_address),
    (
        "ip_address",
        re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f:]{0,30}:)[0-9A-Fa-f:]{3,39}(?![\w:])"),
        lambda text: text.count(":") >= 2 and len(text) > 4 and _is_address(text),
    ),
    (
        "phone",
        re.compile(
            # +49 30 1234567, 0049 30 1234567; (030) 123-4567, 555-123-4567, 030/1234567
            r"(?<![\w.+/-])(?<!\d )(?:"
            r"(?:\+|00)[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ ./-]?\d){5,12}"
            r"|\(\d{2,5}\)[ .-]?\d{3,4}[ .-]?\d{3,4}|\d{3}([-.])\d{3}\1\d{4}|0\d{2,4}[/-]\d{5,8})"
            r"(?![\w-]|\.\d)"
        ),
        _is_phone,
    ),
)
"""The surest first: what one has taken, a later one leaves."""
