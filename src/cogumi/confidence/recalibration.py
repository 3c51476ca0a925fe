"""Learning from votes: a bounded correction of P(correct) and how it is tested (SPEC F16).

A `Layer` moves the gate's logit by an offset, a change of slope, offsets per domain and a few signals. It is a
logistic regression by Newton steps with a ridge towards no change at all. Three rules keep it honest:

- **Nobody is many.** One user, and one answer given to many, count at most `SHARE` of the votes looked at. Votes of a
  user whose judgement has nothing to do with everybody's (always up, always the opposite) count nothing (`trust`).
- **Nothing is promoted on faith.** A candidate serves a tenth of the turns, chosen by a hash of their ids. It replaces
  what serves only if the Brier score there is at least `GAIN` better, and better at all with 95% confidence, errors
  clustered by user. The Brier score, because it is what a reader of "90% sure" cares about, is minimal at the truth,
  and no single vote can move it by more than one. A layer is withdrawn as soon as some stretch up to now has cost
  more than `HARM` beyond the uncorrected gate (Page's CUSUM test, 1954): so its total damage is bounded, however long
  a change goes on.
- **The promise of F4 is not touched by unproven corrections.** The guaranteed threshold was certified for the gate's
  own P(correct). So a layer may lower P(correct) freely, and raise it, but not across a threshold (`hold`): no answer
  becomes a confident one that was not before. Only a layer that is itself certified, by the same exact binomial bound
  at the same risk, on trusted votes it was not fitted on, may lift answers over the threshold; test number k has
  confidence 1 - (1 - confidence) / (k (k + 1)), so that all of them together err as rarely as one. The certificate
  assumes that rated answers are like the others and that the trusted votes are true (honest mistakes make it harder to
  get). Lowering means that a gate accepts fewer answers, so never more wrong ones than before; the *share* of wrong
  ones among those left is promised only as far as questions stay exchangeable, as without any layer.

Personal offsets (`confidence.personal`) never lift an answer over a threshold.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogumi.confidence.guarantee import Guarantee, upper_bound
from cogumi.confidence.logistic import newton
from cogumi.confidence.nets import sigmoid

SHARE = 0.005  # of the votes looked at, at most, from one user or on one answer
GAIN = 0.01  # of the Brier score
HARM = 3.0  # summed Brier score; a sound layer reaches it by chance about once in e**7 tries
CANARY = 0.1
LIMIT = 2.0  # nats by which a layer moves a logit at most
PRIOR = 50.0  # ridge: a domain that has seen this much information moves half the way
FURTHEST = 7.0  # logits beyond this are cut
SIGNALS = ("mean_logprob", "log_length")
DOMAIN = "domain_"
MODIFIER = "modifier"  # made of a signal that only modifiers' answers have
_Z95 = 1.645

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]


def logit(p: ArrayLike) -> Doubles:
    """log(p / (1 - p)), cut at +-`FURTHEST`."""
    edge = 1 / (1 + math.exp(FURTHEST))
    p = np.clip(np.asarray(p, dtype=np.float64), edge, 1 - edge)
    return np.asarray(np.log(p) - np.log1p(-p))


def features(signals: Mapping[str, float]) -> dict[str, float]:
    """What a layer sees of an answer besides P(correct)."""
    seen = {name: x for name, x in signals.items() if (name.startswith(DOMAIN) or name in SIGNALS) and math.isfinite(x)}
    return seen | {MODIFIER: float("base_p" in signals)}


@dataclass(frozen=True, slots=True)
class Vote:
    """One rated answer: `answer` names its content, so that equal ones are known as such."""

    id: str
    user: str
    answer: str
    p: float
    features: Mapping[str, float]
    right: bool


@dataclass(frozen=True, slots=True, eq=False)
class Votes:
    """Votes [n] as arrays, in the order they came. A user's later vote on the same answer id replaces the earlier."""

    rows: tuple[Vote, ...]
    user: Ints
    answer: Ints
    p: Doubles
    right: Doubles

    @classmethod
    def of(cls, votes: Iterable[Vote]) -> Votes:
        """Arrays of votes; those without a usable P(correct) are left out."""
        last: dict[tuple[str, str], Vote] = {}
        for vote in votes:
            if 0.0 <= vote.p <= 1.0:
                last.pop((vote.user, vote.id), None)
                last[vote.user, vote.id] = vote
        rows = tuple(last.values())
        codes = {name: _codes([getattr(row, name) for row in rows]) for name in ("user", "answer")}
        p = np.array([row.p for row in rows], dtype=np.float64)
        return cls(rows, codes["user"], codes["answer"], p, np.array([row.right for row in rows], dtype=np.float64))

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, kept: NDArray[np.bool_]) -> Votes:
        """The votes [n] where `kept`."""
        return Votes.of(row for row, keep in zip(self.rows, kept, strict=True) if keep)

    def column(self, name: str, missing: float) -> Doubles:
        """One feature [n]."""
        return np.array([row.features.get(name, missing) for row in self.rows], dtype=np.float64)


