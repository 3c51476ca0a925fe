"""Suite `cache`: hit rate and errors of the answer cache on public pairs of questions (SPEC F12).

A pair is a hit if the cache would answer one question with the other's answer. The hit rate is the share of equivalent
pairs that are hits; wrong hits are hits of pairs that are not equivalent. Questions are split in three parts: on the
first the check is fitted, on the second its threshold is tested, and the third is judged. Verified mode processes the
judged part as a stream and learns a pair's label only if it would have generated a new answer.

If no pair is labelled as different, each question is paired with the nearest question of another group as a negative.
Some of these are equivalent without a label, so that the shares of wrong hits are upper bounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cogumi.cascade.memory.answer_cache import SIMILARITY
from cogumi.cascade.memory.reuse_check import write_check
from cogumi.confidence.guarantee import upper_bound
from cogumi.confidence.nets import Net
from cogumi.confidence.reuse import FEATURES, KINDS, pair_features
from cogumi.confidence.verified_reuse import RECHECK_SHARE, Verifier, proven_threshold
from cogumi.core.errors import CogumiError, DataError
from cogumi.core.pictures import legend_below, new_figure
from cogumi.engine.embedder import MODEL, Embedder
from cogumi.evaluate.suite import Figure, Findings, Task
from cogumi.evaluate.suites.cache_lookups import lookup_speed
from cogumi.evaluate.suites.minilm import cached_embedder
from cogumi.evaluate.suites.question_pairs import Pairs, groups, parts, read_pairs

RISK = 0.01
RISKS = (RISK, 0.05)
"""Error bounds for verified mode."""
PAIRS = 20_000
"""Most pairs used; half as many if negatives are mined, because embedding their questions takes minutes."""
SHARES = (0.25, 0.25, 0.5)
CHECK = "reuse_check.json"

Doubles = NDArray[np.float64]
Truths = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Part:
    """Pairs as numbers: features [n, FEATURES], whether they are equivalent [n], and the cached questions."""

    features: Doubles
    same: Truths
    questions: list[str]

    @property
    def cosine(self) -> Doubles:
        """Cosines [n]."""
        return self.features[:, FEATURES.index("cosine")]

    @property
    def clear(self) -> Truths:
        """True for pairs without a feature against reuse [n]."""
        return np.asarray(self.features[:, -len(KINDS) :].sum(axis=1) == 0)


Score = Callable[[Part], Doubles]
"""Part -> score for reuse [n]; minus infinity forbids reuse."""


def run(task: Task) -> Findings:
    """Measure on `task.data` (file or folder of pairs); the fitted check is written to `task.out`."""
    if task.data is None:
        raise CogumiError(
            "the suite 'cache' needs pairs of questions: give a file or folder with --data "
            "(JSON with text_a, text_b, label, or CSV rows text,text,grade)"
        )
    began = time.perf_counter()
    pairs = read_pairs(task.data)
    embedder = Embedder(task.bundle) if task.bundle and (task.bundle / MODEL).is_file() else cached_embedder()
    mined = all(pairs.values())
    chosen = parts(pairs, SHARES, PAIRS // 2 if mined else PAIRS, task.seed)
    vectors = _embed(embedder, chosen, task)
    if mined:
        others = _nearest_others(groups(pair for part in chosen for pair in part), vectors)
        chosen = [_with(part, others) for part in chosen]
    fit, threshold, judged = (_part(part, vectors) for part in chosen)
    check = fit_check(fit)
    scores: dict[str, Score] = {
        "cosine": lambda part: part.cosine,
        "cosine and second check": lambda part: np.where(part.clear, part.cosine, -np.inf),
        "fitted check": lambda part: np.where(part.clear, check.logits(part.features)[:, 0], -np.inf),
    }
    figures = [
        f
        for name in list(scores)[:2]
        for c in (SIMILARITY, 0.98)
        for f in _hits(f"{name} >= {c}", scores[name](judged) >= c, judged.same)
    ]
    points = {}
    for name, score in list(scores.items()):
        figures += _thresholds(name, score, threshold, judged)
    for name, score in list(scores.items())[1:]:
        for risk in RISKS:
            verified = f"verified at {risk:.0%}, {name}"
            points[verified] = stream(score(judged), judged, risk, task.seed)
            figures += _hits(verified, points[verified], judged.same, goal=f"<= {risk}")
    figures += lookup_speed(embedder, vectors)
    edge = proven_threshold(_rows(scores["fitted check"](threshold), threshold.same), RISK)
    pictures = []
    if task.out:
        task.out.mkdir(parents=True, exist_ok=True)
        pictures.append(_picture(task.out / "cache.png", {n: f(judged) for n, f in scores.items()}, judged, points))
        if np.isfinite(edge):
            write_check(task.out / CHECK, _shifted(check, edge), embedder.identity)
    counts = {"fit": fit, "threshold": threshold, "judged": judged}
    facts = {
        "pairs": len(pairs),
        "labels": "only same; the nearest question of another group stands for different" if mined else "both",
        **{name: {"same": int(part.same.sum()), "different": int((~part.same).sum())} for name, part in counts.items()},
        "check": _saved(task.out, edge),
        "assumption": "questions to come are like these, and their labels are right",
        "seconds": round(time.perf_counter() - began, 1),
    }
    return Findings(figures, facts, pictures)


def _saved(out: Path | None, edge: float) -> str:
    """Where the check is, or why there is none."""
    if not np.isfinite(edge):
        return f"no threshold was proven to keep {RISK:.0%}, so none was saved"
    return f"{out / CHECK}: for serve --reuse-check" if out else "proven; saved with --out"


def fit_check(part: Part) -> Net:
    """A logistic check on `pair_features`, with a positive logit for equivalent pairs."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(part.features)
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(part.features), part.same)
    return Net.of(scaler.mean_, scaler.scale_, [model.coef_.T], [model.intercept_], ("different", "same"))


