"""A library behind a URL: fsspec's memory and a folder; what a bucket may do to us."""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster.errors import Conflict, Corrupt, LibraryError, NotEnough, UnknownModel
from cluster.library import disk, remote
from cluster.library.manifest import MANIFEST, Facts, FileEntry, Manifest
from cluster.library.mirror import pull, push
from cluster.library.ref import Ref
from cluster.library.remote import Remote
from cluster.library.store import Library, Version
from tests.unit.library_fixtures import model, run, safetensors


def quiet(_: str) -> None:
    pass


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/bucket/library"
        return
    place = f"/{uuid.uuid4().hex}"
    yield f"memory:/{place}"
    store = MemoryFileSystem()
    if store.exists(place):
        store.rm(place, recursive=True)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    library = Library(tmp_path / "here")
    for fill in range(3):
        library.publish("tiny", model(tmp_path / f"source{fill}", fill), Facts())
    return library


@pytest.fixture
def other(tmp_path: Path) -> Library:
    return Library(tmp_path / "there")


def pushed(library: Library, url: str, number: int = 2) -> Remote:
    push(library, library.get("tiny", number), Remote(url), quiet)
    return Remote(url)


def test_a_version_comes_back_the_same_under_its_own_number(
    library: Library, other: Library, url: str
) -> None:
    store = pushed(library, url)
    assert (store.names(), store.numbers("tiny")) == (["tiny"], [2])
    [copied] = pull(other, Ref.parse("tiny"), Remote(url), quiet)
    assert (copied.ref, copied.new) == ("tiny@2", True)
    theirs = other.verify("tiny@2")
    assert theirs.manifest == library.get("tiny", 2).manifest
    assert (theirs.path / MANIFEST).read_bytes() == (
        library.get("tiny", 2).path / MANIFEST
    ).read_bytes()
    [again] = pull(other, Ref.parse("tiny@2"), Remote(url), quiet)
    [once_more] = push(library, library.get("tiny", 2), store, quiet)
    assert (again.new, once_more.new) == (False, False)
    assert other.publish("tiny", theirs.path, Facts()).number == 3
    assert list((other.root / ".staging").iterdir()) == []


def test_what_is_removed_here_may_come_again_but_no_other_in_its_place(
    library: Library, other: Library, url: str
) -> None:
    pushed(library, url)
    library.remove("tiny@2")
    [copied] = pull(library, Ref.parse("tiny@2"), Remote(url), quiet)
    assert copied.new
    library.verify("tiny@2")
    source = library.get("tiny", 1).path
    for _ in range(2):
        other.publish("tiny", source, Facts())
    with pytest.raises(Conflict, match="tiny@2 is another version here"):
        pull(other, Ref.parse("tiny@2"), Remote(url), quiet)
    with pytest.raises(Conflict, match="tiny@2 is another version there"):
        push(other, other.get("tiny", 2), Remote(url), quiet)
    other.remove("tiny@2")
    with pytest.raises(Conflict, match="the number of another version, removed"):
        pull(other, Ref.parse("tiny@2"), Remote(url), quiet)


