"""Sign a version and check its signature, in the form of OpenSSF model signing.

    <root>/models/<name>/signatures/<n>.sig

A signature is a Sigstore bundle: a DSSE envelope around an in-toto statement that names every file
of the version, its manifest among them, with its SHA-256. The manifest says which version it is,
so a signature holds for that version alone (https://github.com/sigstore/model-transparency, and
the protocol at https://github.com/secure-systems-lab/dsse). ``model_signing verify key`` checks
it as well. Keys are elliptic-curve keys as PEM files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import Corrupt, LibraryError
from cluster.home import keys_dir
from cluster.library import layout
from cluster.library.disk import hash_file
from cluster.library.manifest import MANIFEST

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    from cluster.library.store import Version

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
MAX_BYTES = 16_000_000
CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
"""Each curve with the hash that goes with it."""
MAKE_KEY = (
    "`openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem` makes one, and `openssl ec -in "
    "KEY.pem -pubout -out KEY.pub.pem` its public half"
)


def path_of(root: Path, name: str, number: int) -> Path:
    """Return where the signature of a version lies."""
    return layout.home(root, name) / "signatures" / f"{int(number)}.sig"


def trusted() -> Path | None:
    """Return the folder of public keys that loads must be signed with; ``None``: with none.

    ROUNDHOUSE_TRUSTED_KEYS names it, else it is ``keys/trusted`` of the state directory, when
    there is such a folder.
    """
    if chosen := os.environ.get("ROUNDHOUSE_TRUSTED_KEYS"):
        return Path(chosen).expanduser().absolute()
    folder = keys_dir() / "trusted"
    return folder if folder.exists() else None


def keys_of(folder: Path) -> list[Path]:
    """Return the public keys of a folder; LibraryError when it has none: nothing is trusted."""
    found = sorted(path for path in folder.glob("*.pem") if path.is_file())
    if not found:
        raise LibraryError(
            f"{folder}: holds no *.pem, so no version is trusted; put the public keys there whose "
            "signatures count, or do without the folder and ROUNDHOUSE_TRUSTED_KEYS"
        )
    return found


def sign(version: Version, key: Path) -> bytes:
    """Return the signature of a version, whose files were verified, by a private key."""
    _needed()
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except OSError as error:
        raise LibraryError(f"{key}: {error.strerror or error}; {MAKE_KEY}") from None
    except (ValueError, TypeError) as error:
        raise LibraryError(
            f"{key}: not a private key as PEM without a passphrase ({error}); {MAKE_KEY}"
        ) from None
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name not in CURVES:
        raise LibraryError(f"{key}: a key of P-256, P-384 or P-521 is needed; {MAKE_KEY}")
    payload = json.dumps(_statement(version), sort_keys=True).encode()
    algorithm = getattr(hashes, CURVES[private.curve.name])()
    raw = private.sign(_authenticated(payload), ec.ECDSA(algorithm))
    bundle = {
        "mediaType": BUNDLE,
        "verificationMaterial": {
            "publicKey": {"hint": _hint(private.public_key())},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD,
            "signatures": [{"sig": base64.b64encode(raw).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle, indent=2).encode() + b"\n"


def check(version: Version, root: Path, keys: Iterable[Path]) -> Path:
    """Return which of ``keys`` has signed a version as its manifest says it is.

    The hashes are the manifest's: whether the files still have them is for ``verify`` to say.
    Raises LibraryError when it is not signed, or by nobody of these; Corrupt when the signature is
    damaged or of something else, naming the files that differ.
    """
    path = path_of(root, version.name, version.number)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Corrupt(f"{path}: larger than any signature; sign {version.ref} again")
        bundle = path.read_bytes()
    except FileNotFoundError:
        raise LibraryError(
            f"{version.ref}: not signed; `roundhouse models sign {version.ref} --key KEY.pem`"
        ) from None
    payload, signature = _envelope(bundle, path)
    for key in keys:
        if _signed_by(public_key(key), payload, signature):
            _same(version, payload, path)
            return key
    raise LibraryError(
        f"{version.ref}: {path} was made by none of the keys given; sign it again with `roundhouse "
        f"models sign {version.ref} --key KEY.pem`"
    )


def public_key(path: Path) -> EllipticCurvePublicKey:
    """Read a public key; LibraryError when the file holds none that can be used."""
    _needed()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        found = serialization.load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise LibraryError(f"{path}: {error.strerror or error}; {MAKE_KEY}") from None
    except ValueError as error:
        raise LibraryError(f"{path}: not a public key as PEM ({error}); {MAKE_KEY}") from None
    if not isinstance(found, ec.EllipticCurvePublicKey) or found.curve.name not in CURVES:
        raise LibraryError(f"{path}: a key of P-256, P-384 or P-521 is needed; {MAKE_KEY}")
    return found


def _needed() -> None:
    try:
        import cryptography  # noqa: F401  whether it is there
    except ImportError:
        raise LibraryError(
            "signatures need the package cryptography: `pip install 'roundhouse[signing]'`"
        ) from None


def _hashes(version: Version) -> dict[str, str]:
    """Return the SHA-256 of every file of a version, its manifest read, the others as it says."""
    files = {name: entry.sha256 for name, entry in version.manifest.files.items()}
    return {**files, MANIFEST: hash_file(version.path / MANIFEST)[0]}


def _statement(version: Version) -> dict[str, Any]:
    found = sorted(_hashes(version).items())
    whole = hashlib.sha256(b"".join(bytes.fromhex(sha256) for _, sha256 in found)).hexdigest()
    return {
        "_type": STATEMENT,
        "subject": [{"name": version.ref, "digest": {"sha256": whole}}],
        "predicateType": PREDICATE,
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [
                {"name": name, "algorithm": "sha256", "digest": sha256} for name, sha256 in found
            ],
        },
    }


def _authenticated(payload: bytes) -> bytes:
    """Return what is signed: DSSE's encoding of a payload and its type."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD), PAYLOAD.encode(), len(payload), payload)


