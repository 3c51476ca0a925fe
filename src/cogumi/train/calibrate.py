"""Stage `calibrate`: gates and thresholds of the cascade, fitted to graded answers (SPEC F1, F2, F3, F4, F10).

Stage `answers` asked the finished models the questions of three splits. On `fit` and `selection` the gates are fitted,
their form and calibrator are chosen, thresholds are searched, and the order of the tests is fixed, all by
cross-validation. On `threshold` the guarantee is tested and the figures are measured. The correct answer to an
unanswerable question is an abstention; the guarantee counts abstentions neither as accepted
nor as wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cogumi.confidence.gate import Calibration, Gate, QuestionGate
from cogumi.confidence.guarantee import Guarantee, RiskLimit, guarantee, threshold_order
from cogumi.confidence.metrics import aurc, auroc, brier, crossing, ece, log_loss
from cogumi.confidence.nets import Net
from cogumi.confidence.policy import POLICIES, Policy, PolicyAnswers
from cogumi.confidence.signals import perplexity
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import FileFacts, FileSize
from cogumi.core.files import write_json
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.examples import is_easy, read_examples, split_path
from cogumi.teach.answer_rows import (
    COLUMNS,
    Answer,
    Row,
    base_rows,
    familiar,
    hidden,
    policy_answers,
    probabilities,
    read_rows,
    with_modifier,
)
from cogumi.teach.tier_answers import SPLITS
from cogumi.train.confidence_plots import frontier_picture, histogram_picture, reliability_picture
from cogumi.train.fit_gate import Fitted, Signals, fit_gate, fit_probe

VERSION = 9
KIND = "calibration"
LIGHT = True
INPUTS = {"data": "examples", "answers": "answers"}
NOVEL = 0.005
"""False-alarm rate of the novelty test: share of calibration questions that count as novel."""
HARD_PASSED = 0.01
"""Share of hard questions that the draft may classify as easy."""
SEARCH = tuple(round(0.70 + 0.02 * i, 2) for i in range(11))
"""Candidate thresholds in the search for the best accuracy per cost."""
FILE = "calibration.json"

Doubles = NDArray[np.float64]


class Config(BaseModel):
    """At most the share `e` of accepted answers may be wrong, and at most the share `unanswerable` of unanswerable
    questions accepted, with `confidence`; questions up to difficulty `easy_up_to` are easy, and of those without a
    level the ones that the base answers correctly.

    The specification's perplexity limits are 20 (`draft_perplexity`), 12.4 (`base_perplexity`) and 30
    (`answer_perplexity`); None fits them where the histograms cross.
    """

    model_config = ConfigDict(extra="forbid")
    e: float = Field(0.05, gt=0, lt=1)
    unanswerable: float = Field(0.02, gt=0, lt=1)
    confidence: float = Field(0.95, gt=0, lt=1)
    easy_up_to: int = Field(2, ge=1)
    draft_perplexity: float | None = Field(None, gt=1)
    base_perplexity: float | None = Field(None, gt=1)
    answer_perplexity: float | None = Field(None, gt=1)


def fit_question_gate(rows: Sequence[Row], easy: Sequence[bool], config: Config) -> QuestionGate:
    """Thresholds where the histograms of easy and hard questions cross; without one of the kinds all count as easy.

    The threshold on P(easy) lets at most `HARD_PASSED` of the hard questions pass. The limit on the draft's perplexity
    is then fitted on the questions that pass, so that an uninformative perplexity rejects none. The limit on the base's
    perplexity separates questions that it answers correctly from others.
    """
    perplexities, p_easy = _draft_scores(rows).T
    novelty = float(np.quantile(perplexities, 1 - NOVEL))
    mask = np.array(easy, dtype=bool)
    limit, threshold = float(perplexities.max()), 0.0
    if mask.any() and not mask.all():
        strict = float(np.quantile(p_easy[~mask], 1 - HARD_PASSED, method="higher"))
        threshold = max(-crossing(-p_easy[mask], -p_easy[~mask]), strict)
        passing = np.where(p_easy >= threshold, perplexities, np.inf)
        limit = crossing(passing[mask], passing[~mask])
    right, surprise = _correct([r.base for r in rows]) > 0, np.array([r.surprise for r in rows])
    surprising = crossing(surprise[right], surprise[~right]) if right.any() and not right.all() else math.inf
    return QuestionGate(config.draft_perplexity or limit, threshold, novelty, config.base_perplexity or surprising)


def _draft_scores(rows: Sequence[Row]) -> Doubles:
    """The draft's perplexity and P(easy) of each question [n, 2]."""
    return np.array([(r.question.perplexity, r.question.p_easy) for r in rows])


