"""This module is the only one in the room that calls the `cryptography` package.

Signatures are ECDSA on P-384 with SHA-384, the keys that Flower's nodes have; key agreement is X25519 (RFC 7748) with
HKDF-SHA-256 (RFC 5869); sealed messages are ChaCha20-Poly1305 and masks are the ChaCha20 stream (RFC 8439). Every derived key
is bound to the round's context and to both parties, so none is ever used twice and all nonces may be zero.
"""

from typing import final

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils, x25519
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from drencoder.errors import SecureError

SECRET_BYTES = 32  # of every seed, X25519 key and derived key
PUBLIC_KEY_BYTES = 49  # a compressed point of P-384
SIGNATURE_BYTES = 96  # r and s
SEAL_BYTES = 16  # what sealing adds
_HALF = SIGNATURE_BYTES // 2
_LONGEST_KEY = 4096  # bytes of a file: a key of another kind, of 100 kB, would take minutes to check
_NO_KEY = (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm)  # of the library, for damaged keys
_HASH = ec.ECDSA(hashes.SHA384())
_MASK_VALUES = 1 << 20  # of a mask at a time: 4 MiB


@final
class NodeKey:
    """A node's long-term signing key. Its repr shows the public half only."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls) -> "NodeKey":
        """Returns a new random key."""
        return cls(ec.generate_private_key(ec.SECP384R1()))

    @classmethod
    def load(cls, data: bytes) -> "NodeKey":
        """Reads a private key file without a passphrase, in OpenSSH's format (`ssh-keygen -t ecdsa -b 384`) or PEM.

        Raises SecureError when it is neither, or of another curve.
        """
        if len(data) > _LONGEST_KEY:
            raise SecureError(f"A node key of {len(data):,} bytes is none: a P-384 key file has about 700.")
        loaders = (serialization.load_ssh_private_key, serialization.load_pem_private_key)
        for load in loaders:
            try:
                key = load(data, password=None)
            except _NO_KEY:  # TypeError: it has a passphrase
                continue
            if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP384R1):
                return cls(key)
        raise SecureError("A node key is not a private P-384 key: make one with ssh-keygen -t ecdsa -b 384 -N ''.")

    @property
    def public(self) -> bytes:
        """The public key as a roster has it, 49 bytes."""
        return _compressed(self._key.public_key())

    def sign(self, message: bytes) -> bytes:
        """Returns the signature of `message`, 96 bytes: r and s, big-endian."""
        r, s = utils.decode_dss_signature(self._key.sign(message, _HASH))
        return r.to_bytes(_HALF, "big") + s.to_bytes(_HALF, "big")

    def __repr__(self) -> str:
        return f"NodeKey({self.public.hex()[:16]})"


def public_key_bytes(data: bytes) -> bytes:
    """Reads a public key file (OpenSSH's `.pub` or PEM) into the 49 bytes that a roster has.

    Raises SecureError on anything else.
    """
    loaders = (serialization.load_ssh_public_key, serialization.load_pem_public_key)
    for load in loaders if len(data) <= _LONGEST_KEY else ():
        try:
            key = load(data)
        except _NO_KEY:
            continue
        if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1):
            return _compressed(key)
    raise SecureError("A node's public key is not a P-384 key: take the .pub file that ssh-keygen wrote.")


def _compressed(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)


def is_signed(public: bytes, signature: bytes, message: bytes) -> bool:
    """Returns whether the owner of the key `public` signed this message; False for a malformed key or signature, too."""
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), public)
        r, s = (int.from_bytes(part, "big") for part in (signature[:_HALF], signature[_HALF:]))
        key.verify(utils.encode_dss_signature(r, s), message, _HASH)
    except (InvalidSignature, ValueError):
        return False
    return True


@final
class KeyAgreement:
    """An X25519 key of one round; `derive_secret` gives both parties the same 32 bytes and nobody else."""

    def __init__(self, private: bytes | None = None) -> None:
        self._key = (
            x25519.X25519PrivateKey.from_private_bytes(private) if private else x25519.X25519PrivateKey.generate()
        )
        self.public = self._key.public_key().public_bytes_raw()

    def private_bytes(self) -> bytes:
        """Returns the 32 bytes of the private key, for secret sharing."""
        return self._key.private_bytes_raw()

    def derive_secret(self, peer: bytes, context: bytes, purpose: bytes) -> bytes:
        """Returns the 32 bytes of the shared key for one purpose in one context.

        Raises SecureError for a peer key that would fix the result.
        """
        try:
            shared = self._key.exchange(x25519.X25519PublicKey.from_public_bytes(peer))
        except ValueError:
            raise SecureError("A peer's X25519 key is degenerate: its message is refused.") from None
        return HKDF(hashes.SHA256(), SECRET_BYTES, salt=context, info=purpose).derive(shared)


def seal(key: bytes, plain: bytes, header: bytes) -> bytes:
    """Encrypts and authenticates `plain`, and authenticates `header`. Use each key for one message: the nonce is zero."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), plain, header)


def open_sealed(key: bytes, sealed: bytes, header: bytes) -> bytes:
    """Returns what `seal` was given. Raises SecureError when a bit of it was changed."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, header)
    except InvalidTag:
        raise SecureError("A sealed share does not open: it was changed, or is of another round.") from None


def digest(*parts: bytes) -> bytes:
    """Returns the SHA-256 of the parts, each with its length, so that no two lists of parts run together."""
    hashed = hashes.Hash(hashes.SHA256())
    for part in parts:
        hashed.update(len(part).to_bytes(8, "big") + part)
    return hashed.finalize()


def apply_mask(total_V: npt.NDArray[np.uint32], key: bytes, sign: int) -> None:
    """Adds (sign 1) or takes off (-1) the key's ChaCha20 stream, as little-endian 32-bit words; in place, modulo 2^32."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    for start in range(0, total_V.size, _MASK_VALUES):
        part = total_V[start : start + _MASK_VALUES]
        words = np.frombuffer(stream.update(bytes(4 * part.size)), dtype="<u4")
        if sign > 0:
            np.add(part, words, out=part)
        else:
            np.subtract(part, words, out=part)
