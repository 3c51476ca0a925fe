"""Recalibration of P(correct) from user votes: a bounded correction and its statistical tests (SPEC F16).

A `Correction` shifts the gate's logit by an offset, a change of slope, offsets per domain and a few signals. It is a
ridge-penalised logistic regression; the penalty favours no change. Three safeguards:

- **No user can dominate.** One user, and one answer shown to many users, count at most `MAX_SHARE` of the votes. Votes
  of a user that do not correlate with the majority (always up, always the opposite) get weight 0 (`trust`).
- **Promotion needs evidence.** A candidate serves a tenth of the turns (canary), chosen by a hash of their ids. It
  replaces the active correction only if its Brier score there is at least `MIN_GAIN` better, and significantly better
  at 95% confidence with errors clustered by user. The Brier score is a proper score, and a single vote changes it by at
  most one. A correction is withdrawn as soon as any recent stretch of votes has cost more than `MAX_HARM` compared with
  the uncorrected gate (Page's CUSUM test, 1954), so the total damage is bounded.
- **Unproven corrections do not affect the guarantee (SPEC F4).** Its threshold was certified for the gate's P(correct).
  A correction may lower P(correct) freely, and raise it, but not across a threshold (`cap_below_thresholds`): no answer
  becomes accepted that was not before. Only a correction that is itself certified, by the same exact binomial bound at
  the same risk on trusted votes it was not fitted on, may raise answers over the threshold; test number k has
  confidence 1 - (1 - confidence) / (k (k + 1)), so that the error probability of all tests together is bounded by that
  of one. The certificate assumes that rated answers represent the others and that trusted votes are true (honest
  mistakes make certification harder). Lowering P(correct) accepts fewer answers, so never more wrong ones; the *share*
  of wrong answers among the accepted ones is guaranteed only while questions stay exchangeable, as without correction.

Personal offsets (`confidence.personal`) never raise an answer over a threshold.
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

MAX_SHARE = 0.005  # of the votes, from one user or on one answer
MIN_GAIN = 0.01  # relative, of the Brier score
MAX_HARM = 3.0  # summed Brier score; a harmless correction reaches it by chance about once in e**7 tries
CANARY = 0.1
MAX_SHIFT = 2.0  # nats by which a correction shifts a logit
PRIOR = 50.0  # ridge: a domain with this much information moves half of the distance
MAX_LOGIT = 7.0  # logits are clipped to +- this
SIGNALS = ("mean_logprob", "log_length")
DOMAIN = "domain_"
MODIFIER = "modifier"  # feature derived from a signal that only modifiers' answers have
_Z95 = 1.645

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]


def logit(p: ArrayLike) -> Doubles:
    """log(p / (1 - p)), clipped to +-`MAX_LOGIT`."""
    edge = 1 / (1 + math.exp(MAX_LOGIT))
    p = np.clip(np.asarray(p, dtype=np.float64), edge, 1 - edge)
    return np.asarray(np.log(p) - np.log1p(-p))


def features(signals: Mapping[str, float]) -> dict[str, float]:
    """Inputs of a correction besides P(correct)."""
    used = {name: x for name, x in signals.items() if (name.startswith(DOMAIN) or name in SIGNALS) and math.isfinite(x)}
    return used | {MODIFIER: float("base_p" in signals)}


@dataclass(frozen=True, slots=True)
class Vote:
    """One rated answer; equal answers have equal `answer` keys."""

    id: str
    user: str
    answer: str
    p: float
    features: Mapping[str, float]
    right: bool


@dataclass(frozen=True, slots=True, eq=False)
class Votes:
    """Votes [n] as arrays, in order of arrival. A user's later vote on the same answer id replaces the earlier one."""

    rows: tuple[Vote, ...]
    user: Ints
    answer: Ints
    p: Doubles
    right: Doubles

    @classmethod
    def of(cls, votes: Iterable[Vote]) -> Votes:
        """Arrays of votes; votes without a valid P(correct) are left out."""
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
        """The votes for which `kept` [n] is true."""
        return Votes.of(row for row, keep in zip(self.rows, kept, strict=True) if keep)

    def column(self, name: str, missing: float) -> Doubles:
        """One feature [n]."""
        return np.array([row.features.get(name, missing) for row in self.rows], dtype=np.float64)