def test_an_adapter_travels_with_its_base(
    library: Library, other: Library, url: str, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(safetensors({"a": 2}))
    (folder / "adapter_config.json").write_text("{}")
    lora = library.publish("lora", folder, Facts(kind="adapter", base="tiny@1"))
    assert [c.ref for c in push(library, lora, Remote(url), quiet)] == ["tiny@1", "lora@1"]
    assert [c.ref for c in pull(other, Ref.parse("lora"), Remote(url), quiet)] == [
        "tiny@1",
        "lora@1",
    ]
    other.verify("lora@1")


def test_t34_an_alias_moves_by_compare_and_swap(library: Library, url: str) -> None:
    store = pushed(library, url, 1)
    pushed(library, url, 3)
    with pytest.raises(UnknownModel, match="tiny@champion: not in .* which has 1, 3"):
        store.resolve(Ref.parse("tiny@champion"))
    store.move_alias("tiny", "champion", 1, None, "ann")
    assert store.resolve(Ref.parse("tiny"))[0].version == 1
    with pytest.raises(Conflict, match="did not point to 3 any more"):
        store.move_alias("tiny", "champion", 3, 3, "eve")
    with pytest.raises(UnknownModel):
        store.move_alias("tiny", "champion", 2, 1, "eve")
    store.move_alias("tiny", "champion", 3, 1, "bob")
    state, moves = Remote(url).aliases("tiny")
    assert (state.aliases, moves) == ({"champion": 3}, 2)
    assert [(m.before, m.to, m.by) for m in state.history] == [(None, 1, "ann"), (1, 3, "bob")]


def test_t34_of_two_who_move_at_once_one_loses(
    library: Library, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rival = pushed(library, url), Remote(url)
    real = store._create

    def late(path: str, data: bytes) -> bool:
        rival.move_alias("tiny", "champion", 2, None, "rival")
        return real(path, data)

    monkeypatch.setattr(store, "_create", late)
    with pytest.raises(Conflict):
        store.move_alias("tiny", "champion", 2, None, "late")
    assert [move.by for move in Remote(url).aliases("tiny")[0].history] == ["rival"]


def test_t34_a_number_in_a_folder_is_taken_once(tmp_path: Path) -> None:
    store = Remote(f"file://{tmp_path}/bucket")
    won: list[int] = []
    ready = threading.Barrier(8)

    def take(who: int) -> None:
        ready.wait()
        if store._create("models/tiny/versions/1/claim", b"%d" % who * 4096):
            won.append(who)

    threads = [threading.Thread(target=take, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [who] = won
    folder = tmp_path / "bucket/models/tiny/versions/1"
    assert (folder / "claim").read_bytes() == b"%d" % who * 4096
    assert [path.name for path in folder.iterdir()] == ["claim"]


def test_t34_a_push_that_was_killed_is_invisible_and_can_be_repeated(
    library: Library, other: Library, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = library.get("tiny", 2)
    uploads = 0
    real = Remote._upload

    def dying(self: Remote, source: Path, path: str, entry: FileEntry) -> None:
        nonlocal uploads
        uploads += 1
        if uploads == 5:
            raise KeyboardInterrupt
        real(self, source, path, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "_upload", dying)
        with pytest.raises(KeyboardInterrupt):
            push(library, version, Remote(url), quiet)
    store = Remote(url)
    assert (store.names(), store.numbers("tiny")) == ([], [])
    with pytest.raises(UnknownModel, match="which has no version of it"):
        pull(other, Ref.parse("tiny@2"), store, quiet)
    [copied] = push(library, version, store, quiet)
    assert copied.new
    pull(other, Ref.parse("tiny@2"), store, quiet)
    other.verify("tiny@2")


def put(url: str, path: str, data: bytes) -> None:
    """Write over something behind a URL, as whoever owns the bucket can."""
    store = Remote(url)
    store._fs.pipe_file(store._path(path), data)


def forged(version: Version, **changes: Any) -> bytes:
    fields = json.loads(version.manifest.model_copy(update=changes).sealed().model_dump_json())
    return json.dumps(fields).encode()


def nothing_came(library: Library) -> None:
    assert library.names() == []
    staging = library.root / ".staging"
    assert not staging.exists() or list(staging.iterdir()) == []


WEIGHTS = "models/tiny/versions/2/model.safetensors"


@pytest.mark.parametrize("change", ["flipped", "longer", "shorter", "endless"])
def test_t37_what_differs_from_its_hash_or_size_is_refused(
    library: Library, other: Library, url: str, change: str
) -> None:
    pushed(library, url)
    good = (library.get("tiny", 2).path / "model.safetensors").read_bytes()
    wrong = {
        "flipped": good[:-1] + bytes([good[-1] ^ 1]),
        "longer": good + b"x",
        "shorter": good[:-1],
        "endless": good + bytes(50_000_000),
    }[change]
    put(url, WEIGHTS, wrong)
    with pytest.raises(Corrupt, match="model.safetensors of tiny@2 differs from its hash or size"):
        pull(other, Ref.parse("tiny@2"), Remote(url), quiet)
    nothing_came(other)


@pytest.mark.parametrize("name", ["../../x.json", "/etc/passwd", "a/b.json", "..", ".hidden"])
def test_t37_paths_that_lead_out_are_refused(
    library: Library, other: Library, url: str, name: str
) -> None:
    pushed(library, url)
    version = library.get("tiny", 2)
    fields = json.loads(forged(version))
    fields["files"][name] = fields["files"].pop("config.json")
    put(url, f"models/tiny/versions/2/{MANIFEST}", json.dumps(fields).encode())
    with pytest.raises(Corrupt, match="the manifest of tiny@2 is damaged"):
        pull(other, Ref.parse("tiny@2"), Remote(url), quiet)
    nothing_came(other)


@pytest.mark.parametrize("name", ["evil.py", "model.bin", "CONFIG.json", "manifest.json"])
def test_t37_a_file_that_no_import_would_take_is_refused(
    library: Library, other: Library, url: str, name: str
) -> None:
    pushed(library, url)
    version = library.get("tiny", 2)
    files = {**version.manifest.files, name: version.manifest.files["config.json"]}
    put(url, f"models/tiny/versions/2/{name}", (version.path / "config.json").read_bytes())
    put(url, f"models/tiny/versions/2/{MANIFEST}", forged(version, files=files))
    with pytest.raises(LibraryError):
        pull(other, Ref.parse("tiny@2"), Remote(url), quiet)
    nothing_came(other)


def test_t37_what_is_too_large_is_not_read(
    library: Library, other: Library, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed(library, url)
    monkeypatch.setattr(remote, "MAX_BYTES", 1000)
    with pytest.raises(Corrupt, match="more than 1000 bytes, which is refused"):
        pull(other, Ref.parse("tiny@2"), Remote(url), quiet)
    monkeypatch.undo()
    monkeypatch.setattr(disk, "SPARE_BYTES", 1 << 60)
    with pytest.raises(NotEnough, match="kept free"):
        pull(other, Ref.parse("tiny@2"), Remote(url), quiet)
    nothing_came(other)


def test_t37_another_versions_manifest_and_rings_of_bases_are_refused(
    library: Library, other: Library, url: str
) -> None:
    pushed(library, url)
    one, two = library.get("tiny", 1), library.get("tiny", 2)
    put(url, f"models/tiny/versions/2/{MANIFEST}", (one.path / MANIFEST).read_bytes())
    with pytest.raises(Corrupt, match="what lies as tiny@2 is tiny@1"):
        pull(other, Ref.parse("tiny@2"), Remote(url), quiet)
    ring = forged(two, kind="adapter", base="tiny@2")
    put(url, f"models/tiny/versions/2/{MANIFEST}", ring)
    with pytest.raises(Corrupt, match="stands on more than 8 adapters"):
        pull(other, Ref.parse("tiny@2"), Remote(url), quiet)
    Remote(url)._create("models/tiny/aliases/000000001.json", b"{")
    with pytest.raises(Corrupt, match="000000001.json is damaged; delete it"):
        pull(other, Ref.parse("tiny"), Remote(url), quiet)
    nothing_came(other)


def test_t35_what_is_trusted_here_must_be_signed_there(
    library: Library, other: Library, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    from tests.unit.test_library_signing import write_keys

    key = write_keys(ec.generate_private_key(ec.SECP256R1()), tmp_path, "ann")
    pushed(library, url, 1)
    library.sign(library.get("tiny", 2), key)
    pushed(library, url, 2)
    monkeypatch.setenv("ROUNDHOUSE_TRUSTED_KEYS", str(tmp_path / "public"))
    with pytest.raises(LibraryError, match="tiny@1: not signed"):
        pull(other, Ref.parse("tiny@1"), Remote(url), quiet)
    nothing_came(other)
    pull(other, Ref.parse("tiny@2"), Remote(url), quiet)
    assert other.resolve("tiny").number == 2


def test_t36_a_store_that_fails_at_any_call_leaves_what_was(
    library: Library, other: Library, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of the store fails once, in turn: a push is whole or is not there."""
    version = library.get("tiny", 2)
    for calls in range(200):
        left = calls

        def failing(self: Remote, path: str, real: Any = Remote._path) -> str:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError("the store is away")
            return str(real(self, path))

        with monkeypatch.context() as patch:
            patch.setattr(Remote, "_path", failing)
            try:
                push(library, version, Remote(url), quiet)
                break
            except (LibraryError, OSError):
                pass
        assert Remote(url).numbers("tiny") == []
    assert 10 < calls < 199
    pull(other, Ref.parse("tiny@2"), Remote(url), quiet)
    other.verify("tiny@2")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("bucket/library", "not a URL; write s3://"),
        ("nix://bucket", "Protocol not known: nix; use s3://"),
        ("s3://bucket/library", r"pip install 'roundhouse\[s3\]'"),
        ("gs://bucket/library", r"pip install 'roundhouse\[gcs\]'"),
    ],
)
def test_urls_that_cannot_be_used_say_why(
    url: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(LibraryError, match=told):
        Remote(url)


def test_a_store_that_cannot_create_once_is_not_written_to(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = pushed(library, f"file://{tmp_path}/bucket")
    monkeypatch.setattr(store, "protocol", "ftp")
    for act in (
        lambda: push(library, library.get("tiny", 1), store, quiet),
        lambda: store.move_alias("tiny", "champion", 2, None, "me"),
    ):
        with pytest.raises(LibraryError, match="can be read only: nothing promises that ftp://"):
            act()


def test_a_manifest_says_the_same_in_bytes_and_in_a_file(library: Library) -> None:
    version = library.get("tiny", 1)
    raw = (version.path / MANIFEST).read_bytes()
    assert isinstance(version.manifest, Manifest)
    assert remote.parse_manifest(raw) == version.manifest


def test_the_verbs_push_list_and_pull(url: str, tmp_path: Path) -> None:
    run("import", str(model(tmp_path / "source")), "--name", "tiny")
    assert "would push tiny@1" in run("push", "tiny", url, "--dry-run")
    assert "models in " in run("list", "--at", url)
    told = run("push", "tiny", url, "--alias", "champion")
    assert "pushed tiny@1" in told
    assert "tiny@champion points to tiny@1" in told
    assert "tiny@1 is there already" in run("push", "tiny", url, "--alias", "champion")
    assert "has tiny@1" in run("push", "tiny", url, "--dry-run")
    [listed] = json.loads(run("list", "--at", url, "--json"))["models"]
    assert (listed["ref"], listed["aliases"]) == ("tiny@1", ["champion"])
    shutil.rmtree(Library().root)
    assert "would pull tiny@1" in run("pull", "tiny@champion", url, "--dry-run")
    assert Library().names() == []
    assert "pulled tiny@1" in run("pull", "tiny@champion", url)
    assert json.loads(run("pull", "tiny", url, "--json"))["versions"][0]["new"] is False
    assert "tiny@1: 10 files" in run("verify", "tiny")
