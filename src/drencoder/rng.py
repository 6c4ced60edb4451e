"""Seeds for everything that may be replayed: (run, purpose, indices) -> one 63-bit integer.

Nothing in this package touches a global random state. What must *not* be replayable, the noise of a
release and the secret cohorts of a real run, does not come from here but from the operating system
(`privacy.mechanism.SecureNoise`, `secrets`).
"""

import hashlib


def derive_seed(run_seed: int | str, purpose: str, *indices: int) -> int:
    """Hashes a run seed, a purpose and indices (round, client, ...) into an integer in [0, 2**63).

    Different purposes and different indices give independent streams; the same arguments give the
    same number on every platform and Python version. The result fits `torch.Generator.manual_seed`,
    `numpy.random.default_rng` and `random.Random`.
    """
    text = "\x1f".join([str(run_seed), purpose, *map(str, indices)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
