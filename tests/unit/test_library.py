"""Publish, resolve, alias, verify, remove."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
from collections import namedtuple
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import (
    ConfigError,
    Conflict,
    Corrupt,
    LibraryError,
    NotEnough,
    UnknownModel,
)
from cluster.library import disk, layout, store
from cluster.library.garbage import collect
from cluster.library.manifest import MANIFEST, Facts, Lineage
from cluster.library.store import Library, Version
from tests.unit.library_fixtures import model

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model(tmp_path / "source")


def test_publish_resolve_and_what_the_manifest_knows(library: Library, source: Path) -> None:
    lineage = Lineage(run_id="r1", config_hash="c", data_hashes={"a.jsonl": "d"}, code_revision="x")
    facts = Facts(base="tiny@1", lineage=lineage, metrics={"loss": 0.1}, notes=("hi",))
    one = library.publish("tiny", source, Facts())
    two = library.publish("tiny", source, facts)
    assert (one.ref, two.ref) == ("tiny@1", "tiny@2")
    assert [version.ref for version in library.versions("tiny")] == ["tiny@1", "tiny@2"]
    assert library.resolve("tiny") == two == library.get("tiny", 2)
    assert library.names() == ["tiny"]
    manifest = Library(library.root).get("tiny", 2).manifest
    assert manifest.lineage == lineage
    assert manifest.metrics == {"loss": 0.1}
    assert (manifest.dtype, manifest.architecture.parameters) == ("float32", 7)
    assert (manifest.architecture.kv_heads, manifest.architecture.head_dim) == (1, 4)
    assert manifest.tokenizer
    assert manifest.chat_template
    assert len(manifest.files) == 10
    assert manifest.digest == one.manifest.digest
    assert (two.path / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_moved_files_are_gone_only_when_all_is_well(library: Library, source: Path) -> None:
    (source / "merges.txt").rename(source / "keep.log")
    library.publish("tiny", source, Facts(), move=True)
    assert [path.name for path in source.iterdir()] == ["keep.log"]
    assert library.verify("tiny").number == 1


def test_same_content_is_recognised(library: Library, source: Path, tmp_path: Path) -> None:
    assert library.same_content("tiny", source) is None
    library.publish("tiny", source, Facts())
    library.publish("tiny", model(tmp_path / "other", fill=1), Facts())
    same = library.same_content("tiny", source)
    assert same is not None
    assert same.number == 1


def test_unknown_names_what_exists_and_what_is_near(library: Library, source: Path) -> None:
    with pytest.raises(UnknownModel, match="the library is empty; add one with"):
        library.resolve("tiny")
    library.publish("tiny-llama", source, Facts())
    library.move_alias("tiny-llama", "champion", 1, None, "me")
    with pytest.raises(UnknownModel, match=r"did you mean tiny-llama\?"):
        library.resolve("tiny-lama")
    with pytest.raises(UnknownModel, match="has versions 1 and @champion -> 1"):
        library.resolve("tiny-llama@7")
    with pytest.raises(UnknownModel, match="no such version"):
        library.resolve("tiny-llama@canary")
    with pytest.raises(UnknownModel, match="a version of a running job"):
        library.resolve("tiny-llama@run.abc.7")


def test_bare_name_is_champion_else_newest(library: Library, source: Path) -> None:
    for _ in range(3):
        library.publish("tiny", source, Facts())
    assert library.resolve("tiny").number == 3
    library.move_alias("tiny", "champion", 2, None, "me")
    assert library.resolve("tiny").number == 2
    assert library.resolve("tiny@champion").number == 2


def test_alias_moves_by_compare_and_swap_and_keeps_its_history(
    library: Library, source: Path
) -> None:
    library.publish("tiny", source, Facts())
    library.publish("tiny", source, Facts())
    library.move_alias("tiny", "champion", 1, None, "ann")
    library.move_alias("tiny", "champion", 2, 1, "bob")
    with pytest.raises(Conflict, match="points to version 2, not to version 1 as expected"):
        library.move_alias("tiny", "champion", 2, 1, "eve")
    with pytest.raises(Conflict, match="points to nothing, not to version 1"):
        library.move_alias("tiny", "canary", 2, 1, "eve")
    with pytest.raises(UnknownModel):
        library.move_alias("tiny", "champion", 9, 2, "eve")
    with pytest.raises(ConfigError, match="alias 'Nope!'"):
        library.move_alias("tiny", "Nope!", 1, None, "eve")
    assert library.aliases("tiny") == {"champion": 2}
    history = library.alias_history("tiny")
    assert [(m.alias, m.before, m.to, m.by) for m in history] == [
        ("champion", None, 1, "ann"),
        ("champion", 1, 2, "bob"),
    ]


def test_what_is_no_model_among_the_models_is_left_out(library: Library, source: Path) -> None:
    library.publish("tiny", source, Facts())
    (library.root / "models/Lost + Found").mkdir()
    (library.root / "models/a file").write_text("x")
    assert library.names() == ["tiny"]
    assert collect(library) == []
    library.remove("tiny@1")


def test_damaged_aliases_are_told(library: Library, source: Path) -> None:
    library.publish("tiny", source, Facts())
    (library.root / "models/tiny/aliases.json").write_text('{"aliases": {"champion": -1}}')
    with pytest.raises(Corrupt, match="aliases.json: damaged"):
        library.resolve("tiny")


def test_removed_number_is_never_used_again(library: Library, source: Path) -> None:
    library.publish("tiny", source, Facts())
    library.publish("tiny", source, Facts())
    library.move_alias("tiny", "champion", 1, None, "me")
    with pytest.raises(LibraryError, match="@champion points to it; promote another"):
        library.remove("tiny@1")
    with pytest.raises(LibraryError, match="name the version to remove"):
        library.remove("tiny")
    library.remove("tiny@2")
    with pytest.raises(UnknownModel):
        library.get("tiny", 2)
    with pytest.raises(UnknownModel):
        library.remove("tiny@2")
    assert library.publish("tiny", source, Facts()).number == 3


def test_torn_publish_and_torn_removal_are_invisible(library: Library, source: Path) -> None:
    version = library.publish("tiny", source, Facts())
    library.publish("tiny", source, Facts())
    (version.path / MANIFEST).unlink()  # where a removal was killed
    (library.root / "models/tiny/versions/3").mkdir()  # where a publish was killed
    assert [v.number for v in library.versions("tiny")] == [2]
    with pytest.raises(UnknownModel):
        library.get("tiny", 3)
    assert library.publish("tiny", source, Facts()).number == 4
    assert list(version.path.iterdir()) == []


def _stage_and_die(root: str) -> None:
    with disk.staging(Path(root)) as place:
        (place / "half").write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_publish_left_is_removed_by_the_next(library: Library, source: Path) -> None:
    child = SPAWN.Process(target=_stage_and_die, args=(str(library.root),))
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    left = [path for path in (library.root / ".staging").iterdir() if path.is_dir()]
    assert len(left) == 1
    with disk.staging(library.root) as alive:
        library.publish("tiny", source, Facts())
        assert alive.is_dir()  # a living neighbour's is left alone
    assert list((library.root / ".staging").iterdir()) == []


def test_t34_an_alias_that_moves_while_it_is_looked_up_is_found(
    library: Library, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        library.publish("tiny", source, Facts())
    library.move_alias("tiny", "champion", 1, None, "me")
    real = Library.get

    def late(self: Library, name: str, number: int) -> Version:
        if number == 1 and library.aliases("tiny")["champion"] == 1:
            with monkeypatch.context() as patch:
                patch.setattr(Library, "get", real)
                library.move_alias("tiny", "champion", 2, 1, "somebody else")
                library.remove("tiny@1")
        return real(self, name, number)

    monkeypatch.setattr(Library, "get", late)
    assert library.resolve("tiny@champion").number == 2


def test_t34_a_version_removed_while_it_is_read_is_not_called_damaged(
    library: Library, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for act in (
        lambda version: library.verify(version),
        lambda version: library.export(version, tmp_path / "out"),
    ):
        version = library.publish("tiny", source, Facts())
        found = library.resolve(version.ref)
        with monkeypatch.context() as patch:
            patch.setattr(library, "resolve", lambda _, found=found: found)
            library.remove(version.ref)
            with pytest.raises(UnknownModel, match=f"{version.ref}: no such model"):
                act(version)


def test_t34_of_two_removals_one_says_that_there_was_nothing(
    library: Library, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.publish("tiny", source, Facts())
    real = disk.locked

    def slow(path: Path, what: str) -> AbstractContextManager[None]:
        monkeypatch.setattr(store, "locked", real)
        library.remove("tiny@1")  # while the other waits for the lock
        return real(path, what)

    monkeypatch.setattr(store, "locked", slow)
    with pytest.raises(UnknownModel):
        library.remove("tiny@1")


def test_rc07_what_others_were_made_with_is_not_removed(library: Library, source: Path) -> None:
    library.publish("tiny", source, Facts())
    library.publish("teacher", source, Facts())
    lineage = Lineage(run_id="r1", config_hash="c", models={"teacher": "teacher@1"})
    library.publish("student", source, Facts(base="tiny@1", lineage=lineage))
    with pytest.raises(LibraryError, match=r"tiny@1: student@1 \(base\) was made with it; remove"):
        library.remove("tiny@1")
    with pytest.raises(LibraryError, match=r"teacher@1: student@1 \(teacher\) was made with it"):
        library.remove("teacher@1")
    library.verify("tiny@1")
    library.remove("student@1")
    library.remove("teacher@1")
    library.remove("tiny@1")
    assert library.names() == []
    kept = library.removed("student", 1)
    assert kept is not None
    assert kept.lineage == lineage


def test_an_adapter_without_its_base_does_not_appear(library: Library, source: Path) -> None:
    facts = Facts(kind="adapter", base="tiny@1")
    with pytest.raises(UnknownModel, match="tiny@1: no such model"):
        library.publish("lora", source, facts)
    assert library.versions("lora") == []
    library.publish("tiny", source, Facts())
    assert library.publish("lora", source, facts).manifest.base == "tiny@1"


def test_t35_a_flipped_byte_is_found_in_every_file(library: Library, source: Path) -> None:
    version = library.publish("tiny", source, Facts())
    names = [*version.manifest.files, MANIFEST]
    assert len(names) == 11
    for name in names:
        path = version.path / name
        good = path.read_bytes()
        path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        with pytest.raises(Corrupt, match=name):
            library.verify("tiny@1")
        path.write_bytes(good)
    assert library.verify("tiny@1").number == 1


@settings(max_examples=40)
@given(at=st.integers(min_value=0), bit=st.integers(0, 7))
def test_t35_no_flip_in_a_manifest_changes_what_it_says(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int
) -> None:
    root = tmp_path_factory.mktemp("flip")
    library = Library(root / "library")
    version = library.publish("tiny", model(root / "source"), Facts(notes=("said",)))
    raw = bytearray((version.path / MANIFEST).read_bytes())
    raw[at % len(raw)] ^= 1 << bit
    (version.path / MANIFEST).write_bytes(raw)
    try:
        read = library.get("tiny", 1).manifest
    except Corrupt:
        read = version.manifest
    assert read == version.manifest  # only white space was hit
    shutil.rmtree(root)


def test_t35_extra_missing_and_foreign_files_are_named(
    library: Library, source: Path, tmp_path: Path
) -> None:
    one = library.publish("tiny", source, Facts())
    two = library.publish("tiny", model(tmp_path / "other", fill=1), Facts())
    (one.path / "extra.json").write_text("{}")
    (one.path / "merges.txt").unlink()
    with pytest.raises(Corrupt, match="merges.txt: No such file.*extra.json: not in the manifest"):
        library.verify("tiny@1")
    shutil.copy(one.path / MANIFEST, two.path / MANIFEST)
    with pytest.raises(Corrupt, match="is the manifest of tiny@1, not of tiny@2"):
        library.verify("tiny@2")


def test_t35_each_missing_file_and_each_kind_of_extra_is_named(
    library: Library, source: Path
) -> None:
    version = library.publish("tiny", source, Facts())
    for name in version.manifest.files:
        kept = (version.path / name).rename(source / "kept")
        with pytest.raises(Corrupt, match=f"{name}: No such file"):
            library.verify("tiny@1")
        (version.path / name).symlink_to(kept)
        with pytest.raises(Corrupt, match=f"{name}: is a link now"):
            library.verify("tiny@1")
        (version.path / name).unlink()
        kept.rename(version.path / name)
    library.verify("tiny@1")
    for extra in ("extra.json", ".hidden.py", "modeling.py", "model-2.safetensors"):
        (version.path / extra).write_text("{}")
        with pytest.raises(Corrupt, match=f"{extra}: not in the manifest"):
            library.verify("tiny@1")
        (version.path / extra).unlink()
    (version.path / "folder").mkdir()
    with pytest.raises(Corrupt, match="folder: not in the manifest"):
        library.verify("tiny@1")


BAD_NAMES = ["../x", "/etc", "a:..", "%2e%2e", "a\0b", "a" * 300, "Tiny", "CON", "", "a/b", "a\n"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_t17_bad_names_are_refused_everywhere(library: Library, source: Path, name: str) -> None:
    for act in (
        lambda: library.publish(name, source, Facts()),
        lambda: library.versions(name),
        lambda: library.get(name, 1),
        lambda: library.resolve(name),
        lambda: library.resolve(f"{name}@1"),
        lambda: library.aliases(name),
        lambda: library.move_alias(name, "champion", 1, None, "me"),
        lambda: library.remove(f"{name}@1"),
    ):
        with pytest.raises(ConfigError):
            act()
    assert not library.root.exists()


@pytest.mark.parametrize("alias", [*BAD_NAMES, "0", "1x", "a" * 33, "champion@2", "a.b"])
def test_t17_bad_aliases_are_refused(library: Library, source: Path, alias: str) -> None:
    library.publish("tiny", source, Facts())
    with pytest.raises(ConfigError):
        library.move_alias("tiny", alias, 1, None, "me")
    with pytest.raises(ConfigError):
        library.resolve(f"tiny@{alias}")
    assert library.aliases("tiny") == {}


@given(text=st.text(max_size=80) | st.from_regex(r"[a-z0-9./%\\:@-]{1,40}", fullmatch=True))
def test_t17_a_reference_never_leads_out_of_the_library(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    library = Library(tmp_path_factory.getbasetemp() / "none")
    with pytest.raises((ConfigError, UnknownModel)):
        library.resolve(text)
    try:
        home = library._home(text)
    except ConfigError:
        return
    assert home.resolve().parent == (library.root / "models").resolve()


def test_t17_a_manifest_cannot_name_a_file_outside(library: Library, source: Path) -> None:
    version = library.publish("tiny", source, Facts())
    path = version.path / MANIFEST
    fields = json.loads(path.read_text())
    fields["files"]["../../aliases.json"] = fields["files"].pop("config.json")
    path.write_text(json.dumps(fields))
    with pytest.raises(Corrupt, match="damaged"):
        library.get("tiny", 1)


@pytest.mark.parametrize("root", ["s3://bucket/library", "gs://x", "/home/me/s3:/bucket/library"])
def test_library_behind_a_url_is_refused(root: str) -> None:
    with pytest.raises(LibraryError, match="local or shared folder"):
        Library(root)


Usage = namedtuple("Usage", "total used free")


def test_t36_too_little_disk_is_told_before_anything_is_copied(
    library: Library, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1_000_000))
    with pytest.raises(NotEnough, match=r"0 MB wanted \(and 67 MB kept free\), 1 MB free"):
        library.publish("tiny", source, Facts())
    assert library.versions("tiny") == []


class Failing:
    """Passes ``calls`` system calls that write, then fails each with ``error``."""

    def __init__(self, patch: pytest.MonkeyPatch, calls: int, error: int) -> None:
        self.left = calls
        for name in ("write", "fsync", "rename", "replace", "link"):
            self._wrap(patch, name, getattr(os, name), error)

    def _wrap(self, patch: pytest.MonkeyPatch, name: str, real, error: int) -> None:
        def call(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                raise OSError(error, os.strerror(error))
            return real(*args, **kwargs)

        patch.setattr(os, name, call)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("move", [False, True], ids=["copy", "move"])
def test_t36_failure_at_every_write_of_a_publish_changes_nothing(
    library: Library, source: Path, code: int, move: bool
) -> None:
    library.publish("tiny", source, Facts())
    before = sorted(path.name for path in source.iterdir())
    kind = NotEnough if code == errno.ENOSPC else LibraryError
    for calls in range(200):
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, calls, code)
            try:
                library.publish("tiny", source, Facts(), move=move)
                break
            except kind:
                pass
        assert failing.left < 0
        # the rename is what counts: a directory that cannot be flushed after it is still there
        for version in library.versions("tiny"):
            library.verify(version.ref)
        assert sorted(path.name for path in source.iterdir()) == before
        assert list((library.root / ".staging").iterdir()) == []
    assert 20 < calls < 199
    assert library.versions("tiny")[-1].manifest.digest == library.get("tiny", 1).manifest.digest


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_t36_failed_removal_leaves_a_whole_version_or_none(
    library: Library, source: Path, code: int
) -> None:
    for calls in range(20):
        version = library.publish("tiny", source, Facts())
        with pytest.MonkeyPatch.context() as patch:
            Failing(patch, calls, code)
            try:
                library.remove(version.ref)
                break
            except (LibraryError, NotEnough):
                pass
        if version in library.versions("tiny"):
            library.verify(version.ref)
        else:
            collect(library)
            assert {path.name for path in version.path.iterdir()} == {layout.REMOVED}
    assert 1 < calls < 19


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_t36_failed_promotion_leaves_the_old_alias(
    library: Library, source: Path, code: int
) -> None:
    library.publish("tiny", source, Facts())
    library.publish("tiny", source, Facts())
    library.move_alias("tiny", "champion", 1, None, "me")
    for calls in range(3):  # write, fsync, replace
        with pytest.MonkeyPatch.context() as patch:
            Failing(patch, calls, code)
            with pytest.raises(NotEnough if code == errno.ENOSPC else LibraryError):
                library.move_alias("tiny", "champion", 2, 1, "me")
        assert library.aliases("tiny") == {"champion": 1}
    library.move_alias("tiny", "champion", 2, 1, "me")
    left = {path.name for path in (library.root / "models/tiny").iterdir()}
    assert left == {"versions", "aliases.json", ".lock"}


def test_a_lock_held_too_long_is_told(
    library: Library, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.publish("tiny", source, Facts())
    monkeypatch.setattr(disk, "LOCK_WAIT_S", 0.1)
    with (
        disk.locked(library.root / "models/tiny/.lock", "test"),
        pytest.raises(LibraryError, match="another process has held .*try again"),
    ):
        library.move_alias("tiny", "champion", 1, None, "me")


def test_export_copies_what_was_published(library: Library, source: Path, tmp_path: Path) -> None:
    version = library.publish("tiny", source, Facts())
    library.export(version, tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == (source / "config.json").read_bytes()
    assert not (tmp_path / "out" / MANIFEST).exists()
    with pytest.raises(LibraryError, match="something is there"):
        library.export(version, tmp_path / "out")
