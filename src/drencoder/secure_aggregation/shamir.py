"""This module is Shamir's secret sharing (Shamir 1979, https://doi.org/10.1145/359168.359176) of 32 bytes.

A secret is the value at 0 of a random polynomial of degree threshold - 1 over the integers modulo 2^521 - 1; a share is its
value at one party's place. Any `threshold` shares give the polynomial, fewer say nothing at all.
"""

import secrets
from collections.abc import Mapping, Sequence

from drencoder.errors import SecureError

_PRIME = 2**521 - 1
_SECRET_BYTES = 32
SHARE_BYTES = 66


def split(secret: bytes, threshold: int, places: Sequence[int]) -> dict[int, bytes]:
    """Returns a share for each place (distinct positive integers). Any `threshold` of them give the 32 bytes back."""
    assert len(secret) == _SECRET_BYTES
    assert 0 < threshold <= len(places) == len(set(places))
    assert min(places) > 0
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(_PRIME) for _ in range(threshold - 1))]
    return {place: _value(coefficients, place).to_bytes(SHARE_BYTES, "big") for place in places}


def _value(coefficients: list[int], place: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * place + coefficient) % _PRIME
    return value


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Returns the 32 bytes of the secret of these shares (place -> share); give exactly as many as the threshold, or more.

    Raises SecureError when they cannot be shares of 32 bytes. Wrong shares that happen to give 32 bytes are not
    noticed here: compare the secret with what its owner said about it.
    """
    secret = 0
    for place, share in shares.items():
        above, below = 1, 1
        for other in shares:
            if other != place:
                above, below = above * other % _PRIME, below * (other - place) % _PRIME
        secret += int.from_bytes(share, "big") * above * pow(below, -1, _PRIME)
    secret %= _PRIME
    if secret >> (8 * _SECRET_BYTES):
        raise SecureError("Shares do not fit together: one of them is wrong.")
    return secret.to_bytes(_SECRET_BYTES, "big")
