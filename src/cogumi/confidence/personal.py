"""What one user's votes say beyond everybody's: bounded offsets of the logit per domain (SPEC F17).

From `ENOUGH` votes on, the votes' surprise (right - q) is summed and set against its own variance q (1 - q). Only what
exceeds two standard errors counts, and that is shrunk towards 0 by a ridge: so a user like all others gets nothing or
next to nothing, and one who differs gets most of the difference. First one offset over all domains, then what single
domains have beyond it. Where neighbours may help, the start is not 0 but what users with a similar pattern of surprises
show together (collaborative filtering), if the own votes differ from everybody's by more than chance; they then correct
it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cogumi.confidence.recalibration import DOMAIN, Doubles, Votes

ENOUGH = 50
FURTHEST = 1.0  # nats
RIDGE = 15.0  # information q (1 - q), about that of 120 votes
NEIGHBOURS = 10
ALIKE = 0.7  # cosine of two patterns


@dataclass(frozen=True, slots=True)
class Evidence:
    """Of one user: `votes`, and per domain the summed surprise and the summed variance expected of it."""

    votes: int
    domains: Mapping[str, tuple[float, float]]

    def pattern(self) -> dict[str, float]:
        """Rough offset per domain, shrunk."""
        return {name: s / (v + RIDGE) for name, (s, v) in self.domains.items()}

    def differs(self) -> bool:
        """Whether the surprises are more than chance: chi-square four standard deviations above its mean."""
        n = len(self.domains)
        return sum(s * s / max(v, 1e-9) for s, v in self.domains.values()) > n + 4 * math.sqrt(2 * n)


def evidence(votes: Votes, q: Doubles) -> dict[str, Evidence]:
    """Each user's evidence from votes [n] and what is expected of everybody's [n]."""
    counts: dict[str, int] = {}
    sums: dict[str, dict[str, tuple[float, float]]] = {}
    for row, expected in zip(votes.rows, q.tolist(), strict=True):
        counts[row.user] = counts.get(row.user, 0) + 1
        domains = sums.setdefault(row.user, {})
        for name, share in shares(row.features).items():
            s, v = domains.get(name, (0.0, 0.0))
            domains[name] = s + share * (row.right - expected), v + share * expected * (1 - expected)
    return {user: Evidence(n, sums[user]) for user, n in counts.items()}


def shares(features: Mapping[str, float]) -> dict[str, float]:
    """A question's shares of the domains, summing to 1; all of it in one nameless domain where no router spoke."""
    found = {name: max(x, 0.0) for name, x in features.items() if name.startswith(DOMAIN)}
    total = sum(found.values())
    return {name: x / total for name, x in found.items()} if total > 0 else {"": 1.0}


def offsets(own: Evidence, others: Sequence[Evidence] = ()) -> dict[str, float]:
    """Offset per domain, within +-`FURTHEST`; none before `ENOUGH` votes. `others` are possible neighbours."""
    if own.votes < ENOUGH:
        return {}
    overall = _shrunk(sum(s for s, _ in own.domains.values()), sum(v for _, v in own.domains.values()))
    start = dict.fromkeys(own.domains, overall) | _together(own, others)
    found = {}
    for name, (s, v) in own.domains.items():
        offset = start[name] + _shrunk(s - start[name] * v, v)
        found[name] = min(max(offset, -FURTHEST), FURTHEST)
    return found


def _shrunk(surprise: float, variance: float) -> float:
    beyond = max(abs(surprise) - 2 * math.sqrt(variance), 0.0)
    return math.copysign(min(beyond / (variance + RIDGE), FURTHEST), surprise)


def _together(own: Evidence, others: Sequence[Evidence]) -> dict[str, float]:
    """What the most similar users show together in this user's domains; empty where nobody is similar, or where the
    user differs from everybody by no more than chance (then neighbours would be those of like chance).
    """
    mine = own.pattern() if own.differs() else {}
    similar = sorted(((_cosine(mine, other.pattern()), i) for i, other in enumerate(others)), reverse=True)
    near = [(similarity, others[i]) for similarity, i in similar[:NEIGHBOURS] if similarity >= ALIKE]
    found = {}
    for name in mine if near else ():
        s, v = own.domains[name]
        for similarity, other in near:
            more = other.domains.get(name, (0.0, 0.0))
            s, v = s + similarity * more[0], v + similarity * more[1]
        found[name] = _shrunk(s, v)
    return found


def _cosine(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    length = math.hypot(*one.values()) * math.hypot(*other.values())
    return sum(x * other.get(name, 0.0) for name, x in one.items()) / length if length > 0 else 0.0
