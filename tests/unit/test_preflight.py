"""The question before the install: one line when it cannot work, on any Python that can ask."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import preflight
from cluster.preflight import GIB, Facts

ROOT = Path(__file__).resolve().parents[2]
GOOD = Facts((3, 11), "python3", 16 * GIB, 50 * GIB, "/src", False, 2, False)


def test_a_good_machine_hears_what_it_will_take() -> None:
    assert preflight.problem(GOOD) is None
    text = "\n".join(preflight.announcement(GOOD))
    for part in ("6.0 GiB of 50.0 free", "3.0 GiB for .venv", "12 GiB of 16.0", "2 cores", "fp32"):
        assert part in text
    fast = "\n".join(preflight.announcement(GOOD._replace(fast_bf16=True, installed=True)))
    assert "fast bf16  yes" in fast
    assert "4 to 8 minutes" in fast
    assert "installed already" in fast


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"python": (3, 8)}, "Python 3.11 or 3.12 is needed, python3 is 3.8"),
        ({"python": (3, 13)}, "is 3.13"),
        ({"memory_bytes": 4 * GIB}, "12 GiB of memory are needed"),
        ({"disk_free_bytes": 2 * GIB}, "6.0 GiB of disk are needed, /src has 2.0 free"),
        ({"disk_free_bytes": 2 * GIB, "installed": True}, "3.0 GiB of disk are needed"),
    ],
)
def test_what_is_missing_is_one_line_with_a_way_out(change: dict[str, object], says: str) -> None:
    line = preflight.problem(GOOD._replace(**change))  # type: ignore[arg-type]
    assert line is not None
    assert says in line
    assert "\n" not in line
    assert ";" in line


def test_it_parses_on_old_pythons_and_imports_only_the_standard_library() -> None:
    tree = ast.parse(Path(preflight.__file__).read_text(), feature_version=(3, 8))
    imported = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {
        a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    }
    assert imported <= sys.stdlib_module_names
    assert (
        ast.parse((ROOT / "cluster" / "__init__.py").read_text(), feature_version=(3, 8)).body[1:]
        == []
    )


def test_it_runs_without_any_installed_package() -> None:
    ran = subprocess.run(
        [sys.executable, "-S", "-m", "cluster.preflight"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (ran.returncode == 0) == (not ran.stderr), ran.stderr
    assert len(ran.stderr.splitlines()) <= 1


def test_main_exits_one_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "look", lambda root: GOOD._replace(memory_bytes=GIB))
    assert preflight.main() == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: 12 GiB of memory")
