"""Personal correction of P(correct): bounded logit offsets per user and domain, learned from votes (SPEC F17).

From `MIN_VOTES` votes on, the residuals (right - q) of a user's votes are summed and compared with their variance
q (1 - q). Only the part beyond two standard errors counts, shrunk towards 0 by a ridge: a typical user gets an offset
near 0, a deviating user most of the difference. First one offset over all domains is estimated, then the remaining
offset of each domain. If the user's votes deviate significantly, the estimate starts from the pooled residuals of users
with a similar pattern (collaborative filtering) instead of 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cogumi.confidence.recalibration import DOMAIN, Doubles, Votes

MIN_VOTES = 50
MAX_OFFSET = 1.0  # nats
RIDGE = 15.0  # information q (1 - q), about that of 120 votes
MAX_NEIGHBOURS = 10
MIN_SIMILARITY = 0.7  # cosine of two patterns


@dataclass(frozen=True, slots=True)
class Evidence:
    """One user's number of `votes`, and per domain the summed residual and its expected variance."""

    votes: int
    domains: Mapping[str, tuple[float, float]]

    def pattern(self) -> dict[str, float]:
        """Shrunk rough offset per domain."""
        return {name: s / (v + RIDGE) for name, (s, v) in self.domains.items()}

    def is_significant(self) -> bool:
        """Whether the residuals are significant: chi-square more than four standard deviations above its mean."""
        n = len(self.domains)
        return sum(s * s / max(v, 1e-9) for s, v in self.domains.values()) > n + 4 * math.sqrt(2 * n)


def evidence(votes: Votes, q: Doubles) -> dict[str, Evidence]:
    """Each user's evidence, from votes [n] and the expected P(right) of an average user [n]."""
    counts: dict[str, int] = {}
    sums: dict[str, dict[str, tuple[float, float]]] = {}
    for row, expected in zip(votes.rows, q.tolist(), strict=True):
        counts[row.user] = counts.get(row.user, 0) + 1
        domains = sums.setdefault(row.user, {})
        for name, share in domain_shares(row.features).items():
            s, v = domains.get(name, (0.0, 0.0))
            domains[name] = s + share * (row.right - expected), v + share * expected * (1 - expected)
    return {user: Evidence(n, sums[user]) for user, n in counts.items()}


def domain_shares(features: Mapping[str, float]) -> dict[str, float]:
    """Domain probabilities of a question, normalised to sum 1; without router signals all in the domain ""."""
    found = {name: max(x, 0.0) for name, x in features.items() if name.startswith(DOMAIN)}
    total = sum(found.values())
    return {name: x / total for name, x in found.items()} if total > 0 else {"": 1.0}


def offsets(own: Evidence, others: Sequence[Evidence] = ()) -> dict[str, float]:
    """Offset per domain, within +-`MAX_OFFSET`; empty below `MIN_VOTES`. `others` are candidate neighbours."""
    if own.votes < MIN_VOTES:
        return {}
    overall = _shrunk(sum(s for s, _ in own.domains.values()), sum(v for _, v in own.domains.values()))
    start = dict.fromkeys(own.domains, overall) | _neighbour_offsets(own, others)
    found = {}
    for name, (s, v) in own.domains.items():
        offset = start[name] + _shrunk(s - start[name] * v, v)
        found[name] = min(max(offset, -MAX_OFFSET), MAX_OFFSET)
    return found


def _shrunk(surprise: float, variance: float) -> float:
    beyond = max(abs(surprise) - 2 * math.sqrt(variance), 0.0)
    return math.copysign(min(beyond / (variance + RIDGE), MAX_OFFSET), surprise)


def _neighbour_offsets(own: Evidence, others: Sequence[Evidence]) -> dict[str, float]:
    """Pooled offsets of the most similar users in this user's domains; empty if no user is similar, or if the user's
    own votes do not deviate significantly (similarity would then only reflect noise).
    """
    mine = own.pattern() if own.is_significant() else {}
    similar = sorted(((_cosine(mine, other.pattern()), i) for i, other in enumerate(others)), reverse=True)
    near = [(similarity, others[i]) for similarity, i in similar[:MAX_NEIGHBOURS] if similarity >= MIN_SIMILARITY]
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
