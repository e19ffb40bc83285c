"""Seeds: one number for a run, from which every sample and every retry gets its own, in any order and on any machine."""

from __future__ import annotations

import hashlib
import secrets


def derive(seed: int, index: int, attempt: int = 0, purpose: str = "sample") -> int:
    """Return the seed (0..2^63-1) of try `attempt` of sample `index` of the run `seed`; it depends on nothing else.

    The first eight bytes of the SHA-256 of "maisi/purpose/seed/index/attempt".
    """
    digest = hashlib.sha256(f"maisi/{purpose}/{seed}/{index}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def fresh() -> int:
    """Return a random run seed that is short enough to type again."""
    return secrets.randbelow(2**31)
