"""What nobody can use is found, told and removed; what somebody needs is not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import ConfigError, LibraryError
from cluster.library import disk, garbage, layout
from cluster.library.garbage import collect, retire, unneeded
from cluster.library.manifest import MANIFEST, Facts, Lineage
from cluster.library.store import Library
from tests.unit.library_fixtures import model, run


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model(tmp_path / "source")


def files(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_size for p in root.rglob("*") if p.is_file()}


def _killed_in_staging(root: Path) -> None:
    child = os.fork()
    if child == 0:
        with disk.staging(root) as place:
            (place / "half").write_bytes(b"x" * 1000)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def damage(library: Library, source: Path) -> dict[str, int]:
    """Leave one of each thing that a killed process leaves; return where, and how big it is."""
    for _ in range(3):
        library.publish("tiny", source, Facts())
    library.move_alias("tiny", "champion", 3, None, "me")
    home = library.root / "models/tiny"
    (home / "versions/1" / MANIFEST).rename(home / "versions/1" / layout.REMOVED)
    (home / ".aliases.json.0123abcd").write_bytes(b"x" * 10)
    for number in (1, 2):
        (home / f"evaluations/{number}").mkdir(parents=True)
        (home / f"evaluations/{number}/a.json").write_text("{}")
        (home / f"evaluations/{number}/a.jsonl").write_text("{}")
    (home / "evaluations/2/b.jsonl").write_bytes(b"x" * 20)
    (home / "evaluations/2/.b.json.89abcdef").write_bytes(b"x" * 30)
    _killed_in_staging(library.root)
    lost = {
        "models/tiny/.aliases.json.0123abcd": 10,
        "models/tiny/evaluations/1": 4,
        "models/tiny/evaluations/2/b.jsonl": 20,
        "models/tiny/evaluations/2/.b.json.89abcdef": 30,
    }
    for path in (home / "versions/1").iterdir():
        if path.name != layout.REMOVED:
            lost[f"models/tiny/versions/1/{path.name}"] = path.stat().st_size
    return lost


def test_t34_gc_finds_every_orphan_and_a_dry_run_changes_nothing(
    library: Library, source: Path
) -> None:
    lost = damage(library, source)
    before = files(library.root)
    with disk.staging(library.root) as alive:  # it sweeps what is dead, as every publish does
        (alive / "files").mkdir()
        _killed_in_staging(library.root)
        before = files(library.root)
        rehearsed = collect(library, dry_run=True)
        assert files(library.root) == before
        done = collect(library)
        assert (alive / "files").is_dir()
    assert rehearsed == done
    [stage] = [one for one in done if one.what == "unfinished publish"]
    assert stage.size == 1000
    assert {one.where: one.size for one in done if one is not stage} == lost
    assert collect(library) == []
    assert [version.number for version in library.versions("tiny")] == [2, 3]
    library.verify("tiny")
    assert set(before) - set(files(library.root)) >= {p for p in lost if "evaluations/1" not in p}
    assert library.publish("tiny", source, Facts()).number == 4


def test_t34_gc_looks_at_evaluations_while_no_version_can_be_removed(
    library: Library, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(library, source)
    monkeypatch.setattr(disk, "LOCK_WAIT_S", 0.05)
    real, refused = garbage._in_evaluations, []

    def meanwhile(home: Path, place: Path) -> Iterator[tuple[str, Path]]:
        with pytest.raises(LibraryError, match="another process has held") as error:
            library.remove("tiny@2")
        refused.append(error)
        yield from real(home, place)

    monkeypatch.setattr(garbage, "_in_evaluations", meanwhile)
    collect(library)
    assert len(refused) == 2


def test_gc_leaves_what_somebody_begins_to_write_into_again(
    library: Library, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(library, source)
    place = library.root / "models/tiny/evaluations/1"

    real = shutil.rmtree

    def busy(path: Path) -> None:
        if path == place:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(garbage.shutil, "rmtree", busy)
        assert "models/tiny/evaluations/1" not in {one.where for one in collect(library)}
    assert [one.where for one in collect(library)] == ["models/tiny/evaluations/1"]
    assert not place.exists()


def test_an_empty_library_has_no_garbage_and_is_not_made(library: Library) -> None:
    assert collect(library) == []
    assert not library.root.exists()


@pytest.fixture
def family(library: Library, source: Path) -> Library:
    """Seven versions of tiny, some needed; a lora on one of them, a student of another."""
    for _ in range(7):
        library.publish("tiny", source, Facts())
    library.move_alias("tiny", "champion", 1, None, "me")
    library.move_alias("tiny", "champion", 2, 1, "me")
    library.publish("lora", source, Facts(kind="adapter", base="tiny@3"))
    lineage = Lineage(run_id="r", config_hash="c", models={"teacher": "tiny@4"})
    library.publish("student", source, Facts(base="lora@1", lineage=lineage))
    return library


def test_versions_that_nobody_needs_are_old_unnamed_and_unpromoted(family: Library) -> None:
    assert [v.ref for v in unneeded(family, keep=1)] == ["tiny@5", "tiny@6"]
    assert [v.ref for v in unneeded(family, keep=2)] == ["tiny@5"]
    assert unneeded(family, keep=3) == []


def test_referrers_go_before_what_they_name(family: Library) -> None:
    order = [v.ref for v in unneeded(family, keep=0)]
    assert set(order) == {"tiny@3", "tiny@4", "tiny@5", "tiny@6", "tiny@7", "lora@1", "student@1"}
    assert order.index("student@1") < order.index("lora@1") < order.index("tiny@3")
    assert order.index("student@1") < order.index("tiny@4")
    gone, stayed = retire(family, unneeded(family, keep=0))
    assert (len(gone), stayed) == (7, [])
    assert [v.ref for v in family.versions("tiny")] == ["tiny@1", "tiny@2"]


def test_what_somebody_has_begun_to_need_stays_and_says_why(family: Library) -> None:
    old = unneeded(family, keep=1)
    family.move_alias("tiny", "canary", 5, None, "somebody else")
    gone, [stayed] = retire(family, old)
    assert [one.where for one in gone] == ["tiny@6"]
    assert "tiny@5: @canary points to it" in stayed


def test_the_verb_says_what_and_how_many_bytes(library: Library, source: Path) -> None:
    lost = damage(library, source)
    told = json.loads(run("gc", "--dry-run", "--json"))
    assert (told["dry_run"], told["bytes"]) == (True, sum(lost.values()) + 1000)
    assert "unfinished write" in run("gc", "--dry-run")
    assert f"({len(lost) + 1} things)" in run("gc")
    assert "freed 0.0 kB (0 things)" in run("gc")


def test_the_verb_removes_versions_only_when_told(family: Library) -> None:
    with pytest.raises(ConfigError, match=r"would remove 2 versions: tiny@5, tiny@6; .* --yes"):
        run("gc", "--keep", "1")
    assert "old version" in run("gc", "--keep", "1", "--dry-run")
    assert len(family.versions("tiny")) == 7
    told = json.loads(run("gc", "--keep", "1", "--yes", "--json"))
    assert [one["where"] for one in told["removed"]] == ["tiny@5", "tiny@6"]
    assert len(family.versions("tiny")) == 5


def test_rc07_rm_rehearsed_refuses_as_it_would(family: Library) -> None:
    for more in ("--dry-run", "--yes"):
        with pytest.raises(LibraryError, match=r"tiny@3: lora@1 \(base\) was made with it"):
            run("rm", "tiny@3", more)