def _codes(names: Sequence[str]) -> Ints:
    codes: dict[str, int] = {}
    return np.array([codes.setdefault(name, len(codes)) for name in names], dtype=np.int64)


def weights(votes: Votes, trusted: Mapping[str, float]) -> Doubles:
    """Weight of each vote [n], in [0, 1]: its user's trust (1 if unknown), capped per user and per answer."""
    w = np.array([trusted.get(row.user, 1.0) for row in votes.rows], dtype=np.float64)
    cap = max(1.0, MAX_SHARE * len(votes))
    for groups in (votes.user, votes.answer):
        total = np.bincount(groups, w)[groups] if len(w) else w
        w = w * np.minimum(1.0, cap / np.maximum(total, 1e-12))
    return w


@dataclass(frozen=True, slots=True)
class Correction:
    """logit(q) = z + clip(offset + slope z + sum of weight (feature - mean)), z = logit(p).

    `terms` is feature -> (weight, mean); a missing feature counts as the mean. Only a `certified` correction raises
    answers over a threshold.
    """

    offset: float = 0.0
    slope: float = 0.0
    terms: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    certified: bool = False

    def p_correct(self, p: float, inputs: Mapping[str, float], thresholds: Sequence[float]) -> float:
        """The corrected probability of one answer; `inputs` from `features`."""
        return float(self._apply(np.array(p), lambda name, mean: np.array(inputs.get(name, mean)), thresholds))

    def p_all(self, votes: Votes, thresholds: Sequence[float]) -> Doubles:
        """`p_correct` for votes [n]."""
        return self._apply(votes.p, votes.column, thresholds)

    def _apply(self, p: Doubles, column: Callable[[str, float], Doubles], thresholds: Sequence[float]) -> Doubles:
        z = logit(p)
        shift = self.offset + self.slope * z
        for name, (weight, mean) in self.terms.items():
            shift = shift + weight * (column(name, mean) - mean)
        q = sigmoid(z + np.clip(shift, -MAX_SHIFT, MAX_SHIFT))
        return q if self.certified else cap_below_thresholds(p, q, thresholds)


def cap_below_thresholds(p: ArrayLike, q: ArrayLike, thresholds: Sequence[float]) -> Doubles:
    """`q`, reduced to just below each threshold that `p` does not reach."""
    capped = np.asarray(q, dtype=np.float64)
    for threshold in thresholds:
        capped = np.where((np.asarray(p) < threshold) & (capped >= threshold), np.nextafter(threshold, 0.0), capped)
    return capped


def fit_correction(votes: Votes, w: Doubles) -> Correction:
    """Fit a correction to votes [n] with weights `w` [n] by penalised maximum likelihood (ridge `PRIOR`)."""
    names = sorted({name for row in votes.rows for name in row.features})
    terms = {}
    columns = [np.ones(len(votes)), logit(votes.p)]
    for name in names:
        values = votes.column(name, math.nan)
        standardised = not name.startswith(DOMAIN) and name != MODIFIER  # shares and flags are in [0, 1] already
        mean, scale = (float(np.nanmean(values)), float(np.nanstd(values))) if standardised else (0.0, 1.0)
        if scale > 1e-9:
            terms[name] = scale, mean
            columns.append((np.where(np.isnan(values), mean, values) - mean) / scale)
    b = newton(np.stack(columns, axis=1), votes.right, weights=w, start=logit(votes.p), ridge=PRIOR)
    weighted = {name: (float(x) / scale, mean) for x, (name, (scale, mean)) in zip(b[2:], terms.items(), strict=True)}
    return Correction(float(b[0]), float(b[1]), weighted)