def _easy(row: Row, config: Config) -> bool:
    """Whether a question is easy: for a draft by its difficulty, for the base if it answers correctly."""
    return is_easy(row.example, config.easy_up_to, row.base.correct) if row.draft else row.base.correct


def _correct(answers: Sequence[Answer | None]) -> Doubles:
    """1 for correct answers, 0 for wrong and missing ones [n]."""
    return np.array([a is not None and a.correct for a in answers], dtype=np.float64)


def fit_base(rows: Sequence[Row], seed: int) -> tuple[Fitted, Net | None]:
    """The base's gate, and the probe of its hidden states, which is one of the gate's signals."""
    right = _correct([r.base for r in rows])
    probe, out_of_fold = fit_probe(hidden(rows), right, seed)
    signals: list[Mapping[str, float]] = [r.base.signals for r in rows]
    if probe:  # out-of-fold, because the probe was fitted on these rows
        signals = [{**row, "probe": float(z)} for row, z in zip(signals, out_of_fold, strict=True)]
    return fit_gate(signals, right, seed), probe


def fit_gates(rows: Sequence[Row], seed: int) -> tuple[dict[str, Fitted], Net | None, Doubles]:
    """A gate for every tier with answers, the probe, and out-of-fold P(correct) as in `probabilities` [n, 4]."""
    base, probe = fit_base(rows, seed)
    gates, p = {"base": base}, np.full((len(rows), len(COLUMNS)), np.nan)
    p[:, COLUMNS.index("base")] = base.out_of_fold

    def fitted(tier: str, index: NDArray[np.intp], signals: Signals, answers: Sequence[Answer | None]) -> None:
        if len(index):
            gates[tier] = fit_gate(signals, _correct(answers), seed)
            p[index, COLUMNS.index(tier)] = gates[tier].out_of_fold

    drafts = [r.draft for r in rows if r.draft]
    fitted("draft", np.arange(len(drafts)), [d.signals for d in drafts], drafts)
    index = with_modifier(rows)
    modified = [rows[i].modifier for i in index]
    after_base = [rows[i].modifier_signals(float(base.out_of_fold[i])) for i in index]
    fitted("modifier", index, after_base, modified)
    fitted("direct", index, [rows[i].direct_signals for i in index], modified)
    return gates, probe, p


def compare_benefit(
    pool: Sequence[Row], tested: Sequence[Row], gates: Mapping[str, Gate], probe: Net | None, seed: int
) -> Any:
    """Compare two scores for escalation to a modifier: P(the base is wrong) and P(the modifier corrects the base).

    For each, the mean accuracy over all shares of escalated questions of `tested`, highest scores first (arXiv
    2604.14251); the second score is fitted on `pool`. None if no modifier answered.
    """
    pool, tested = ([rows[i] for i in with_modifier(rows)] for rows in (pool, tested))
    if not (pool and tested):
        return None

    def fixed(rows: Sequence[Row]) -> Doubles:
        return _correct([r.modifier for r in rows]) * (1 - _correct([r.base for r in rows]))

    signals = base_rows(tested, probe)
    benefit = fit_gate(base_rows(pool, probe), fixed(pool), seed).gate.p_all(signals)
    wrong = 1 - gates["base"].p_all(signals)
    base, modifier = _correct([r.base for r in tested]), _correct([r.modifier for r in tested])

    def mean_accuracy(score: Doubles) -> float:
        order = np.argsort(-score, kind="stable")
        gain = np.cumsum((modifier - base)[order]) / len(base)
        return float(base.mean() + np.mean(np.concatenate([[0.0], gain])))

    return {
        "n": len(tested),
        "fixed": float(fixed(tested).mean()),
        "auroc_benefit": auroc(benefit, fixed(tested)),
        "auroc_base_wrong": auroc(wrong, fixed(tested)),
        "mean_accuracy_benefit": mean_accuracy(benefit),
        "mean_accuracy_base_wrong": mean_accuracy(wrong),
        "mean_accuracy_random": float((base.mean() + modifier.mean()) / 2),
    }


