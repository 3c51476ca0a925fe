"""Speculative decoding, the pure part: verification of drafts, and the choice of the draft length (SPEC E2).

Verification follows Leviathan et al. 2023 and Chen et al. 2023: a token drawn from the draft's q is accepted with
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

from cogumi.engine.llama.speculative.latency_model import MAX_DRAFT, LatencyCurve, LatencyTracker
from cogumi.engine.sampling import draw

Row: TypeAlias = NDArray[np.float64]
Source: TypeAlias = Literal["model", "ngram"]

PRIOR, PRIOR_WEIGHT = 0.7, 4.0
"""Prior acceptance rate, and its weight in tested tokens."""
SEED_WEIGHT = 24.0
"""Weight, in tested tokens, of the engine's acceptance rate as the prior of a new request."""
ENGINE_MEMORY, MEMORY = 400.0, 80.0
"""Window of an acceptance rate in tested tokens: of the engine, and of one request."""
PROBE_SHARE, PROBE_STEPS = 0.01, 3.0
"""Exploration budget: share of the time that probes may lose, and its maximum (also initial) value in plain steps."""


def verify_greedy(drafted: Sequence[int], best: Callable[[int], int]) -> list[int]:
    """Tokens to emit: drafted ones while they equal the verifier's choice, then its next choice; 1 to k + 1 tokens.

    `best(i)` is the verifier's choice after i emitted tokens. It is called in order, once per i, and only as far as
    needed: a row may depend on the tokens emitted before it (penalties, a grammar).
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

    `p(i)` is the verifier's distribution after i emitted tokens, called as in `verify_greedy`. `q` holds the
    distributions (V,) that the k drafted ids were drawn from; None for a deterministic draft. All but the last emitted
    token are accepted drafted tokens.
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
    """Throughput with `k` drafted tokens per round, relative to plain decoding.

    `draft_cost` is the time of one drafted token, `verify_costs[i]` that of a base pass over i + 1 tokens.
    """
    seconds = k * draft_cost + verify_costs[k]
    return expected_tokens(acceptance, k) * verify_costs[0] / seconds


def best_k(acceptance: float, draft_cost: float, verify_costs: Sequence[float]) -> int:
    """The number of drafted tokens, 0 included, with the best expected throughput (the smallest on ties)."""
    speedups = [expected_speedup(acceptance, k, draft_cost, verify_costs) for k in range(len(verify_costs))]
    return int(np.argmax(speedups))


class Acceptance:
    """Running acceptance rate of drafted tokens; `prior` initially counts as `weight` tokens.

    Only tested tokens count: those after the first rejection of a round are not verified. Observations older than
    `memory` tested tokens fade, and so does the prior. A prior that is an `Acceptance` is evaluated at use: a request
    starts from the engine's current rate.
    """

    __slots__ = ("_accepted", "_memory", "_prior", "_tested", "_weight")

    def __init__(
        self, prior: float | Acceptance = PRIOR, weight: float = PRIOR_WEIGHT, memory: float = ENGINE_MEMORY
    ) -> None:
        self._accepted = self._tested = 0.0
        self._prior, self._weight, self._memory = prior, weight, memory

    def update(self, drafted: int, accepted: int) -> None:
        """Add one round."""
        self._accepted += accepted
        self._tested += min(accepted + 1, drafted)
        if self._tested > self._memory:
            self._accepted *= self._memory / self._tested
            self._tested = self._memory

    @property
    def rate(self) -> float:
        """Estimated probability that the next drafted token is accepted."""
        prior = self._prior if isinstance(self._prior, float) else self._prior.rate
        weight = self._weight * (1 - self._tested / self._memory)
        return (self._accepted + prior * weight) / (self._tested + weight)


class Tracker:
    """Acceptance rates of one request, by source."""

    __slots__ = ("acceptance", "credit")

    def __init__(self, acceptance: Mapping[Source, Acceptance]) -> None:
        self.acceptance = acceptance
        self.credit = 0.0  # seconds returned to the budget for each accepted token of the running probe


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """A decoding request, and the number of tokens each source can draft for it now (absent or 0: none)."""

    tracker: Tracker
    limits: Mapping[Source, int]


@dataclass(frozen=True, slots=True)
class Choice:
    """Draft `k` tokens from `source`; a step without drafting has k = 0 and source None."""

    source: Source | None
    k: int


@dataclass(slots=True)
class StepPlan:
    """One choice per request, with the expected number of tokens and seconds of the step."""

    choices: list[Choice]
    tokens: float
    seconds: float


NO_DRAFT = Choice(None, 0)


class Controller:
    """Chooses the draft length of every request in each step, to maximise accepted tokens per second.

    One batch serves all requests of a step: drafting requests share one k (or have fewer tokens if their source has no
    more), the others one token each. Probes explore: they draft although the estimates advise against it, and may lose
    `PROBE_SHARE` of the time. Used by one thread.
    """

    def __init__(self, latency: LatencyCurve) -> None:
        self._latency, self._latency_tracker = latency, LatencyTracker(latency)
        self._known: dict[Source, Acceptance] = {"model": Acceptance(), "ngram": Acceptance()}
        self._tables: dict[tuple[int, bool], list[list[float]]] = {}
        self._budget = PROBE_STEPS * latency.step

    def tracker(self) -> Tracker:
        """Acceptance rates of a new request, with the engine's rates as prior."""
        return Tracker({s: Acceptance(known, SEED_WEIGHT, MEMORY) for s, known in self._known.items()})

    def rate(self, source: Source) -> float:
        """Running acceptance rate over all requests."""
        return self._known[source].rate

    def speedup(self) -> float:
        """Best expected speed-up by drafting (k > 0) for a single request; drafting does not pay up to 1.

        With the draft model if there is one, else with n-grams.
        """
        draft, verify = self._latency.draft, self._latency.verify
        rate = self.rate("model" if draft else "ngram")
        return max((expected_speedup(rate, k, draft, verify) for k in range(1, len(verify))), default=0.0)

    @property
    def latency(self) -> LatencyCurve:
        """The current latency curve."""
        return self._latency

    def observe(self, tokens: int, seconds: float) -> None:
        """Record the duration of one base pass over `tokens` tokens."""
        self._update(self._latency_tracker.observe(tokens, seconds))

    def observe_draft(self, requests: int, seconds: float) -> None:
        """Record the duration of one draft step for `requests` requests."""
        self._update(self._latency_tracker.observe(0, seconds * self._latency.step / self._latency.seconds(requests)))

    def _update(self, latency: LatencyCurve) -> None:
        if latency != self._latency:
            self._latency = latency
            self._tables.clear()

    def learn(self, tracker: Tracker, source: Source, drafted: int, accepted: int) -> None:
        """Add a verification result. An n-gram proposal only compared with the next token counts as 1 drafted."""
        self._known[source].update(drafted, accepted)
        tracker.acceptance[source].update(drafted, accepted)
        if source == "model":
            self._budget += tracker.credit * accepted
            tracker.credit = 0.0

    def plan(self, options: Sequence[DraftOptions]) -> list[Choice]:
        """One choice per request: the best estimate, occasionally with a probe of the draft model.

        N-grams need no probes: comparing their proposals costs nothing.
        """
        plan = self.best(options)
        self._budget = min(self._budget + PROBE_SHARE * plan.seconds, PROBE_STEPS * self._latency.step)
        if self._budget > 0:
            self._probe(options, plan)
        return plan.choices

    def best(self, options: Sequence[DraftOptions]) -> StepPlan:
        """The plan with the most expected tokens per second at the current acceptance rates."""
        n = len(options)
        plan = StepPlan([NO_DRAFT] * n, n, self._latency.seconds(n) if n else 0.0)
        free = self._table(n, False) if any(option.limits.get("ngram") for option in options) else []
        paid = self._table(n, True) if any(option.limits.get("model") for option in options) else []
        if not (free or paid):
            return plan
        ngram = [_gains(option, "ngram") for option in options]
        both = (
            [_larger(own, _gains(option, "model")) for own, option in zip(ngram, options, strict=True)] if paid else []
        )
        rate, found = n / plan.seconds, None
        for gains, table in ((ngram, free), (both, paid)):
            most = n + sum(max(own) for own in gains if own)
            for k, (column, seconds) in enumerate(zip(zip_longest(*gains, fillvalue=0.0), table, strict=False), 1):
                if most <= rate * min(seconds[1], seconds[-1]):
                    break  # longer drafts only take longer
                able = sorted(filter(None, column), reverse=True)
                rates = list(map(truediv, accumulate(able, initial=n), seconds))
                top = max(rates)
                if top > rate:
                    rate, found = top, (gains, k, rates.index(top))
        if found:
            gains, k, m = found
            drafted = self._assign(gains, k, m, 0.0 if gains is ngram else k * self._latency.drafting(m), plan)
            for i, own in enumerate(drafted):
                if own:
                    free_too = len(ngram[i]) >= own and ngram[i][own - 1] == gains[i][own - 1]
                    plan.choices[i] = Choice("ngram" if free_too else "model", own)
        return plan

    def _assign(self, gains: Sequence[list[float]], k: int, m: int, drafting: float, plan: StepPlan) -> list[int]:
        """Tokens to draft per request: k for the m requests of highest gain; shorter drafts are added if they pay."""
        drafted = [0] * len(gains)
        order = sorted((i for i, own in enumerate(gains) if own), key=lambda i: -gains[i][:k][-1])
        for i in [i for i in order if len(gains[i]) >= k][:m]:
            drafted[i] = k
            plan.tokens += gains[i][k - 1]
        plan.seconds = self._latency.passes(drafted) + drafting
        for i in order:
            if len(gains[i]) < k:
                drafted[i] = len(gains[i])
                tokens, seconds = plan.tokens + gains[i][-1], self._latency.passes(drafted) + drafting
                if tokens * plan.seconds > plan.tokens * seconds:
                    plan.tokens, plan.seconds = tokens, seconds
                else:
                    drafted[i] = 0
        return drafted

    def _probe(self, options: Sequence[DraftOptions], plan: StepPlan) -> None:
        """Let requests draft that would not, at the k with the least expected loss among those that may pay."""
        gains = {i: _gains(options[i], "model") for i, choice in enumerate(plan.choices) if not choice.k}
        if not any(gains.values()) or not self._table(len(options), True):
            return
        token = plan.seconds / plan.tokens
        least, found = math.inf, None
        shared = max(choice.k for choice in plan.choices)
        for k in [shared] if shared else range(1, max(map(len, gains.values())) + 1):
            joining = [i for i, own in gains.items() if len(own) >= k]
            drafted = [choice.k for choice in plan.choices]
            for i in joining:
                drafted[i] = k
            cost = self._latency.passes(drafted) + k * self._latency.drafting(len(joining)) - plan.seconds
            loss = cost - token * sum(gains[i][k - 1] for i in joining)
            if cost < token * k * len(joining) and loss < least:
                least, found = loss, (k, joining, cost)
        if found:
            k, joining, cost = found
            self._budget -= cost
            for i in joining:
                options[i].tracker.credit = token
                plan.choices[i] = Choice("model", k)

    def _table(self, n: int, drafting: bool) -> list[list[float]]:
        """Seconds of steps in which m of n requests draft k tokens, [k - 1][m], up to the last k that may pay."""
        key = (n, drafting)
        if key not in self._tables:
            latency, plain = self._latency, self._latency.seconds(n)
            steps = [latency.drafting(m) if drafting else 0.0 for m in range(n + 1)]
            table = []
            for k in range(1, MAX_DRAFT + 1):
                drafted = [latency.passes([k] * m + [0] * (n - m)) + k * steps[m] for m in range(1, n + 1)]
                table.append([plain, *drafted])
            while table and all((n + m * len(table)) * plain <= n * seconds for m, seconds in enumerate(table[-1])):
                table.pop()
            self._tables[key] = table
        return self._tables[key]


def _larger(a: list[float], b: list[float]) -> list[float]:
    """The gains of the better source at each k, continued by those of the longer one."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    return longer if not shorter or longer[0] >= shorter[0] else shorter + longer[len(shorter) :]


def _gains(option: DraftOptions, source: Source) -> list[float]:
    """Expected number of accepted tokens for 1, 2, .. drafted ones, up to the source's limit."""
    limit = option.limits.get(source, 0)
    return _accepted(round(option.tracker.acceptance[source].rate * 1000))[:limit] if limit else []


@lru_cache(maxsize=1001)
def _accepted(permille: int) -> list[float]:
    return list(accumulate(accumulate(repeat(permille / 1000, MAX_DRAFT), mul)))
