"""This module makes certificates and node keys; no other module of the room calls the cryptography library. No torch.

::

    DIR/ca.crt, ca.key           the authority that all of one federation believe; keep ca.key off the server afterwards
    DIR/server.crt, server.key   for the server
    DIR/nodes/node0.pub ...      for the server: whom it lets in
    DIR/nodes/node0.clients ...  for the server: which clients each of them answers for
    DIR/signing.key              for the server: with it `drencoder verify --sign` signs a finished run
    DIR/signers/server.pub ...   for everybody: whose signatures `drencoder verify --signed-by` asks for
    DIR/node0/key, key.pub, ca.crt, clients, roster, signing.key    for the site: its key, whom it believes, which clients it
                                 answers for, all nodes' keys, against which it checks the others under secure aggregation,
                                 and a key with which it counter-signs a run

TLS keys are ECDSA P-256, node keys ECDSA P-384 in OpenSSH's format, which is what Flower takes, signing keys Ed25519. Private keys are written with
mode 0600 and never leave the machine that makes them but by your hand.
"""

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from drencoder.errors import ArtifactError, RecipeError
from drencoder.federated.remote.agreement import ClientSet
from drencoder.reading import read_bytes, read_text, reason, shown
from drencoder.runs.run_folder import storing
from drencoder.runs.signatures import make_signing_key

_LONGEST = 4096  # bytes of a public key file; a real one has about 250
_LONGEST_LIST = 1 << 20  # bytes of a list of clients, or of a chain of certificates
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HOST_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_CURVES = ("secp256r1", "secp384r1", "secp521r1")


def make_certificates(folder: Path, nodes: int, hosts: Sequence[str], *, days: int = 825) -> list[Path]:
    """Writes a new authority, a server certificate for `hosts` (names or addresses) and the loopback, and `nodes` keys.

    Returns the files in the order of the module's table.

    Raises:
      ArtifactError: the folder holds something already, or cannot be written.
      RecipeError: `nodes` or `days` is below 1, or a host is empty.
    """
    if nodes < 1 or days < 1:
        raise RecipeError(f"--nodes {nodes} and --days {days} must both be at least 1.")
    for host in hosts:
        if not _is_host(host):
            raise RecipeError(
                f"--host {shown(host)} names no host: give a DNS name (ASCII; xn--... for others) or an IP address of the server."
            )
    if os.path.exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(
            f"{folder} is already there: name another folder, or remove it if its keys are in use nowhere."
        )
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = _make_root_certificate(authority, days)
    certificate = _issue_certificate(server, root, authority, [*hosts, *_LOOPBACK], days)
    written = [
        _write(folder / "ca.crt", root.public_bytes(serialization.Encoding.PEM), 0o644),
        _write(folder / "ca.key", _private_pem(authority), 0o600),
        _write(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644),
        _write(folder / "server.key", _private_pem(server), 0o600),
    ]
    keys = [ec.generate_private_key(ec.SECP384R1()) for _ in range(nodes)]
    openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    roster = b"".join(key.public_key().public_bytes(*openssh) + b"\n" for key in keys)
    for node, key in enumerate(keys):
        public = key.public_key().public_bytes(*openssh)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        own = folder / f"node{node}"
        written += [
            _write(folder / "nodes" / f"node{node}.pub", public + b"\n", 0o644),
            _write(folder / "nodes" / f"node{node}.clients", f"{node}/{nodes}\n".encode(), 0o644),
            _write(own / "key", private, 0o600),
            _write(own / "key.pub", public + b"\n", 0o644),
            _write(own / "ca.crt", root.public_bytes(serialization.Encoding.PEM), 0o644),
            _write(own / "clients", f"{node}/{nodes}\n".encode(), 0o644),
            _write(own / "roster", roster, 0o644),
        ]
    for name, own in {"server": folder, **{f"node{node}": folder / f"node{node}" for node in range(nodes)}}.items():
        private, public = make_signing_key()
        written += [
            _write(own / "signing.key", private, 0o600),
            _write(folder / "signers" / f"{name}.pub", public, 0o644),
        ]
    return written


def read_public_keys(where: Path) -> dict[str, bytes]:
    """Reads name -> public key (PEM, as Flower's control API takes it) from every .pub file in a folder, or of one file.

    Raises:
      ArtifactError: there is none, one is not an ECDSA key on a NIST curve, or two are the same.
    """
    files = sorted(where.glob("*.pub")) if where.is_dir() else [where]
    if not files:
        raise ArtifactError(f"{where} holds no .pub file: give the folder with the nodes' public keys.")
    keys: dict[str, bytes] = {}
    for file in files:
        try:
            key = serialization.load_ssh_public_key(read_bytes(file, _LONGEST))
        except OSError as error:
            raise ArtifactError(f"{file} cannot be read ({error.strerror}): give the nodes' public keys.") from None
        except (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm):
            raise ArtifactError(f"{file} is not an OpenSSH public key: make one with drencoder certs.") from None
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
            raise ArtifactError(f"{file} is not an ECDSA key on a NIST curve: make one with drencoder certs.")
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        if pem in keys.values():
            raise ArtifactError(f"{file} is the key of another node too: give every node a key of its own.")
        keys[file.stem] = pem
    return keys


