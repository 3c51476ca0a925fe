"""Speculative decoding, the pure part: what to accept of a draft, and when drafting pays (SPEC E2).

Acceptance follows Leviathan et al. 2023 and Chen et al. 2023: a token drawn from the draft's q is kept with
probability min(1, p/q), else one is drawn from the residual max(p - q, 0). The result is distributed exactly
as p; at temperature 0 it is the verifier's own greedy choice. Expected tokens assume that each drafted token is
accepted independently; exploration within a budget follows conservative bandits (Wu et al. 2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, repeat, zip_longest
from operator import mul, truediv
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cogumi.engine.llama.speculative.latency_model import MOST, Costs, Pace
from cogumi.engine.sampling import draw

Row: TypeAlias = NDArray[np.float64]
Source: TypeAlias = Literal["model", "ngram"]

PRIOR, PRIOR_WEIGHT = 0.7, 4.0
"""Acceptance assumed before anything is known, and the tested tokens that it is worth."""
SEED_WEIGHT = 24.0
"""Tested tokens that the engine's acceptance is worth to a new request."""
ENGINE_MEMORY, MEMORY = 400.0, 80.0
"""Tested tokens after which old ones fade: of all requests, and of one."""
PROBE_SHARE, PROBE_STEPS = 0.01, 3.0
"""Share of the time that probes may lose, and the plain steps that they may lose at once, as at the start."""


def verify_greedy(drafted: Sequence[int], best: Callable[[int], int]) -> list[int]:
    """Tokens to emit: drafted ones while they equal the verifier's own, then its own next; 1 to k + 1 of them.

    `best(i)` is the verifier's choice after i emitted tokens. It is asked in order, each i once, and only as far
    as needed: a row may depend on what was emitted before it (penalties, a grammar).
    """
    emitted: list[int] = []
    for i, token in enumerate(drafted):
        emitted.append(best(i))
        if emitted[i] != token:
            return emitted
    emitted.append(best(len(drafted)))
    return emitted


def verify_sampled(
    drafted: Sequence[int], q: Sequence[Row] | None, p: Callable[[int], Row], generator: np.random.Generator
) -> list[int]:
    """Tokens to emit, 1 to k + 1 of them, distributed as if each had been drawn from its own p (V,).

    `p(i)` is the verifier's distribution after i emitted tokens, asked as in `verify_greedy`. `q` holds the
    distributions (V,) that the k drafted ids were drawn from; None means that the draft was deterministic. All
    but the last emitted token are drafted ones that were accepted.
    """
    for i, token in enumerate(drafted):
        row = p(i)
        keep = row[token] if q is None else row[token] / q[i][token]
        if generator.random() < keep:
            continue
        residual = row.copy()
        if q is None:
            residual[token] = 0.0
        else:
            np.maximum(residual - q[i], 0.0, out=residual)
        return [*drafted[:i], draw(residual if residual.any() else row, generator)]
    return [*drafted, draw(p(len(drafted)), generator)]


def expected_tokens(acceptance: float, k: int) -> float:
    """Mean tokens per round when each of `k` drafted tokens is accepted with probability `acceptance`."""
    return float(k + 1) if acceptance >= 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)


def expected_speedup(acceptance: float, k: int, draft_cost: float, verify_costs: Sequence[float]) -> float:
    """Throughput with `k` drafted tokens per round over plain decoding.

    `draft_cost` is the time of one drafted token, `verify_costs[i]` that of a base pass over i + 1 tokens.
    """
    seconds = k * draft_cost + verify_costs[k]
    return expected_tokens(acceptance, k) * verify_costs[0] / seconds


def best_k(acceptance: float, draft_cost: float, verify_costs: Sequence[float]) -> int:
    """The number of drafted tokens, 0 included, with the best expected throughput (the smallest on ties)."""
    speedups = [expected_speedup(acceptance, k, draft_cost, verify_costs) for k in range(len(verify_costs))]
    return int(np.argmax(speedups))


class Acceptance:
    """Running share of drafted tokens that the verifier accepts; `prior` counts as so many tokens at first.

    Only tested tokens count: those behind the first rejection of a round were never looked at. What lies more
    than `memory` tested tokens back fades, and so does the prior. A prior that is itself an `Acceptance` is
    followed: a request on a new text starts from what the engine knows by then.
    """

    __slots__ = ("_accepted", "_memory", "_prior", "_tested", "_weight")

    def __init__(
        self, prior: float | Acceptance = PRIOR, weight: float = PRIOR_WEIGHT, memory: float = ENGINE_MEMORY
    ) -> None:
        self._accepted = self._tested = 0.0
        self._prior, self._weight, self._memory = prior, weight, memory

    def update(self, drafted: int, accepted: int) -> None:
        """Count one round."""
        self._accepted += accepted
        self._tested += min(accepted + 1, drafted)
        if self._tested > self._memory:
            self._accepted *= self._memory / self._tested
            self._tested = self._memory

    @property
    def rate(self) -> float:
        """Probability that the next drafted token is accepted, as far as known."""
        prior = self._prior if isinstance(self._prior, float) else self._prior.rate
        weight = self._weight * (1 - self._tested / self._memory)
        return (self._accepted + prior * weight) / (self._tested + weight)