def _codes(names: Sequence[str]) -> Ints:
    codes: dict[str, int] = {}
    return np.array([codes.setdefault(name, len(codes)) for name in names], dtype=np.int64)


def weights(votes: Votes, trusted: Mapping[str, float]) -> Doubles:
    """What each vote counts [n], in [0, 1]: its user's trust (1 if unknown), within the caps per user and answer."""
    w = np.array([trusted.get(row.user, 1.0) for row in votes.rows], dtype=np.float64)
    cap = max(1.0, SHARE * len(votes))
    for groups in (votes.user, votes.answer):
        total = np.bincount(groups, w)[groups] if len(w) else w
        w = w * np.minimum(1.0, cap / np.maximum(total, 1e-12))
    return w


@dataclass(frozen=True, slots=True)
class Layer:
    """logit(q) = z + clip(offset + slope z + sum of weight (feature - mean)), z = logit(p).

    `terms` is feature -> (weight, mean); a feature that an answer lacks counts as the mean. Only a `certified`
    layer lifts answers over a threshold.
    """

    offset: float = 0.0
    slope: float = 0.0
    terms: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    certified: bool = False

    def p_correct(self, p: float, seen: Mapping[str, float], thresholds: Sequence[float]) -> float:
        """The corrected probability of one answer with these `features`."""
        return float(self._apply(np.array(p), lambda name, mean: np.array(seen.get(name, mean)), thresholds))

    def p_all(self, votes: Votes, thresholds: Sequence[float]) -> Doubles:
        """The same for votes [n]."""
        return self._apply(votes.p, votes.column, thresholds)

    def _apply(self, p: Doubles, column: Callable[[str, float], Doubles], thresholds: Sequence[float]) -> Doubles:
        z = logit(p)
        shift = self.offset + self.slope * z
        for name, (weight, mean) in self.terms.items():
            shift = shift + weight * (column(name, mean) - mean)
        q = sigmoid(z + np.clip(shift, -LIMIT, LIMIT))
        return q if self.certified else hold(p, q, thresholds)


def hold(p: ArrayLike, q: ArrayLike, thresholds: Sequence[float]) -> Doubles:
    """`q`, but just below each threshold that `p` does not reach."""
    held = np.asarray(q, dtype=np.float64)
    for threshold in thresholds:
        held = np.where((np.asarray(p) < threshold) & (held >= threshold), np.nextafter(threshold, 0.0), held)
    return held


def fit_layer(votes: Votes, w: Doubles) -> Layer:
    """The layer that makes votes [n] of weights `w` [n] most likely, under a ridge of `PRIOR` towards no change."""
    names = sorted({name for row in votes.rows for name in row.features})
    terms = {}
    columns = [np.ones(len(votes)), logit(votes.p)]
    for name in names:
        values = votes.column(name, math.nan)
        plain = not name.startswith(DOMAIN) and name != MODIFIER  # shares and flags mean the same everywhere
        mean, scale = (float(np.nanmean(values)), float(np.nanstd(values))) if plain else (0.0, 1.0)
        if scale > 1e-9:
            terms[name] = scale, mean
            columns.append((np.where(np.isnan(values), mean, values) - mean) / scale)
    b = newton(np.stack(columns, axis=1), votes.right, weights=w, start=logit(votes.p), ridge=PRIOR)
    weighted = {name: (float(x) / scale, mean) for x, (name, (scale, mean)) in zip(b[2:], terms.items(), strict=True)}
    return Layer(float(b[0]), float(b[1]), weighted)