def _shifted(check: Net, edge: float) -> Net:
    """The check with `edge` subtracted from its logit, so that its threshold is 0."""
    ((weight, bias),) = check.layers
    return Net.of(check.mean, check.scale, [weight], [bias - edge], check.classes)


def stream(scores: Doubles, part: Part, risk: float, seed: int) -> Truths:
    """The pairs that verified mode answers from the cache if they arrive in random order [n]."""
    rng, verifier = np.random.default_rng(seed), Verifier(risk)
    own: dict[str, list[tuple[float, bool]]] = {}
    hits = np.zeros(len(scores), dtype=bool)
    for i in rng.permutation(np.flatnonzero(np.isfinite(scores))):
        score, right = float(scores[i]), bool(part.same[i])
        evidence = own.setdefault(part.questions[i], [])
        bound = verifier.bound(score, evidence)
        if verifier.trusts(bound) and rng.random() >= RECHECK_SHARE:
            hits[i] = True
        else:
            verifier.learn(score, bound, right)
            evidence.append((score, right))
    return hits


def _embed(embedder: Embedder, chosen: Sequence[Pairs], task: Task) -> dict[str, NDArray[np.float32]]:
    questions = sorted({question for part in chosen for pair in part for question in pair})
    found = {}
    for done, question in enumerate(questions, 1):
        found[question] = embedder.embed([question])[0]
        task.progress(done, len(questions), {})
    return found


def _nearest_others(group: Mapping[str, str], vectors: Mapping[str, NDArray[np.float32]]) -> list[tuple[str, str]]:
    """Each question with the nearest question of another group, over all parts."""
    questions = sorted(group)
    matrix, owner = np.stack([vectors[q] for q in questions]), np.array([group[q] for q in questions])
    found: dict[tuple[str, str], None] = {}
    for question, row in zip(questions, matrix, strict=True):
        other = questions[int(np.argmax(np.where(owner == group[question], -1.0, matrix @ row)))]
        if (other, question) not in found:
            found[question, other] = None
    return list(found)


