"""The command line: quick to start, one line for an error, its verbs from three packages."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cluster import cli, console
from cluster.errors import ClusterError

HEAVY = {"ray", "torch", "transformers", "deepspeed", "fastapi", "requests", "psutil", "pydantic"}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUNDHOUSE_HOME", str(tmp_path / "home"))


def run(*args: str, code: str = "from cluster.cli import main; main()") -> tuple[int, str, str]:
    ran = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60
    )
    return ran.returncode, ran.stdout, ran.stderr


def test_parsing_imports_nothing_heavy() -> None:
    probe = "import sys, cluster.cli; print(*sys.modules)"
    _, out, _ = run(code=probe)
    assert HEAVY.isdisjoint(out.split())


def test_an_error_is_one_line_and_exit_one() -> None:
    status, out, err = run("status")
    assert (status, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: no cluster runs for ")
    assert last.endswith("run `roundhouse up`")
    assert "Traceback" not in err


def test_ctrl_c_is_130_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "plug_in", lambda app: None)
    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_down_without_a_cluster_is_harmless() -> None:
    result = CliRunner().invoke(cli.app, ["down"])
    assert (result.exit_code, result.output.strip()) == (0, "nothing was running")


def test_keys_from_making_to_revoking() -> None:
    runner = CliRunner()
    made = json.loads(runner.invoke(cli.app, ["keys", "add", "ci", "--json"]).stdout)
    (listed,) = json.loads(runner.invoke(cli.app, ["keys", "list", "--json"]).stdout)["keys"]
    assert made["key"] not in json.dumps(listed)
    assert listed["last4"] == made["key"][-4:]
    assert listed["id"] in runner.invoke(cli.app, ["keys", "list"]).output
    assert "revoked" in runner.invoke(cli.app, ["keys", "revoke", listed["id"]]).output
    assert json.loads(runner.invoke(cli.app, ["keys", "list", "--json"]).stdout)["keys"] == []


def test_doctor_names_a_fix_for_each_failure() -> None:
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    checks = json.loads(result.stdout)["checks"]
    assert {"Python", "packages", "memory", "disk", "cluster", "ports"} & {
        c["what"] for c in checks
    }
    assert all((check["state"] == "fail") == bool(check["fix"]) for check in checks)


def test_a_package_brings_its_verbs_and_a_broken_one_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    app = typer.Typer()
    entries = [
        EntryPoint("broken", "no_such_module_here:register", cli.GROUP),
        EntryPoint("lacking", "cluster.console:no_such_name", cli.GROUP),
        EntryPoint("good", f"{__name__}:register", cli.GROUP),
    ]
    cli.plug_in(app, entries)
    assert CliRunner().invoke(app, []).output == "hello\n"
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: the verbs of no_such_module_here are missing")
    assert "no_such_name" in second


def register(app: typer.Typer) -> None:
    @app.command()
    def hello() -> None:
        console.out("hello")


def test_plain_tables_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("models", ("name", "version"), [("tiny[red]", 3), ("b", None)])
    console.table("jobs", ("id",), [])
    assert capsys.readouterr().out == (
        "models:\n  name       version\n  tiny[red]  3\n  b          -\njobs: none\n"
    )


def test_version() -> None:
    assert CliRunner().invoke(cli.app, ["--version"]).output.startswith("roundhouse 0.")


def test_main_prints_a_roundhouse_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(**_: object) -> None:
        raise ClusterError("the turntable is stuck; push")

    monkeypatch.setattr(cli, "plug_in", lambda app: None)
    monkeypatch.setattr(cli, "app", failing)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: the turntable is stuck; push\n"
