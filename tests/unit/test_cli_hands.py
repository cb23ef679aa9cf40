"""At the keyboard: completion, wrong words, and configurations that an editor can check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cluster import cli, options
from cluster.config_cli import SCHEMAS

HEAVY = {"ray", "torch", "transformers", "deepspeed", "fastapi", "requests", "psutil"}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "roundhouse" / "library" / "models"
    for name, numbers in {"small": (1,), "tiny": (1, 2, 10)}.items():
        for number in numbers:
            (root / name / "versions" / str(number)).mkdir(parents=True)
            (root / name / "versions" / str(number) / "manifest.json").touch()
    (root / "tiny/versions/2/manifest.json").unlink()  # a number whose version was removed
    (root / "tiny/aliases.json").write_text('{"aliases": {"champion": 1}}')
    return root


def test_references_complete_from_the_library(library: Path) -> None:
    assert options.complete_ref("") == ["small", "tiny"]
    assert options.complete_ref("ti") == ["tiny", "tiny@1", "tiny@10", "tiny@champion"]
    assert options.complete_ref("tiny@1") == ["tiny@1", "tiny@10"]
    assert options.complete_version("tiny@") == ["tiny@1", "tiny@10"]
    assert options.complete_ref("no") == []


def test_a_damaged_alias_file_costs_only_its_aliases(library: Path) -> None:
    (library / "tiny/aliases.json").write_text("{")
    assert options.complete_ref("tiny@") == ["tiny@1", "tiny@10"]


def test_the_tab_key_reaches_the_verbs_and_loads_nothing_heavy(library: Path) -> None:
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from cluster.cli import main; main()"
    )
    words = {
        "_ROUNDHOUSE_COMPLETE": "complete_bash",
        "COMP_WORDS": "roundhouse models show ti",
        "COMP_CWORD": "3",
    }
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | words,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout.split() == ["tiny", "tiny@1", "tiny@10", "tiny@champion"]
    assert HEAVY.isdisjoint(ran.stderr.split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["models", "shwo"], "no such command 'shwo'; did you mean 'show'; see `roundhouse models"),
        (["bogus"], "no such command 'bogus'; there are attach, chat, "),
        (["deploy"], "missing argument 'CONFIG'; see `roundhouse deploy --help`"),
        (["up", "--prot", "3"], "no such option: --prot (Possible options: --port); see"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_wrong_usage_names_the_word_and_the_next_step(
    words: list[str],
    told: str,
    as_json: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["roundhouse", *words, *(["--json"] if as_json else [])])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    if as_json:
        error = json.loads(out)["error"]
        assert error["type"] == "UsageError"
        assert error["message"].startswith(told)
    else:
        assert err.startswith(f"error: {told}")
        assert out == ""


def test_a_home_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROUNDHOUSE_HOME", "/dev/null/home")
    monkeypatch.setattr(sys, "argv", ["roundhouse", "keys", "add", "ci"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code == 1
    assert told.startswith("error: /dev/null/home/keys: Not a directory; models, runs and keys")
    assert "set ROUNDHOUSE_HOME" in told


def test_an_error_of_our_own_making_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(**_: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/somewhere/else")

    monkeypatch.setattr(cli, "plug_in", lambda app: None)
    monkeypatch.setattr(cli, "app", failing)
    with pytest.raises(FileNotFoundError):
        cli.main()


def config(*words: str) -> dict[str, object]:
    ran = CliRunner().invoke(cli.app, ["config", *words, "--json"])
    if ran.exception:
        raise ran.exception
    found = json.loads(ran.stdout)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("kind", sorted(SCHEMAS))
def test_every_kind_of_file_has_a_schema(kind: str) -> None:
    assert config("schema", kind)["additionalProperties"] is False


def test_check_reads_a_file_by_its_folder_or_as_told(tmp_path: Path) -> None:
    (tmp_path / "serve").mkdir()
    path = tmp_path / "serve" / "mine.yaml"
    path.write_text("models:\n  - model: tiny\n")
    assert config("check", str(path))["kind"] == "serve"
    other = path.rename(tmp_path / "mine.yaml")
    assert config("check", str(other), "--kind", "serve")["ok"] is True
    with pytest.raises(cli.RoundhouseError, match="none of .*serve, train; say which"):
        config("check", str(other))


@pytest.mark.parametrize(
    "words", [["keys", "add", "ci"], ["keys", "revoke", "ci"], ["up"], ["down"]]
)
def test_a_rehearsal_changes_nothing(words: list[str], tmp_path: Path) -> None:
    runner = CliRunner()
    if "revoke" in words:
        runner.invoke(cli.app, ["keys", "add", "ci"])
    home = tmp_path / "roundhouse"
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    ran = runner.invoke(cli.app, [*words, "--dry-run", "--json"])
    assert json.loads(ran.stdout)["dry_run"] is True
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before


def test_a_package_that_fails_while_it_registers_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from importlib.metadata import EntryPoint

    cli.plug_in(typer.Typer(), [EntryPoint("half", f"{__name__}:register_badly", cli.GROUP)])
    assert "the verbs of" in capsys.readouterr().err


def register_badly(app: typer.Typer) -> None:
    raise ImportError("half written")
