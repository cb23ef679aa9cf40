"""What the command line prints, and where: an answer for people, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import cli, console
from cluster.errors import ClusterError


@pytest.fixture(autouse=True)
def _text_again() -> Iterator[None]:
    yield
    console.use_json(False)


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