def trust(votes: Votes, expected: Doubles) -> dict[str, float]:
    """Trust in each user's votes: how well they agree with the expected votes of an average user [n], in [0, 1].

    Each user's votes are regressed on the expectation (ridge towards slope 1): slope 1 is honest, 0 random, negative
    opposed. Slopes of one half and below give trust 0. The majority of voters is the only ground truth available.
    """
    n = np.bincount(votes.user)

    def mean(x: Doubles) -> Doubles:
        return np.asarray(np.bincount(votes.user, x) / np.maximum(n, 1))

    e, y = expected - mean(expected)[votes.user], votes.right - mean(votes.right)[votes.user]
    slope = (n * mean(e * y) + 1.0) / (n * mean(e * e) + 1.0)
    names = {int(code): row.user for code, row in zip(votes.user, votes.rows, strict=True)}
    return {name: float(np.clip(2 * slope[code] - 1, 0.0, 1.0)) for code, name in names.items()}


def learn(votes: Votes, half_life: float) -> tuple[Correction, dict[str, float]]:
    """A candidate correction from votes [n], oldest first, and each user's trust. The weight of a vote halves every
    `half_life` votes; old votes still count, so that one busy day does not override everything before.
    """
    decay = 0.5 ** (np.arange(len(votes))[::-1] / half_life)
    unweighted = fit_correction(votes, weights(votes, {}) * decay)
    trusted = trust(votes, unweighted.p_all(votes, ()))
    return fit_correction(votes, weights(votes, trusted) * decay), trusted


@dataclass(frozen=True, slots=True)
class BrierGain:
    """Brier scores `before` and `after`, their relative reduction `gain` and its lower 95% bound `low`; `votes` is the
    total weight.
    """

    votes: float
    before: float
    after: float
    gain: float
    low: float


def gain(votes: Votes, w: Doubles, before: Doubles, after: Doubles) -> BrierGain:
    """Compare two predictions [n] for the same weighted votes [n]; errors are clustered by user."""
    total = float(w.sum())
    if total <= 0.0:
        return BrierGain(0.0, 0.0, 0.0, 0.0, -1.0)
    old, new = (w * (q - votes.right) ** 2 for q in (before, after))
    mean = float((old - new).sum()) / total
    residual = np.bincount(votes.user, old - new - mean * w)
    error = math.sqrt(float(residual @ residual)) / total
    score = max(float(old.sum()) / total, 1e-12)
    return BrierGain(total, score, score - mean, mean / score, (mean - _Z95 * error) / score)


def cusum_harm(votes: Votes, w: Doubles, before: Doubles, after: Doubles) -> float:
    """The largest excess Brier score of `after` over `before`, over all stretches of votes that end now (CUSUM)."""
    cost = w * ((after - votes.right) ** 2 - (before - votes.right) ** 2)
    return float(max(np.cumsum(cost[::-1]).max(initial=0.0), 0.0))


def certified(votes: Votes, w: Doubles, q: Doubles, promises: Sequence[Guarantee], test: int) -> bool:
    """Whether accepting by `q` [n] meets every guarantee on votes that `q` was not fitted on; `test` counts from 1.

    Only votes of weight one half and more count, each as one trial.
    """
    for promise in promises:
        accepted = (q >= promise.threshold) & (w >= 0.5)
        wrong, n = int((accepted & (votes.right == 0)).sum()), int(accepted.sum())
        confidence = 1 - (1 - promise.confidence) / (test * (test + 1))
        if upper_bound(wrong, n, confidence) > promise.risk:
            return False
    return True


def in_canary(turn_id: str) -> bool:
    """Whether a turn belongs to the tenth that is served by candidates; independent of the machine."""
    digest = hashlib.sha256(turn_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < CANARY * 2**64
