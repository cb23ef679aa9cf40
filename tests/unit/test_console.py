"""What the command line prints, and where: an answer for people, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cluster import cli, console
from cluster.errors import ClusterError


def test_json_mode_keeps_standard_output_for_the_result(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.use_json(True)
    console.out("on the way")
    console.table("models", ("name",), [("tiny",)])
    console.result({"path": Path("a/b")})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"path": "a/b"}
    assert err == "on the way\nmodels:\n  name\n  tiny\n"


def test_without_json_the_result_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    console.use_json(False)
    console.out("told")
    console.result({"path": "a"})
    assert capsys.readouterr() == ("told\n", "")


def test_json_mode_answers_an_error_as_an_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(**_: object) -> None:
        console.use_json(True)
        raise ClusterError("the turntable is stuck; push")

    monkeypatch.setattr(cli, "plug_in", lambda app: None)
    monkeypatch.setattr(cli, "app", failing)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    told = {"type": "ClusterError", "message": "the turntable is stuck; push"}
    assert json.loads(capsys.readouterr().out) == {"error": told}


READ_ONLY = {
    "chat",
    "config check",
    "config schema",
    "data preview",
    "doctor",
    "jobs list",
    "jobs logs",
    "keys list",
    "lineage",
    "models list",
    "models show",
    "models verify",
    "monitor render",
    "release status",
    "shelf list",
    "status",
}
"""Verbs that change nothing, but for a file that they are told to write: nothing to rehearse."""


def verbs() -> dict[str, Any]:
    """Every verb of the installed command line, by its words, as a parsed command."""

    def below(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name, child in getattr(command, "commands", {}).items():
            yield from below(child, (*words, name))
        if not hasattr(command, "commands"):
            yield " ".join(words), command

    if "models" not in {group.name for group in cli.app.registered_groups}:
        cli.plug_in(cli.app)
    return dict(below(typer.main.get_command(cli.app), ()))


VERBS = verbs()


def options(verb: str) -> set[str]:
    return {text for param in VERBS[verb].params for text in param.opts}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_answers_in_json_and_rehearses_what_it_changes(verb: str) -> None:
    assert "--json" in options(verb)
    assert ("--dry-run" in options(verb)) == (verb not in READ_ONLY)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_says_what_it_does_in_one_line(verb: str) -> None:
    first = (VERBS[verb].help or "").splitlines()[0]
    assert first.endswith(".")
    assert all(param.help for param in VERBS[verb].params if param.opts[0] != "--help")
