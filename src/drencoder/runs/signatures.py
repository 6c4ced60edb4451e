"""Signatures of finished runs: who stands for the last line of a ledger, and so for every file whose digest it has. No torch.

`RUN/signatures.jsonl` has one JSON object per line, `{"key": "ssh-ed25519 ...", "signature": "<base64>"}`. Lines of several
copies of a run may be joined: a server signs, and the sites counter-sign their copies. What is signed is the run's id with
the number and the SHA-256 of the ledger's last line. Signatures are Ed25519 (RFC 8032, https://www.rfc-editor.org/rfc/rfc8032),
keys are OpenSSH files, such as `drencoder certs` and `ssh-keygen -t ed25519` make.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from drencoder.errors import ArtifactError
from drencoder.privacy.ledger import Ledger
from drencoder.reading import parse_json, read_bytes
from drencoder.runs.run_folder import RunFolder, storing

_CONTEXT = "drencoder ledger 1"
_HOW = "make one with drencoder certs or ssh-keygen -t ed25519"
_LONGEST = 4096  # bytes of a line or of a key file; a real one has about 200


def make_signing_key() -> tuple[bytes, bytes]:
    """A new private key without a passphrase and its public line, both in OpenSSH's format."""
    key = Ed25519PrivateKey.generate()
    openssh = serialization.PrivateFormat.OpenSSH
    private = key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption())
    return private, _public_line(key.public_key()).encode() + b"\n"


def fingerprint(line: str) -> str:
    """The name of a public key as `ssh-keygen -l` prints it: `SHA256:` and the digest in base64."""
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def sign_run(folder: RunFolder, key_file: Path) -> str:
    """Signs the last line of a finished run's ledger and returns the fingerprint of the key.

    A key signs a ledger once: what it signed before in this folder is replaced. The caller has verified the run.

    Raises:
      ArtifactError: the key is no Ed25519 key of OpenSSH without a passphrase, or the folder cannot be read or written.
    """
    try:
        key = serialization.load_ssh_private_key(_read_short(key_file), None)
    except (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm):
        raise ArtifactError(f"{key_file} is not an OpenSSH private key without a passphrase: {_HOW}.") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ArtifactError(f"{key_file} is a private key, but not an Ed25519 one: {_HOW}.")
    line = _public_line(key.public_key())
    with Ledger.open(folder.ledger, read_only=True) as ledger:
        signature = key.sign(_message(ledger))
    mine = json.dumps({"key": line, "signature": base64.b64encode(signature).decode()})
    others = [text for text in _lines(folder) if not text.startswith(json.dumps({"key": line})[:-1])]
    with storing(folder.signatures):
        folder.write(folder.signatures, "".join(f"{text}\n" for text in [*others, mine]).encode())
    return fingerprint(line)


def read_signers(where: Path) -> dict[str, str]:
    """Reads public key -> name of its file: of one `.pub` file, or of all in a folder.

    Raises:
      ArtifactError: there is none, or one is not an Ed25519 key.
    """
    files = sorted(where.glob("*.pub")) if where.is_dir() else [where]
    if not files:
        raise ArtifactError(f"{where} holds no .pub file: give the public keys of those who must have signed.")
    signers = {}
    for file in files:
        try:
            key = serialization.load_ssh_public_key(_read_short(file))
        except (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm):
            raise ArtifactError(f"{file} is not an OpenSSH public key: {_HOW}.") from None
        if not isinstance(key, Ed25519PublicKey):
            raise ArtifactError(f"{file} is a public key, but not an Ed25519 one: {_HOW}.")
        signers[_public_line(key)] = file.stem
    return signers


def check_signatures(folder: RunFolder, ledger: Ledger, demanded: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Returns the keys that signed this ledger, and what does not hold: a sentence for each bad or missing signature.

    Args:
      demanded: public key -> name, of all who must have signed.

    Raises:
      ArtifactError: the file of signatures cannot be read.
    """
    good, troubles = [], []
    for number, text in enumerate(_lines(folder), start=1):
        key = _signer(text, _message(ledger))
        if key is None:
            troubles.append(
                f"line {number} of {folder.signatures.name} is no signature of this ledger's last line: remove it, or sign again."
            )
        else:
            good.append(key)
    troubles += [f"{name}'s key has not signed this ledger." for key, name in demanded.items() if key not in good]
    return good, troubles


def _signer(text: str, message: bytes) -> str | None:
    """The public key of a line whose signature is right."""
    try:
        record = parse_json(text)
        key = serialization.load_ssh_public_key(record["key"].encode())
        if not isinstance(key, Ed25519PublicKey) or set(record) != {"key", "signature"}:
            return None
        key.verify(base64.b64decode(record["signature"], validate=True), message)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        NotImplementedError,
        InvalidSignature,
        UnsupportedAlgorithm,
    ):
        return None
    return _public_line(key)


def _message(ledger: Ledger) -> bytes:
    seq, digest = ledger.head
    return f"{_CONTEXT}\n{ledger.run_id}\n{seq} {digest}\n".encode()


def _public_line(key: Ed25519PublicKey) -> str:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def _lines(folder: RunFolder) -> Iterator[str]:
    """The lines of the file of signatures; none if there is no such file. One that is too long or no text comes out empty."""
    try:
        lines = folder.signatures.read_bytes().splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ArtifactError(f"{folder.signatures} cannot be read ({error.strerror}).") from None
    for line in lines:
        yield line.decode("ascii", errors="replace") if len(line) <= _LONGEST else ""


def _read_short(file: Path) -> bytes:
    try:
        return read_bytes(file, _LONGEST)
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error.strerror}): give a key file.") from None
    except ValueError:
        raise ArtifactError(f"{file} has more than {_LONGEST} bytes, so it is no key: {_HOW}.") from None