def trust(votes: Votes, expected: Doubles) -> dict[str, float]:
    """How far each user's votes follow what is expected of everybody's [n]: 1 fully, 0 not at all.

    Each user's votes are regressed on the expectation (ridge towards slope 1): 1 is honest, 0 votes without looking,
    negative is against everybody. Slopes of one half and less count nothing. What most voters call right is right:
    there is no other truth here.
    """
    n = np.bincount(votes.user)

    def mean(x: Doubles) -> Doubles:
        return np.asarray(np.bincount(votes.user, x) / np.maximum(n, 1))

    e, y = expected - mean(expected)[votes.user], votes.right - mean(votes.right)[votes.user]
    slope = (n * mean(e * y) + 1.0) / (n * mean(e * e) + 1.0)
    names = {int(code): row.user for code, row in zip(votes.user, votes.rows, strict=True)}
    return {name: float(np.clip(2 * slope[code] - 1, 0.0, 1.0)) for code, name in names.items()}


def learn(votes: Votes, half_life: float) -> tuple[Layer, dict[str, float]]:
    """A candidate layer from votes [n], oldest first, and each user's trust. A vote loses half of its weight every
    `half_life` votes: old ones are replayed, so that one busy day does not make everything else forgotten.
    """
    decay = 0.5 ** (np.arange(len(votes))[::-1] / half_life)
    everybody = fit_layer(votes, weights(votes, {}) * decay)
    trusted = trust(votes, everybody.p_all(votes, ()))
    return fit_layer(votes, weights(votes, trusted) * decay), trusted


@dataclass(frozen=True, slots=True)
class Gain:
    """How much lower the Brier score is: as a share of the score `before`; `low` bounds it from below with 95%
    confidence. `votes` is what they counted together.
    """

    votes: float
    before: float
    after: float
    gain: float
    low: float


def gain(votes: Votes, w: Doubles, before: Doubles, after: Doubles) -> Gain:
    """Compare two predictions [n] for the same weighted votes [n]; errors are clustered by user."""
    total = float(w.sum())
    if total <= 0.0:
        return Gain(0.0, 0.0, 0.0, 0.0, -1.0)
    old, new = (w * (q - votes.right) ** 2 for q in (before, after))
    mean = float((old - new).sum()) / total
    residual = np.bincount(votes.user, old - new - mean * w)
    error = math.sqrt(float(residual @ residual)) / total
    score = max(float(old.sum()) / total, 1e-12)
    return Gain(total, score, score - mean, mean / score, (mean - _Z95 * error) / score)


def worst_stretch(votes: Votes, w: Doubles, before: Doubles, after: Doubles) -> float:
    """The most Brier score that `after` has cost over `before` in any stretch of votes that lasts until now."""
    cost = w * ((after - votes.right) ** 2 - (before - votes.right) ** 2)
    return float(max(np.cumsum(cost[::-1]).max(initial=0.0), 0.0))


def certified(votes: Votes, w: Doubles, q: Doubles, promises: Sequence[Guarantee], test: int) -> bool:
    """Whether accepting by `q` [n] keeps every promise, on votes that `q` was not fitted on; `test` counts from 1.

    Whole votes are counted: those of weight one half and more.
    """
    for promise in promises:
        taken = (q >= promise.threshold) & (w >= 0.5)
        wrong, n = int((taken & (votes.right == 0)).sum()), int(taken.sum())
        confidence = 1 - (1 - promise.confidence) / (test * (test + 1))
        if upper_bound(wrong, n, confidence) > promise.risk:
            return False
    return True


def in_canary(turn_id: str) -> bool:
    """Whether a turn belongs to the tenth that tries candidates: the same on every machine."""
    digest = hashlib.sha256(turn_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < CANARY * 2**64