def search(answers: PolicyAnswers) -> tuple[float, list[tuple[float, float, float]]]:
    """The threshold of `SEARCH` with the best accuracy / cost, and every (threshold, accuracy, cost)."""
    tried = [(t, *answers.outcome(t)) for t in SEARCH]
    return max(tried, key=lambda row: row[1] / row[2] if row[2] else 0.0)[0], tried


def _figures(p: Doubles, answers: Sequence[Answer]) -> dict[str, Any]:
    correct, signals = _correct(answers), [a.signals for a in answers]
    return {
        "n": len(p),
        "accuracy": float(correct.mean()) if len(p) else None,
        "ece": ece(p, correct),
        "brier": brier(p, correct),
        "log_loss": log_loss(p, correct),
        "auroc": auroc(p, correct),
        "auroc_perplexity": auroc([-perplexity(s) for s in signals], correct),
        "auroc_length": auroc([-s["log_length"] for s in signals], correct),
        "aurc": aurc(p, correct),
    }


def _promised(promise: Guarantee) -> dict[str, Any]:
    error = promise.wrong / promise.accepted if promise.accepted else None
    return {**promise.to_json(), "coverage": promise.coverage, "accepted_error": error}


def calibrate(
    rows: Mapping[str, list[Row]], cost: Mapping[str, float], config: Config, seed: int, out: Path
) -> dict[str, Any]:
    """Rows of the three splits -> calibration.json and pictures in `out`; returns the figures.

    `cost` is the cost per token of `draft` and of `base`.
    """
    pool, tested = [*rows["fit"], *rows["selection"]], rows["threshold"]
    fitted, probe, p_pool = fit_gates(pool, seed)
    gates = {name: one.gate for name, one in fitted.items()}
    easy, easy_tested = ([_easy(r, config) for r in some] for some in (pool, tested))
    question = fit_question_gate(pool, easy, config)
    limit = config.answer_perplexity or _answer_perplexity(pool)
    without_guarantee = Calibration(question, gates, probe, limit, {}, {})
    p = probabilities(tested, gates, probe)

    def answers(some: Sequence[Row], p: Doubles, policy: Policy) -> tuple[PolicyAnswers, list[RiskLimit]]:
        """A policy's answers to familiar questions, and the limits on the errors of accepted answers and, if there are
        any, on accepted unanswerable questions.
        """
        known = familiar(some, without_guarantee)
        found = policy_answers(some, p, policy, question.base_perplexity, cost).rows(np.flatnonzero(known))
        limits = [RiskLimit(found.count, config.e)]
        without = np.array([not r.example.answerable for r in some], dtype=bool)
        if without.any():
            claimed = found.rows(np.flatnonzero(without[known])).claimed
            limits.append(RiskLimit(claimed, config.unanswerable, True))
        return found, limits

    policies = [one for one in POLICIES if all(tier in gates for tier in one.order(one.modifier, False))]
    promises: dict[str, Guarantee] = {}
    searched: dict[str, tuple[float, list[tuple[float, float, float]]]] = {}
    for policy in policies:
        chosen, of_pool = answers(pool, p_pool, policy)
        _, tests = answers(tested, p, policy)
        order = threshold_order(of_pool, len(tested) / len(pool), config.confidence)
        promises[policy.name] = guarantee(order, tests, len(tested), config.confidence)
        searched[policy.name] = search(chosen)
    found = Calibration(question, gates, probe, limit, promises, {name: t for name, (t, _) in searched.items()})
    write_json(out / FILE, found.to_json())
    _draw(out, tested, easy_tested, p, found)
    tried_by_policy = {name: tried for name, (_, tried) in searched.items()}
    frontier_picture(out / "frontier.png", tried_by_policy, len(pool))
    return {
        "rows": {name: len(split) for name, split in rows.items()},
        "question": _question_figures(question, tested, easy_tested),
        "gates": {
            name: {**fitted[name].figures, **_figures(*judged)} for name, judged in _judged(tested, p, gates).items()
        },
        "benefit": compare_benefit(pool, tested, gates, probe, seed),
        "guarantee": {name: _promised(promise) for name, promise in promises.items()},
        "searched": {
            name: {"threshold": t, "tried": [list(row) for row in tried]} for name, (t, tried) in searched.items()
        },
    }