class Tracker:
    """What is known of one request: an acceptance per source."""

    __slots__ = ("acceptance", "credit")

    def __init__(self, acceptance: Mapping[Source, Acceptance]) -> None:
        self.acceptance = acceptance
        self.credit = 0.0  # seconds that an accepted token of the probe under way earns back


@dataclass(frozen=True, slots=True)
class Wish:
    """A request that writes, and how many tokens each source could draft for it now (absent or 0: it cannot)."""

    tracker: Tracker
    limits: Mapping[Source, int]


@dataclass(frozen=True, slots=True)
class Choice:
    """`k` tokens to draft from `source`; for a plain step k is 0 and source None."""

    source: Source | None
    k: int


@dataclass(slots=True)
class Turn:
    """One choice per request, and what they are expected to bring: tokens, and seconds for all."""

    choices: list[Choice]
    tokens: float
    seconds: float


PLAIN = Choice(None, 0)


class Controller:
    """Chooses for every turn who drafts how much, so that most tokens are settled per second.

    One batch serves all requests of a turn: those who draft share one k (or have fewer, if their source has no
    more), the others have a pass over one token each. What is not known is found out by probes, which draft
    where the estimates advise against it, and may lose `PROBE_SHARE` of the time. Belongs to one thread.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs, self._pace = costs, Pace(costs)
        self._known: dict[Source, Acceptance] = {"model": Acceptance(), "ngram": Acceptance()}
        self._tables: dict[tuple[int, bool], list[list[float]]] = {}
        self._budget = PROBE_STEPS * costs.step

    def tracker(self) -> Tracker:
        """For a new request: what the engine knows, worth a few tokens."""
        return Tracker({s: Acceptance(known, SEED_WEIGHT, MEMORY) for s, known in self._known.items()})

    def rate(self, source: Source) -> float:
        """Running acceptance of all requests."""
        return self._known[source].rate

    def speedup(self) -> float:
        """Best expected speed-up by drafting (k > 0) for one request alone; up to 1 it does not pay.

        From the draft model if there is one, else from n-grams where any are found.
        """
        draft, verify = self._costs.draft, self._costs.verify
        rate = self.rate("model" if draft else "ngram")
        return max((expected_speedup(rate, k, draft, verify) for k in range(1, len(verify))), default=0.0)

    @property
    def costs(self) -> Costs:
        """What passes cost, as far as known."""
        return self._costs

    def observe(self, tokens: int, seconds: float) -> None:
        """Take note of what one base pass over so many tokens took."""
        self._follow(self._pace.observe(tokens, seconds))

    def observe_draft(self, requests: int, seconds: float) -> None:
        """Take note of what one draft step for so many requests took."""
        self._follow(self._pace.observe(0, seconds * self._costs.step / self._costs.seconds(requests)))

    def _follow(self, costs: Costs) -> None:
        if costs != self._costs:
            self._costs = costs
            self._tables.clear()

    def learn(self, tracker: Tracker, source: Source, drafted: int, accepted: int) -> None:
        """Count a verification. N-gram proposals merely compared with the token that came count as drafted 1."""
        self._known[source].update(drafted, accepted)
        tracker.acceptance[source].update(drafted, accepted)
        if source == "model":
            self._budget += tracker.credit * accepted
            tracker.credit = 0.0

    def plan(self, wishes: Sequence[Wish]) -> list[Choice]:
        """One choice per wish: the best as far as known, now and then with a probe of the draft model.

        N-grams need no probes: comparing them costs nothing.
        """
        turn = self.best(wishes)
        self._budget = min(self._budget + PROBE_SHARE * turn.seconds, PROBE_STEPS * self._costs.step)
        if self._budget > 0:
            self._probe(wishes, turn)
        return turn.choices

    def best(self, wishes: Sequence[Wish]) -> Turn:
        """The turn with the most expected tokens per second at the running acceptances."""
        n = len(wishes)
        turn = Turn([PLAIN] * n, n, self._costs.seconds(n) if n else 0.0)
        free = self._table(n, False) if any(wish.limits.get("ngram") for wish in wishes) else []
        paid = self._table(n, True) if any(wish.limits.get("model") for wish in wishes) else []
        if not (free or paid):
            return turn
        ngram = [_gains(wish, "ngram") for wish in wishes]
        both = [_larger(own, _gains(wish, "model")) for own, wish in zip(ngram, wishes, strict=True)] if paid else []
        rate, found = n / turn.seconds, None
        for gains, table in ((ngram, free), (both, paid)):
            most = n + sum(max(own) for own in gains if own)
            for k, (column, seconds) in enumerate(zip(zip_longest(*gains, fillvalue=0.0), table, strict=False), 1):
                if most <= rate * min(seconds[1], seconds[-1]):
                    break  # longer drafts take longer still
                able = sorted(filter(None, column), reverse=True)
                rates = list(map(truediv, accumulate(able, initial=n), seconds))
                top = max(rates)
                if top > rate:
                    rate, found = top, (gains, k, rates.index(top))
        if found:
            gains, k, m = found
            drafted = self._assign(gains, k, m, 0.0 if gains is ngram else k * self._costs.drafting(m), turn)
            for i, own in enumerate(drafted):
                if own:
                    free_too = len(ngram[i]) >= own and ngram[i][own - 1] == gains[i][own - 1]
                    turn.choices[i] = Choice("ngram" if free_too else "model", own)
        return turn

    def _assign(self, gains: Sequence[list[float]], k: int, m: int, drafting: float, turn: Turn) -> list[int]:
        """Tokens to draft per request: k for the m with most to gain; those who have fewer join if that pays."""
        drafted = [0] * len(gains)
        order = sorted((i for i, own in enumerate(gains) if own), key=lambda i: -gains[i][:k][-1])
        for i in [i for i in order if len(gains[i]) >= k][:m]:
            drafted[i] = k
            turn.tokens += gains[i][k - 1]
        turn.seconds = self._costs.passes(drafted) + drafting
        for i in order:
            if len(gains[i]) < k:
                drafted[i] = len(gains[i])
                tokens, seconds = turn.tokens + gains[i][-1], self._costs.passes(drafted) + drafting
                if tokens * turn.seconds > turn.tokens * seconds:
                    turn.tokens, turn.seconds = tokens, seconds
                else:
                    drafted[i] = 0
        return drafted

    def _probe(self, wishes: Sequence[Wish], turn: Turn) -> None:
        """Let those draft who would not: at the k that is expected to lose least, of those that may pay at all."""
        gains = {i: _gains(wishes[i], "model") for i, choice in enumerate(turn.choices) if not choice.k}
        if not any(gains.values()) or not self._table(len(wishes), True):
            return
        token = turn.seconds / turn.tokens
        least, found = math.inf, None
        shared = max(choice.k for choice in turn.choices)
        for k in [shared] if shared else range(1, max(map(len, gains.values())) + 1):
            joining = [i for i, own in gains.items() if len(own) >= k]
            drafted = [choice.k for choice in turn.choices]
            for i in joining:
                drafted[i] = k
            cost = self._costs.passes(drafted) + k * self._costs.drafting(len(joining)) - turn.seconds
            loss = cost - token * sum(gains[i][k - 1] for i in joining)
            if cost < token * k * len(joining) and loss < least:
                least, found = loss, (k, joining, cost)
        if found:
            k, joining, cost = found
            self._budget -= cost
            for i in joining:
                wishes[i].tracker.credit = token
                turn.choices[i] = Choice("model", k)

    def _table(self, n: int, drafting: bool) -> list[list[float]]:
        """Seconds of turns in which m of n requests draft k tokens, [k - 1][m], up to the last k that may pay."""
        key = (n, drafting)
        if key not in self._tables:
            costs, plain = self._costs, self._costs.seconds(n)
            steps = [costs.drafting(m) if drafting else 0.0 for m in range(n + 1)]
            table = []
            for k in range(1, MOST + 1):
                drafted = [costs.passes([k] * m + [0] * (n - m)) + k * steps[m] for m in range(1, n + 1)]
                table.append([plain, *drafted])
            while table and all((n + m * len(table)) * plain <= n * seconds for m, seconds in enumerate(table[-1])):
                table.pop()
            self._tables[key] = table
        return self._tables[key]


def _larger(a: list[float], b: list[float]) -> list[float]:
    """The larger gains of two sources at each k: those of the better one as far as it goes."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    return longer if not shorter or longer[0] >= shorter[0] else shorter + longer[len(shorter) :]


def _gains(wish: Wish, source: Source) -> list[float]:
    """Expected accepted tokens of 1, 2, .. drafted ones, as many as the source has."""
    limit = wish.limits.get(source, 0)
    return _accepted(round(wish.tracker.acceptance[source].rate * 1000))[:limit] if limit else []


@lru_cache(maxsize=1001)
def _accepted(permille: int) -> list[float]:
    return list(accumulate(accumulate(repeat(permille / 1000, MOST), mul)))