def _hint(key: EllipticCurvePublicKey) -> str:
    from cryptography.hazmat.primitives import serialization

    told = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.PEM, told)).hexdigest()


def _envelope(bundle: bytes, path: Path) -> tuple[bytes, bytes]:
    try:
        envelope = json.loads(bundle)["dsseEnvelope"]
        if envelope["payloadType"] != PAYLOAD:
            raise ValueError(f"its payload is {envelope['payloadType']!r:.40}")
        [signature] = envelope["signatures"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        return payload, base64.b64decode(signature["sig"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Corrupt(f"{path}: not a signature ({error}); sign the version again") from None


def _signed_by(key: EllipticCurvePublicKey, payload: bytes, signature: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    algorithm = getattr(hashes, CURVES[key.curve.name])()
    try:
        key.verify(signature, _authenticated(payload), ec.ECDSA(algorithm))
    except InvalidSignature:
        return False
    return True


def _same(version: Version, payload: bytes, path: Path) -> None:
    """Raise Corrupt unless the signed statement is that of ``version``."""
    try:
        statement: Mapping[str, Any] = json.loads(payload)
        if (statement["_type"], statement["predicateType"]) != (STATEMENT, PREDICATE):
            raise ValueError(f"a statement of {statement['predicateType']!r:.60}")
        subject = statement["subject"][0]["name"]
        signed = {
            one["name"]: one["digest"]
            for one in statement["predicate"]["resources"]
            if one["algorithm"] == "sha256"
        }
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise Corrupt(f"{path}: not of a model's files ({error}); sign it again") from None
    here = _hashes(version)
    if differing := sorted(n for n in {*here, *signed} if here.get(n) != signed.get(n)):
        of = "" if subject == version.ref else f" of {subject!r:.80}"
        raise Corrupt(
            f"{version.ref}: {path} is the signature{of} over other files: "
            f"{', '.join(differing[:8])}; do not use this version unless you know why"
        )