def _answer_perplexity(rows: Sequence[Row]) -> float:
    """Where the histograms of the base's right and wrong answers cross; the maximum if one kind is missing."""
    values = np.array([perplexity(r.base.signals) for r in rows])
    right = _correct([r.base for r in rows]) > 0
    return crossing(values[right], values[~right]) if right.any() and not right.all() else float(values.max())


def _question_figures(gate: QuestionGate, rows: Sequence[Row], easy: Sequence[bool]) -> dict[str, Any]:
    """Figures of the question gate on rows that it was not fitted on."""
    is_easy_row, scores = np.array(easy, dtype=bool), _draft_scores(rows)
    passed = np.array([gate.easy(perplexity, p_easy) for perplexity, p_easy in scores], dtype=bool)
    surprise, right = np.array([r.surprise for r in rows]), _correct([r.base for r in rows])
    return {
        "perplexity": gate.perplexity,
        "p_easy": gate.p_easy,
        "base_perplexity": gate.base_perplexity if math.isfinite(gate.base_perplexity) else None,
        "auroc_perplexity": auroc(-scores[:, 0], is_easy_row),
        "auroc_p_easy": auroc(scores[:, 1], is_easy_row),
        "auroc_base_perplexity": auroc(-surprise, right),
        "easy_passed": float(passed[is_easy_row].mean()) if is_easy_row.any() else None,
        "hard_passed": float(passed[~is_easy_row].mean()) if not is_easy_row.all() else None,
    }


def _judged(rows: Sequence[Row], p: Doubles, gates: Mapping[str, Gate]) -> dict[str, tuple[Doubles, list[Answer]]]:
    """P(correct) and the answers judged by each gate."""
    judged = {
        "draft": (p[:, 0], [r.draft for r in rows if r.draft]),
        "base": (p[:, 1], [r.base for r in rows]),
    }
    index = with_modifier(rows)
    modified = [a for a in (rows[i].modifier for i in index) if a]
    judged |= {"modifier": (p[index, 2], modified), "direct": (p[index, 3], modified)}
    return {name: judged[name] for name in gates}


def _draw(out: Path, rows: Sequence[Row], easy: Sequence[bool], p: Doubles, found: Calibration) -> None:
    """Pictures: reliability of all gates, and the histograms behind the thresholds."""
    judged = _judged(rows, p, found.gates)
    reliability_picture(
        out / "reliability.png", {name: (values, _correct(answers)) for name, (values, answers) in judged.items()}
    )
    is_easy_row, right = np.array(easy, dtype=bool), _correct([r.base for r in rows]) > 0
    drafted, surprise = _draft_scores(rows)[:, 0], np.array([r.surprise for r in rows])
    answered = np.array([perplexity(r.base.signals) for r in rows])
    threshold = found.guarantees[Policy().name].threshold
    histogram_picture(
        out / "histogram.png",
        [
            (
                "perplexity of the question",
                {"easy": drafted[is_easy_row], "hard": drafted[~is_easy_row]},
                found.question.perplexity,
            ),
            (
                "base's perplexity of the question",
                {"right": surprise[right], "wrong": surprise[~right]},
                _finite(found.question.base_perplexity),
            ),
            (
                "perplexity of the base's answer",
                {"right": answered[right], "wrong": answered[~right]},
                found.perplexity,
            ),
            ("P(correct) of the base's answer", {"right": p[right, 1], "wrong": p[~right, 1]}, _finite(threshold)),
        ],
    )


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def estimate(config: Config, given: Given) -> Estimate:
    """The file of the calibration, with its size in the recipe tiny."""
    return Estimate((FileFacts({FILE: FileSize(290_000, 0.73)}),))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`answers` to the questions of `data` -> calibration.json, pictures."""
    answers, data = inputs["answers"], inputs["data"].path
    rows = {name: read_rows(answers.path, name, read_examples(split_path(data, name))) for name in SPLITS}
    cost = {role: float(size) for role, size in answers.metrics["bytes"].items()}
    return calibrate(rows, cost, config, context.seed, out)
