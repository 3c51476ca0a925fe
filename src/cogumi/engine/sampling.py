"""From logits to tokens and signals: pure numpy, row by row; a row's result does not depend on its batch.

The logits processor of a request (bias, penalties, grammar, end tokens) comes first. Temperature 0 is greedy: the
lowest id among the largest logits. Otherwise temperature, the best ids (top-k), those near the best (min-p, Nguyen et
al. 2407.01082), and nucleus sampling (top-p, Holtzman et al. 2020) with one uniform number of the request's own
generator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cogumi.core.errors import RequestError
from cogumi.core.types import Request

Floats = NDArray[np.floating]
Signals: TypeAlias = tuple[float, float, float]
"""Log-probability of the chosen token, entropy, and difference of the two best log-probabilities, in nats."""
MAX_LOGPROBS = 20
MAX_STOPS = 64
_TYPES: dict[str, tuple[type, ...]] = {
    "max_tokens": (int, type(None)),
    "min_tokens": (int,),
    "logprobs": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "min_p": (int, float),
    "presence_penalty": (int, float),
    "frequency_penalty": (int, float),
    "repetition_penalty": (int, float),
    "seed": (int, type(None)),
    "stop": (tuple,),
    "logit_bias": (Mapping,),
    "grammar": (str, type(None)),
    "json_schema": (str, type(None)),
    "lark": (str, type(None)),
}
MAX_BIAS, MAX_PENALTY, MAX_REPETITION, MAX_TEMPERATURE = 100.0, 2.0, 10.0, 100.0


def check(request: Request) -> None:
    """Raise `RequestError` for invalid sampling parameters."""
    for name, kinds in _TYPES.items():
        value = getattr(request, name)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise RequestError(f"{name} is {value!r}; give {' or '.join(kind.__name__ for kind in kinds)}")
    if not all(isinstance(stop, str) for stop in request.stop) or len(request.stop) > MAX_STOPS:
        raise RequestError(f"stop must be a tuple of at most {MAX_STOPS} strings")
    if request.max_tokens is not None and request.max_tokens < (0 if request.echo and not request.hidden else 1):
        raise RequestError(f"max_tokens is {request.max_tokens}; ask for at least 1 token, or for 0 with echo")
    if not 0 <= request.temperature <= MAX_TEMPERATURE:
        raise RequestError(f"temperature is {request.temperature}; give 0 (greedy) up to {MAX_TEMPERATURE:g}")
    if not 0 < request.top_p <= 1:
        raise RequestError(f"top_p is {request.top_p}; give a number above 0 and up to 1")
    if request.top_k < 0:
        raise RequestError(f"top_k is {request.top_k}; give a number from 1 up, or 0 for all tokens")
    if not 0 <= request.min_p <= 1:
        raise RequestError(f"min_p is {request.min_p}; give a number from 0 to 1")
    if not 0 < request.repetition_penalty <= MAX_REPETITION:
        penalty = request.repetition_penalty
        raise RequestError(f"repetition_penalty is {penalty}; give a number above 0 and up to {MAX_REPETITION:g}")
    if request.min_tokens < 0:
        raise RequestError(f"min_tokens is {request.min_tokens}; give a number from 0 up")
    constraints = [one for one in (request.grammar, request.json_schema, request.lark) if one is not None]
    if request.min_tokens and constraints:
        raise RequestError("min_tokens and a grammar or JSON schema exclude each other: the grammar says where to end")
    if not 0 <= request.logprobs <= MAX_LOGPROBS:
        raise RequestError(f"logprobs is {request.logprobs}; give 0 to {MAX_LOGPROBS}")
    if request.seed is not None and request.seed < 0:
        raise RequestError(f"seed is {request.seed}; give a number from 0 up")
    if not all(request.stop):
        raise RequestError("a stop string is empty; give at least one character")
    for name in ("presence_penalty", "frequency_penalty"):
        if not abs(penalty := getattr(request, name)) <= MAX_PENALTY:
            raise RequestError(f"{name} is {penalty}; give a number from -{MAX_PENALTY:g} to {MAX_PENALTY:g}")
    for token, bias in request.logit_bias.items():
        numbers = isinstance(token, int) and isinstance(bias, (int, float)) and bool not in (type(token), type(bias))
        if not numbers or token < 0 or not abs(bias) <= MAX_BIAS:
            raise RequestError(f"logit_bias of token {token!r} is {bias!r}; give ids from 0 up and -100 to 100")
    if len(constraints) > 1:
        raise RequestError("a request has several grammars or JSON schemas; give one of them")


class Grammar(Protocol):
    """The tokens allowed after those accepted so far."""

    def allows(self, token: int) -> bool:
        """Whether a token is allowed next."""

    def mask(self, logits: NDArray[np.float32]) -> None:
        """Set the logits of forbidden tokens to minus infinity, in place; `RequestError` if none is allowed."""

    def accept(self, token: int) -> None:
        """Advance by one token; `RequestError` if it is not allowed."""


class LogitsProcessor:
    """Changes a request's logits: bias, penalties, grammar, end tokens that come too early."""

    def __init__(self, request: Request, prompt: Sequence[int], ends: Collection[int], grammar: Grammar | None) -> None:
        self._bias = request.logit_bias
        self._presence, self._frequency = request.presence_penalty, request.frequency_penalty
        self._repetition = request.repetition_penalty
        self._seen = set(prompt) if self._repetition != 1 else set[int]()
        self._generated: Counter[int] = Counter()
        self._before_end, self._ends = request.min_tokens, list(ends)
        self._grammar = grammar

    @staticmethod
    def of(
        request: Request, prompt: Sequence[int], ends: Collection[int], grammar: Grammar | None = None
    ) -> LogitsProcessor | None:
        """The processor of a request with these prompt ids, by an engine whose answers end with one of `ends`; None if
        it does not change logits.
        """
        penalties = request.presence_penalty or request.frequency_penalty or request.repetition_penalty != 1
        needed = request.logit_bias or penalties or request.min_tokens or grammar
        return LogitsProcessor(request, prompt, ends, grammar) if needed else None

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The processed logits (V,), as a new array."""
        row = self._shifted(logits)
        if self._grammar:
            self._grammar.mask(row)
        return row

    def best(self, logits: NDArray[np.float32]) -> int:
        """The greedy choice from one row (V,); masks by the grammar only if the best token is forbidden."""
        row = self._shifted(logits)
        token = int(row.argmax())
        if self._grammar and not self._grammar.allows(token):
            self._grammar.mask(row)
            token = int(row.argmax())
        return token

    def accept(self, token: int) -> None:
        """Record one generated token."""
        self._generated[token] += 1
        self._before_end = max(0, self._before_end - 1)
        if self._grammar:
            self._grammar.accept(token)

    def _shifted(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        row = logits.copy()
        if self._repetition != 1:
            seen = list(self._seen.union(self._generated))
            row[seen] = np.where(row[seen] > 0, row[seen] / self._repetition, row[seen] * self._repetition)
        for token, bias in self._bias.items():
            row[token] += bias
        if self._presence or self._frequency:
            for token, n in self._generated.items():
                row[token] -= self._presence + n * self._frequency
        if self._before_end:
            row[self._ends] = -np.inf
        return row


def distribution(logits: Floats, request: Request) -> NDArray[np.float64]:
    """The distribution (V,) that a request samples from, of one row of processed logits (V,)."""
    return probabilities(logits, request.temperature, request.top_p, request.top_k, request.min_p)


def probabilities(
    logits: Floats, temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> NDArray[np.float64]:
    """The sampling distribution (V,) of one row of logits (V,).

    Top-k keeps the `top_k` best tokens (0: all), then min-p those with at least `min_p` times the probability of the
    best, then top-p the smallest set of best tokens whose mass reaches `top_p` (ties: lower id); never none.
    """
    if temperature == 0:
        one_hot = np.zeros(logits.shape[-1])
        one_hot[logits.argmax()] = 1.0
        return one_hot
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    p = np.exp(shifted / temperature)
    if 0 < top_k < len(p):
        p[np.argsort(-p, kind="stable")[top_k:]] = 0.0
    if min_p:
        p[p < min_p * p.max()] = 0.0
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        reached = np.searchsorted(np.cumsum(p[order]), top_p)
        p[order[reached + 1 :]] = 0.0
        p /= p.sum()
    return p


def draw(p: NDArray[np.float64], generator: np.random.Generator) -> int:
    """Draw one id from the distribution `p` (V,) by inversion; uses exactly one uniform number."""
    mass = np.cumsum(p)
    return int(min(np.searchsorted(mass, generator.random() * mass[-1], side="right"), np.flatnonzero(p)[-1]))


def signals(logits: NDArray[np.float32], chosen: NDArray[np.integer]) -> list[Signals]:
    """Signals of the chosen id (n,) in each row of logits (n, V), at temperature 1."""
    rows = np.arange(len(logits))
    best = logits.argmax(axis=1)
    shifted = logits - logits[rows, best][:, None]
    weight = np.exp(shifted)
    total = weight.sum(axis=1)
    log_total = np.log(total)
    logprob = shifted[rows, chosen] - log_total
    entropy = log_total - np.einsum("nv,nv->n", weight, shifted) / total
    shifted[rows, best] = -np.inf
    margin = -shifted.max(axis=1)
    return list(zip(logprob.tolist(), entropy.tolist(), margin.tolist(), strict=True))


def logprobs_of(logits: NDArray[np.float32], ids: NDArray[np.integer]) -> NDArray[np.float32]:
    """Log-probability of one id per row: logits (n, V), ids (n,) -> (n,)."""
    top = logits.max(axis=1)
    total = np.empty(len(logits), np.float32)
    weights = np.empty(logits.shape[1], np.float32)  # row by row in the cache: half the time of all rows at once
    for i, row in enumerate(logits):
        np.subtract(row, top[i], out=weights)
        total[i] = np.exp(weights, out=weights).sum()
    logprobs: NDArray[np.float32] = logits[np.arange(len(logits)), ids] - top - np.log(total)
    return logprobs


def top_logprobs(logits: NDArray[np.float32], n: int) -> tuple[tuple[int, float], ...]:
    """The `n` best (id, logprob) of one row of logits (V,), best first, ties to the lower id."""
    if n == 0:
        return ()
    top = logits.max()
    log_total = np.log(np.exp(logits - top).sum())
    if n < len(logits):
        bound = np.partition(logits, -n)[-n]
        candidates = np.flatnonzero(logits >= bound)
    else:
        candidates = np.arange(len(logits))
    best = candidates[np.argsort(-logits[candidates], kind="stable")[:n]]
    return tuple((int(i), float(logits[i] - top - log_total)) for i in best)
