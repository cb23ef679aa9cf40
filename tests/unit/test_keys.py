"""API keys at rest: hashes only, one code path for every guess, revocation at the next check."""

from __future__ import annotations

import hmac
import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import keys
from cluster.errors import ClusterError, ConfigError
from cluster.keys import KeyStore


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_key_is_known_by_its_text_only_t14(store: KeyStore) -> None:
    plaintext = store.add("laptop")
    found = store.check(plaintext)
    assert found is not None
    assert (found.name, found.last4) == ("laptop", plaintext[-4:])
    assert store.check(plaintext[:-1]) is None
    assert store.check("") is None


def test_only_hashes_are_stored_t14(store: KeyStore) -> None:
    umask = os.umask(0)
    try:
        plaintext = store.add("laptop")
    finally:
        os.umask(umask)
    text = store.path.read_text()
    assert plaintext not in text
    assert plaintext.removeprefix(keys.PREFIX)[:12] not in text
    assert (mode(store.path), mode(store.directory)) == (0o600, 0o700)
    assert plaintext not in repr(store.list())
    assert store.list()[0].sha256 not in repr(store.list())


def test_revocation_counts_at_the_next_check_of_another_process_t14(store: KeyStore) -> None:
    old, new = store.add("old"), store.add("new")
    gateway = KeyStore(store.directory)
    assert gateway.check(old)
    assert gateway.check(new)
    store.revoke(gateway.check(old).id)  # type: ignore[union-attr]
    assert gateway.check(old) is None
    assert gateway.check(new)


def test_only_a_key_made_so_may_administer_and_an_older_store_is_read(store: KeyStore) -> None:
    plain, admin = store.add("plain"), store.add("keeper", admin=True)
    found = [store.check(plain), store.check(admin)]
    assert [key.scope for key in found if key] == ["", "admin"]
    old = json.loads(store.path.read_text())
    for row in old["keys"]:
        del row["scope"]
    store.path.write_text(json.dumps(old))
    assert [key.scope for key in KeyStore(store.directory).list()] == ["", ""]


@pytest.mark.parametrize(
    "guess", ["known", "unknown", "revoked", "x" * 1_000_000, "\0", "ü", "\ud800"]
)
def test_one_code_path_for_every_guess_t13(
    store: KeyStore, guess: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {name: store.add(name) for name in ("known", "other", "revoked")}
    store.revoke("revoked")
    compared = []

    def counting(a: str, b: str) -> bool:
        compared.append((a, b))
        return real(a, b)

    real = hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", counting)
    found = store.check(texts.get(guess, guess))
    assert len(compared) == 2
    assert (found is not None) == (guess == "known")


@given(st.text())
def test_no_text_is_a_key_by_accident_t12(text: str) -> None:
    store = KeyStore(Path("/nonexistent"))
    assert store.check(text) is None


def test_the_demo_key_is_made_once_and_mended(store: KeyStore) -> None:
    path = store.demo_key()
    first = path.read_text()
    assert mode(path) == 0o600
    assert store.check(first.strip())
    assert store.demo_key().read_text() == first
    store.revoke("demo")
    again = store.demo_key().read_text()
    assert again != first
    assert store.check(again.strip())


def test_a_bad_name_an_unknown_id_and_a_broken_file_say_so(store: KeyStore) -> None:
    with pytest.raises(ConfigError, match="letter or digit first"):
        store.add("../x")
    store.add("a")
    with pytest.raises(ConfigError, match=r"no such key; ids are: .*\(a\)"):
        store.revoke("b")
    store.add("a")
    with pytest.raises(ConfigError, match="several keys have that name"):
        store.revoke("a")
    store.path.write_text(json.dumps({"keys": [{"id": 1}]}))
    with pytest.raises(ClusterError, match="is not a key store"):
        store.check("x")