def read_client_sets(where: Path, population: int) -> dict[str, ClientSet]:
    """Reads name -> the clients that the server's list gives to a node, from the `.clients` files beside the public keys.

    Raises:
      RecipeError: a file is no list of clients of this population, or a client is given to two nodes.
      ArtifactError: a file cannot be read.
    """
    files = sorted(where.glob("*.clients")) if where.is_dir() else [where.with_suffix(".clients")]
    given: dict[str, ClientSet] = {}
    owners: dict[int, str] = {}
    for file in files:
        if not file.exists():
            continue
        try:
            given[file.stem] = ClientSet.parse(read_text(file, _LONGEST_LIST).strip(), population)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{shown(file)} cannot be read ({reason(error)}): write, say, 0-9 or 0/3.") from None
        except RecipeError as error:
            raise RecipeError(f"{file}: {error}") from None
        for client in given[file.stem].clients:
            if owners.setdefault(client, file.stem) != file.stem:
                raise RecipeError(
                    f"{file} gives client {client} to {file.stem}, and {owners[client]}.clients has it too."
                )
    return given


def check_authority(path: Path) -> x509.Certificate:
    """Returns the authority's certificate.

    Raises:
      ArtifactError: it cannot be read, or is not valid today.
    """
    return _read_certificate(path, "give the authority's ca.crt")


def check_server_certificate(folder: Path, host: str) -> list[str]:
    """Checks `ca.crt`, `server.crt` and `server.key` of a folder, and returns the names and addresses of the server.

    Raises:
      ArtifactError: one is missing, unreadable or not valid today; the key is another one's; the authority did not sign the
        certificate; or `host`, by which this machine reaches itself, is not among the names.
    """
    for name in ("ca.crt", "server.crt", "server.key"):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} has no {name}: make the files with drencoder certs.")
    authority = check_authority(folder / "ca.crt")
    path = folder / "server.crt"
    certificate = _read_certificate(path, "make it with drencoder certs")
    try:
        key = serialization.load_pem_private_key(read_bytes(folder / "server.key", _LONGEST_LIST), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        raise ArtifactError(f"{folder / 'server.key'} is not a private key without a password: restore it.") from None
    if key.public_key() != certificate.public_key():
        raise ArtifactError(f"{folder / 'server.key'} is not the key of {path}: the two must be made together.")
    if certificate.issuer == authority.subject:  # else somebody's own chain, which the sites' TLS checks
        try:
            certificate.verify_directly_issued_by(authority)
        except (InvalidSignature, ValueError, TypeError):
            raise ArtifactError(f"{folder / 'ca.crt'} did not sign {path}: the two must be made together.") from None
    names = _names_of(certificate)
    if host.lower() not in (name.lower() for name in names):
        raise ArtifactError(
            f"{path} does not have the name {host}, by which this machine reaches the server: it has {', '.join(names) or 'none'}. "
            f"Make TLS certificates with drencoder certs --host {host}."
        )
    return names


def _read_certificate(path: Path, cure: str) -> x509.Certificate:
    try:
        certificate = x509.load_pem_x509_certificate(read_bytes(path, _LONGEST_LIST))
    except OSError as error:
        raise ArtifactError(f"{shown(path)} cannot be read ({error.strerror}): {cure}.") from None
    except ValueError:
        raise ArtifactError(f"{path} is not a TLS certificate: {cure}.") from None
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise ArtifactError(
            f"{path} has expired on {certificate.not_valid_after_utc:%Y-%m-%d}: make new TLS certificates with drencoder certs and "
            "give every site its new files. If it has not, the clock of this machine is wrong."
        )
    if now < certificate.not_valid_before_utc:
        raise ArtifactError(
            f"{path} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: check this machine's clock."
        )
    return certificate


def _names_of(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _make_root_certificate(key: ec.EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "drencoder federation")])
    usage = _key_usage(signs=True)
    return (
        _begin_certificate(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )


def _issue_certificate(
    key: ec.EllipticCurvePrivateKey,
    root: x509.Certificate,
    authority: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    days: int,
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "drencoder server")])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    return (
        _begin_certificate(name, root.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([_alternative_name(host) for host in dict.fromkeys(hosts)]), critical=False
        )
        .add_extension(_key_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority, hashes.SHA256())
    )


def _begin_certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    start = datetime.now(UTC) - timedelta(minutes=5)  # clocks differ
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=signs, crl_sign=signs, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _is_host(host: str) -> bool:
    """Whether it is an address, or letters, digits and hyphens between dots as DNS has them (RFC 1123, section 2.1)."""
    if ":" in host:
        try:
            return bool(ipaddress.ip_address(host))
        except ValueError:
            return False
    return len(host) < 254 and all(map(_HOST_PART.fullmatch, host.removeprefix("*.").removesuffix(".").split(".")))


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, mode: int) -> Path:
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
    return path
