"""Signatures: who signed a version, and that it is that version and no other."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from cluster.errors import Conflict, Corrupt, LibraryError
from cluster.library import signatures
from cluster.library.garbage import collect
from cluster.library.manifest import MANIFEST, Facts
from cluster.library.store import Library
from tests.unit.library_fixtures import model, run

PEM = serialization.Encoding.PEM


def write_keys(private: object, place: Path, name: str) -> Path:
    """Write a key pair, ``name.pem`` and ``public/name.pem``; return the private one."""
    (place / "public").mkdir(exist_ok=True)
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = place / f"{name}.pem"
    path.write_bytes(private.private_bytes(PEM, form, plain))  # type: ignore[attr-defined]
    public = private.public_key()  # type: ignore[attr-defined]
    told = public.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (place / "public" / f"{name}.pem").write_bytes(told)
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return write_keys(ec.generate_private_key(ec.SECP256R1()), tmp_path, "ann")


@pytest.fixture
def public(key: Path) -> Path:
    return key.parent / "public" / key.name


@pytest.fixture
def library(tmp_path: Path) -> Library:
    library = Library()
    for fill in range(2):
        library.publish("tiny", model(tmp_path / f"source{fill}", fill), Facts())
    return library


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_t35_a_signature_names_every_file_and_its_signer(
    library: Library, tmp_path: Path, curve: ec.EllipticCurve
) -> None:
    key = write_keys(ec.generate_private_key(curve), tmp_path, "ann")
    version = library.get("tiny", 1)
    path = library.sign(version, key)
    public = tmp_path / "public" / "ann.pem"
    assert signatures.check(version, library.root, [public]) == public
    payload = json.loads(base64.b64decode(json.loads(path.read_text())["dsseEnvelope"]["payload"]))
    names = [one["name"] for one in payload["predicate"]["resources"]]
    assert names == sorted([*version.manifest.files, MANIFEST])
    assert library.verify("tiny@1").number == 1  # it lies beside, not among the files


def test_t35_another_key_and_no_signature_are_told(
    library: Library, key: Path, public: Path, tmp_path: Path
) -> None:
    version = library.get("tiny", 1)
    with pytest.raises(LibraryError, match="tiny@1: not signed; `roundhouse models sign tiny@1"):
        signatures.check(version, library.root, [public])
    eve = write_keys(ec.generate_private_key(ec.SECP256R1()), tmp_path, "eve")
    library.sign(version, eve)
    with pytest.raises(LibraryError, match="made by none of the keys given"):
        signatures.check(version, library.root, [public])
    library.sign(version, key)  # in place of the other
    assert signatures.check(version, library.root, [public]) == public


def test_t35_the_signature_of_another_version_names_what_differs(
    library: Library, key: Path, public: Path
) -> None:
    one, two = library.get("tiny", 1), library.get("tiny", 2)
    shutil.copy(library.sign(one, key), signatures.path_of(library.root, "tiny", 2))
    told = "signature of 'tiny@1' over other files: manifest.json, model.safetensors;"
    with pytest.raises(Corrupt, match=told):
        signatures.check(two, library.root, [public])


def test_t35_the_same_files_as_another_number_are_another_version(
    library: Library, key: Path, public: Path, tmp_path: Path
) -> None:
    library.publish("tiny", tmp_path / "source0", Facts())  # as tiny@1, but by another manifest
    signed = library.sign(library.get("tiny", 1), key)
    shutil.copy(signed, signatures.path_of(library.root, "tiny", 3))
    with pytest.raises(Corrupt, match="over other files: manifest.json;"):
        signatures.check(library.get("tiny", 3), library.root, [public])


def test_t35_a_byte_of_a_signature_or_of_what_it_is_over_ends_it(
    library: Library, key: Path, public: Path
) -> None:
    version = library.get("tiny", 1)
    path = library.sign(version, key)
    good = path.read_bytes()
    bundle = json.loads(good)
    envelope = bundle["dsseEnvelope"]
    payload = bytearray(base64.b64decode(envelope["payload"]))
    payload[len(payload) // 2] ^= 1
    for field in ("payload", "sig"):
        wrong = json.loads(good)
        if field == "payload":
            wrong["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
        else:
            raw = bytearray(base64.b64decode(envelope["signatures"][0]["sig"]))
            raw[-1] ^= 1
            wrong["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(raw).decode()
        path.write_text(json.dumps(wrong))
        with pytest.raises(LibraryError, match="made by none of the keys given"):
            signatures.check(version, library.root, [public])
    for text in ("", "{}", "[]", "[" * 100_000, '{"dsseEnvelope": {"payloadType": "x"}}'):
        path.write_text(text)
        with pytest.raises(Corrupt, match=r"1\.sig: not a signature"):
            signatures.check(version, library.root, [public])


def test_t35_where_keys_are_trusted_only_what_they_signed_is_given_out(
    library: Library, key: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUNDHOUSE_TRUSTED_KEYS", str(public.parent))
    for act in (
        lambda: library.resolve("tiny"),
        lambda: library.resolve("tiny@2"),
        lambda: library.get("tiny", 2),
        lambda: library.verify("tiny@2"),
        lambda: library.move_alias("tiny", "champion", 2, None, "me"),
    ):
        with pytest.raises(LibraryError, match="tiny@2: not signed"):
            act()
    keeper = Library(trusting=True)
    keeper.sign(keeper.get("tiny", 2), key)
    assert library.resolve("tiny").number == 2
    monkeypatch.setenv("ROUNDHOUSE_TRUSTED_KEYS", str(public.parent / "none"))
    with pytest.raises(LibraryError, match=r"none: holds no \*.pem, so no version is trusted"):
        library.resolve("tiny")


def test_t35_the_folder_beside_the_keys_is_asked_when_there_is_one(
    library: Library, public: Path
) -> None:
    library.resolve("tiny")
    folder = library.root.parent / "keys" / "trusted"
    folder.mkdir(parents=True)
    with pytest.raises(LibraryError, match="no version is trusted"):
        library.resolve("tiny")
    shutil.copy(public, folder)
    with pytest.raises(LibraryError, match="not signed"):
        library.resolve("tiny")


def test_t35_an_old_signed_version_comes_back_only_by_a_move_that_is_written_down(
    library: Library, key: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        library.sign(library.get("tiny", number), key)
    monkeypatch.setenv("ROUNDHOUSE_TRUSTED_KEYS", str(public.parent))
    library.move_alias("tiny", "champion", 2, None, "ann")
    with pytest.raises(Conflict):
        library.move_alias("tiny", "champion", 1, None, "eve")
    old, new = (library.get("tiny", number).path for number in (1, 2))
    shutil.rmtree(new)
    shutil.copytree(old, new)  # without a move: the old files where the new ones were
    with pytest.raises(Corrupt, match="is the manifest of tiny@1, not of tiny@2"):
        library.resolve("tiny@champion")
    assert [move.by for move in library.alias_history("tiny")] == ["ann"]


def test_keys_that_cannot_sign_are_told(library: Library, tmp_path: Path, public: Path) -> None:
    version = library.get("tiny", 1)
    write_keys(rsa.generate_private_key(65537, 1024), tmp_path, "rsa")
    write_keys(ec.generate_private_key(ec.SECP256K1()), tmp_path, "k1")
    for name, told in {
        "none.pem": "No such file.*openssl ecparam",
        "source0/config.json": "not a private key as PEM",
        "public/ann.pem": "not a private key as PEM",
        "rsa.pem": "P-256, P-384 or P-521",
        "k1.pem": "P-256, P-384 or P-521",
    }.items():
        with pytest.raises(LibraryError, match=told):
            library.sign(version, tmp_path / name)
    for name in ("none.pem", "ann.pem", "public/rsa.pem", "public/k1.pem"):
        with pytest.raises(LibraryError, match="openssl ec"):
            signatures.public_key(tmp_path / name)
    assert not signatures.path_of(library.root, "tiny", 1).exists()


def test_without_the_package_the_verbs_say_what_to_install(
    library: Library, key: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.sign(library.get("tiny", 1), key)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for act in (
        lambda: library.sign(library.get("tiny", 1), key),
        lambda: signatures.check(library.get("tiny", 1), library.root, [public]),
    ):
        with pytest.raises(LibraryError, match=r"pip install 'roundhouse\[signing\]'"):
            act()


def test_what_is_damaged_is_not_signed_and_a_signature_goes_with_its_version(
    library: Library, key: Path
) -> None:
    version = library.get("tiny", 1)
    (version.path / "merges.txt").write_text("changed")
    with pytest.raises(Corrupt, match="merges.txt"):
        library.sign(version, key)
    path = library.sign(library.get("tiny", 2), key)
    library.remove("tiny@2")
    assert not path.exists()
    path.write_text("{}")  # where a removal was killed
    assert [one.where for one in collect(library)] == ["models/tiny/signatures/2.sig"]
    assert collect(library) == []


def test_the_verbs_sign_and_verify(library: Library, key: Path, public: Path) -> None:
    assert "would verify tiny@1, sign it" in run("sign", "tiny@1", "--key", str(key), "--dry-run")
    assert "signed" not in run("verify", "tiny@1")
    assert "signed tiny@1: " in run("sign", "tiny@1", "--key", str(key))
    assert "a signature, to check with --public-key" in run("verify", "tiny@1")
    assert "signed by ann.pem" in run("verify", "tiny@1", "--public-key", str(public))
    assert "1.sig" in run("show", "tiny@1")
    folder = library.root.parent / "keys" / "trusted"
    shutil.copytree(public.parent, folder)
    assert json.loads(run("verify", "tiny@1", "--json"))["signed_by"].endswith("ann.pem")
    with pytest.raises(LibraryError, match="tiny@2: not signed"):
        run("verify", "tiny@2")
    assert "tiny@2" in run("list")
    assert "removed tiny@2" in run("rm", "tiny@2", "--yes")


def test_model_signing_itself_agrees(library: Library, key: Path, public: Path) -> None:
    pytest.importorskip("model_signing", exc_type=ImportError)
    version = library.get("tiny", 1)
    ours = library.sign(version, key)
    tool = [sys.executable, "-m", "model_signing"]
    check = [*tool, "verify", "key", "--public_key", str(public), "--signature", str(ours)]
    subprocess.run([*check, str(version.path)], check=True, timeout=60)
    theirs = signatures.path_of(library.root, "tiny", 2)
    other = library.get("tiny", 2)
    make = [*tool, "sign", "key", "--private_key", str(key), "--signature", str(theirs)]
    subprocess.run([*make, str(other.path)], check=True, timeout=60)
    assert signatures.check(other, library.root, [public]) == public
