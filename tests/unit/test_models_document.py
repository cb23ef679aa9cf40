"""The committed support table is the one that the tests of the architectures hold to."""

from __future__ import annotations

from pathlib import Path

from tests.parity.architectures import REFUSED, SERVED, render

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_committed_table_is_what_the_tests_say() -> None:
    assert DOCUMENT.read_text() == render(), (
        "write it anew: python -m tests.parity.architectures --write docs/models.md"
    )


def test_the_table_has_the_families_that_people_deploy() -> None:
    served = {kind.model_type for kind in SERVED}
    assert len(served) == len(SERVED) >= 12
    assert not served & {kind for kind, *_ in REFUSED}
    assert {"llama", "mistral", "qwen3", "gemma2", "phi3", "mixtral", "opt", "gpt2"} <= served
