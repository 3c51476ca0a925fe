"""Votes on calibrated answers, for the tests of recalibration."""

import numpy as np

from cogumi.confidence.guarantee import Guarantee
from cogumi.confidence.nets import sigmoid
from cogumi.confidence.recalibration import Vote

PROMISE = Guarantee(0.9, 0.05, 0.95, 1000, 500, 10, 0.04)
DOMAINS = ("domain_code", "domain_math")
CANARIES = [35, 39]  # of turn-0 .. turn-39, on every machine


def votes_of(rng, n, *, users=200, shift=(0.0, 0.0), name="u", flip=False):
    """Votes on calibrated answers of two domains, whose true logits are moved by `shift`."""
    domain, z = rng.integers(0, 2, n), rng.normal(1.0, 1.6, n)
    right = (rng.random(n) < sigmoid(z + np.array(shift)[domain])) ^ flip
    prefix = rng.integers(0, 2**40)
    return [
        Vote(f"{prefix}-{i}", f"{name}{i % users}", f"{prefix}-{i}", p, {DOMAINS[d]: 1.0}, bool(r))
        for i, (d, p, r) in enumerate(zip(domain, sigmoid(z).tolist(), right, strict=True))
    ]