def _with(part: Pairs, others: Sequence[tuple[str, str]]) -> Pairs:
    """The part and those of the others whose first question is in it."""
    questions = groups(part)
    return part | {pair: False for pair in others if pair[0] in questions}


def _part(pairs: Pairs, vectors: Mapping[str, NDArray[np.float32]]) -> Part:
    if len(set(pairs.values())) < 2:
        raise DataError("too few pairs: each part needs some that are equivalent and some that are not")
    features = [pair_features(a, b, float(vectors[a] @ vectors[b])) for a, b in pairs]
    return Part(np.array(features), np.array(list(pairs.values())), [b for _, b in pairs])


def _rows(scores: Doubles, same: Truths) -> list[tuple[float, bool]]:
    return [(float(s), bool(y)) for s, y in zip(scores, same, strict=True) if np.isfinite(s)]


def _hits(name: str, hits: Truths, same: Truths, *, goal: str = "", note: str = "") -> list[Figure]:
    """Hit rate, and the share of wrong hits, each with its exact 95% interval."""
    n, wrong, right = int(hits.sum()), int((hits & ~same).sum()), int((hits & same).sum())
    rate = _interval(right, int(same.sum()))
    return [
        Figure(f"{name}: hit rate", right / max(int(same.sum()), 1), "", *rate, note),
        Figure(f"{name}: wrong among hits", wrong / n if n else None, goal, *_interval(wrong, n), f"{wrong} of {n}"),
    ]


def _interval(k: int, n: int) -> tuple[float, float]:
    """Clopper and Pearson's exact 95%."""
    return (1 - upper_bound(n - k, n, 0.975), upper_bound(k, n, 0.975)) if n else (0.0, 1.0)


def _thresholds(name: str, score: Score, threshold: Part, judged: Part) -> list[Figure]:
    """Hits with the threshold proven on its own part, and with the one that only satisfies `RISK` empirically there."""
    rows = sorted(_rows(score(threshold), threshold.same), reverse=True)
    edges = {"proven": proven_threshold(rows, RISK), "seen": _empirical(rows)}
    found = []
    for how, edge in edges.items():
        note = f"threshold {edge:.3f}" if np.isfinite(edge) else f"no threshold was {how} to keep {RISK:.0%}"
        figures = _hits(f"{name}, threshold {how}", score(judged) >= edge, judged.same, goal=f"<= {RISK}", note=note)
        found += figures
    return found


def _empirical(rows: Sequence[tuple[float, bool]]) -> float:
    """The lowest threshold above which at most the share `RISK` of rows (score, same), best first, is wrong."""
    wrong = np.cumsum([not same for _, same in rows]) / np.arange(1, len(rows) + 1)
    kept = np.flatnonzero(wrong <= RISK)
    return rows[int(kept[-1])][0] if len(kept) else float("inf")


def _picture(path: Path, scores: Mapping[str, Doubles], part: Part, points: Mapping[str, Truths]) -> Path:
    """Share of wrong hits against hit rate, for every threshold, and the points of verified mode."""
    canvas, (axes,) = new_figure(width=6)
    for name, score in scores.items():
        order = np.argsort(-score, kind="stable")[: int(np.isfinite(score).sum())]
        right = np.cumsum(part.same[order])
        axes.plot(right / part.same.sum(), 1 - right / np.arange(1, len(order) + 1), label=name)
    for name, hits in points.items():
        found = int((hits & part.same).sum())
        axes.plot([found / part.same.sum()], [1 - found / max(int(hits.sum()), 1)], "o", label=name)
    axes.axhline(RISK, color="black", linestyle="--", label=f"{RISK:.0%}")
    axes.set(xlabel="hit rate", ylabel="wrong among hits", xlim=(0, 1), ylim=(0, None))
    axes.set_title(f"Reused answers ({len(part.same)} pairs)")
    legend_below(axes)
    canvas.savefig(path)
    return path
