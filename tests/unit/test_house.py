"""The walls of the house: which way imports point, what is weightless, what travels."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import cluster.errors
from cluster.errors import RankLost, RequestError, RoundhouseError

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {"cluster": set(), "serve_apps": {"cluster"}, "train_jobs": {"cluster"}}
SOURCES = sorted(path for home in MAY_IMPORT for path in (ROOT / home).rglob("*.py"))
HEAVY = {"ray", "torch", "deepspeed", "transformers", "fastapi", "datasets"}


def ids(path: object) -> str:
    return str(path.relative_to(ROOT)) if isinstance(path, Path) else str(path)


def imported(path: Path) -> set[str]:
    """The first word of every import in a file, also of those inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_imports_follow_the_arrows(path: Path) -> None:
    home = path.relative_to(ROOT).parts[0]
    assert imported(path) & {*MAY_IMPORT, "tests", "benchmarks"} <= {home, *MAY_IMPORT[home]}


@pytest.mark.parametrize(
    "package", [d for home in MAY_IMPORT for d in (ROOT / home).rglob("__init__.py")], ids=ids
)
def test_package_files_hold_one_docstring(package: Path) -> None:
    body = ast.parse(package.read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)


@pytest.mark.parametrize("home", [*MAY_IMPORT, "tests"])
def test_every_package_folder_has_an_init(home: str) -> None:
    # a directory without one loses to an installed package of the same name
    folders = {path.parent for path in (ROOT / home).rglob("*.py")}
    assert [d for d in folders if not (d / "__init__.py").is_file()] == []


def modules_after(statement: str) -> set[str]:
    probe = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "modules",
    [
        "cluster.config, serve_apps.config, train_jobs.config, cluster.library.ref",
        "cluster.cli, serve_apps.cli, train_jobs.cli, cluster.library.cli",
        "serve_apps.engine.interface, serve_apps.engine.scheduler",
        "train_jobs.finetune",
    ],
)
def test_weightless(modules: str) -> None:
    assert modules_after(f"import {modules}").isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "modules", ["train_jobs.launch", "serve_apps.replica", "serve_apps.engine.sharded"]
)
def test_fronts_and_drivers_never_load_torch(modules: str) -> None:
    assert modules_after(f"import {modules}").isdisjoint({"torch", "deepspeed", "transformers"})


def loader_calls(path: Path) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
    ]


def test_T16_every_load_refuses_remote_code() -> None:
    calls = [(path, call) for path in SOURCES for call in loader_calls(path)]
    assert len(calls) >= 2, "the rule must have something to look at"
    for path, call in calls:
        given = {word.arg: word.value for word in call.keywords}
        trust = given.get("trust_remote_code")
        assert isinstance(trust, ast.Constant), f"{ids(path)}:{call.lineno}"
        assert trust.value is False, f"{ids(path)}:{call.lineno}"


def test_TC26_every_model_load_names_its_dtype() -> None:
    calls = [
        (path, call)
        for path in SOURCES
        for call in loader_calls(path)
        if "model" in ast.unparse(call.func).lower()
    ]
    assert calls, "the rule must have something to look at"
    for path, call in calls:
        assert "dtype" in {word.arg for word in call.keywords}, f"{ids(path)}:{call.lineno}"


def test_TC35_nothing_trains_through_the_trainer_that_drops_deepspeed_on_a_cpu() -> None:
    """On a CPU accelerate ignores a DeepSpeed configuration without a word."""
    imported = [
        (path, name.name)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").split(".")[0] in {"transformers", "accelerate", "trl"}
        for name in node.names
    ]
    assert imported, "the rule must have something to look at"
    assert [one for one in imported if "Trainer" in one[1] or one[1] == "Accelerator"] == []


def classes() -> list[type[RoundhouseError]]:
    return [
        value
        for value in vars(cluster.errors).values()
        if isinstance(value, type) and issubclass(value, RoundhouseError)
    ]


SAMPLES = {
    RequestError: RequestError("too long", 400, "context_length_exceeded", "messages", 3),
    RankLost: RankLost(1, "tiny@3", "stopped answering"),
}


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_errors_survive_the_journey(kind: type[RoundhouseError]) -> None:
    error = SAMPLES.get(kind) or kind("what, the rule, the next step")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_no_security_check_is_an_assert() -> None:
    """The packages that face a request or a file hold no bare assert about its input."""
    for path in (ROOT / "serve_apps/gateway").rglob("*.py"):
        asserts = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
        assert asserts == [], ids(path)
