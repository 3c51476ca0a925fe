"""Latency curves of synthetic machines, for tests of speculation."""

import itertools
import random

import numpy as np

from cogumi.engine.llama.speculative.speculation import (
    MAX_DRAFT,
    Acceptance,
    DraftOptions,
    LatencyCurve,
    Tracker,
)

TWO_CORES = LatencyCurve(
    0.0065, tuple((np.interp(range(1, 17), [1, 2, 4, 6, 16], [32, 54, 84, 128, 290]) / 1000).tolist())
)
"""Measured with a base of 608 MB and a draft of 108 MB."""


def random_costs(seed):
    """A curve that never decreases: flat, steep, or in steps; and a draft of any speed."""
    generator = random.Random(seed)
    steepness, shape = generator.choice([0.05, 0.2, 0.5, 1.0, 1.5]), generator.choice([0.5, 1, 6])
    rises = (steepness * generator.random() ** shape for _ in range(MAX_DRAFT))
    return LatencyCurve(
        generator.choice([0.02, 0.1, 0.3]) * 2 * generator.random(), tuple(itertools.accumulate(rises, initial=1.0))
    )


def draft_options(limits, **permille):
    """The draft options of a request with known acceptance rates, given per mille for each source."""
    return DraftOptions(Tracker({source: Acceptance(n / 1000) for source, n in permille.items()}), limits)


def accepted_run(generator, rate, k):
    """The number of accepted tokens among `k` drafted ones."""
    accepted = 0
    while accepted < k and generator.random() < rate:
        accepted += 1
    return accepted
