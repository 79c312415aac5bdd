"""Seeds of everything random, one stream for each purpose.

`numpy.random.SeedSequence` spreads the settings' seed over purposes and numbers (of a head, a step,
an epoch), so that no two streams coincide. Each stream depends on its own purpose and number only:
results do not depend on which worker draws, nor on where a resumed run begins.
"""

from __future__ import annotations

import zlib

import numpy as np


def seed_of(seed: int, purpose: str, number: int = 0) -> int:
    """The seed of one random stream, a non-negative 63-bit integer.

    Args:
        seed: of the settings.
        purpose: what the stream is for, such as "pairs".
        number: which of its kind, such as the step.
    """
    words = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), number])
    return int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))
