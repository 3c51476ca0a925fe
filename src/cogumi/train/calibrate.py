"""Stage `calibrate`: gates and thresholds of the cascade, fitted to graded answers (SPEC F1, F2, F3, F4, F10).

The finished models answer three splits. Gates are fitted on `fit`. On `selection` their form and calibrator are chosen,
thresholds are searched, and the order of the tests is fixed. On `threshold` the guarantee is tested and the
figures are measured. The correct answer to an unanswerable question is an abstention; the guarantee counts abstentions
neither as accepted nor as wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cogumi.cascade.tiers import Heads, Tiers
from cogumi.confidence.gate import Calibration, Gate, QuestionGate
from cogumi.confidence.guarantee import Guarantee, RiskLimit, guarantee, threshold_order
from cogumi.confidence.metrics import aurc, auroc, brier, crossing, ece, log_loss
from cogumi.confidence.nets import Net, load_head, load_net, load_scope
from cogumi.confidence.policy import POLICIES, Policy, PolicyAnswers
from cogumi.confidence.signals import perplexity
from cogumi.core.errors import DataError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import FileFacts, FileSize
from cogumi.core.files import write_json
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example
from cogumi.data.examples import is_easy, read_examples, split_path
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.teach.context_size import context_for
from cogumi.teach.tier_answers import (
    Answer,
    AskOptions,
    Row,
    ask,
    base_rows,
    familiar,
    hidden,
    policy_answers,
    probabilities,
    with_modifier,
)
from cogumi.train.confidence_plots import frontier_picture, histogram_picture, reliability_picture
from cogumi.train.fit_gate import Fitted, Signals, fit_gate, fit_probe

VERSION = 5
KIND = "calibration"
INPUTS = {"data": "examples", "base": "gguf", "difficulty": "model|reader", "router": "router|reader"}
OPTIONAL = {"draft": "gguf", "modifier_*": "gguf"}
SPLITS = ("fit", "selection", "threshold")
MODIFIER = "modifier_"
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
    rows: int | None = Field(None, ge=1, description="at most so many rows of each split; none: all")
    max_tokens: int = Field(128, ge=1)
    slots: int = Field(16, ge=1)
    context: int | None = Field(None, ge=16, description="tokens of question and answer; none: the longest")


def open_tiers(inputs: Mapping[str, Artifact], examples: Sequence[Example], config: Config, opened: ExitStack) -> Tiers:
    """Open the models for questions `examples`; `opened` closes them. Without a draft the base reads the questions."""
    models = [inputs[role].path / "model.gguf" for role in ("base", "draft") if role in inputs]
    context = context_for(models, examples, config.max_tokens, config.context)
    adapters = {
        role.removeprefix(MODIFIER): artifact.path / "adapter.gguf"
        for role, artifact in inputs.items()
        if role.startswith(MODIFIER)
    }
    size: dict[str, Any] = {"slots": config.slots, "context": context, "lookup": False}
    base = LlamaEngine(inputs["base"].path / "model.gguf", adapters=adapters, **size)
    opened.callback(base.close)
    draft = base
    if "draft" in inputs:
        draft = LlamaEngine(inputs["draft"].path / "model.gguf", **size)
        opened.callback(draft.close)
    difficulty = load_head(inputs["difficulty"].path / "difficulty.safetensors")
    router = inputs["router"].path / "router.safetensors"
    return Tiers(base, draft, Heads(difficulty, load_net(router), load_scope(router)))


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


def fit_base(rows: Mapping[str, list[Row]], seed: int) -> tuple[Fitted, Net | None]:
    """The base's gate, and the probe of its hidden states, which is one of the gate's signals."""
    fit, chosen = rows["fit"], rows["selection"]
    right = {name: _correct([r.base for r in rows[name]]) for name in ("fit", "selection")}
    probe, out_of_fold = fit_probe(hidden(fit), right["fit"], seed)
    signals: list[Mapping[str, float]] = [r.base.signals for r in fit]
    if probe:  # out-of-fold, because the probe was fitted on these rows
        signals = [{**row, "probe": float(z)} for row, z in zip(signals, out_of_fold, strict=True)]
    return fit_gate(signals, right["fit"], base_rows(chosen, probe), right["selection"], seed), probe


def fit_gates(rows: Mapping[str, list[Row]], seed: int) -> tuple[dict[str, Fitted], Net | None]:
    """A gate for every tier with answers in `fit` and `selection`, and the probe."""
    fit, chosen = rows["fit"], rows["selection"]
    base, probe = fit_base(rows, seed)

    def fitted(
        signals: tuple[Signals, Signals], answers: tuple[Sequence[Answer | None], Sequence[Answer | None]]
    ) -> Fitted:
        return fit_gate(signals[0], _correct(answers[0]), signals[1], _correct(answers[1]), seed)

    drafts = [r.draft for r in fit if r.draft], [r.draft for r in chosen if r.draft]
    gates = {"base": base}
    if all(drafts):
        gates["draft"] = fitted(([a.signals for a in drafts[0]], [a.signals for a in drafts[1]]), drafts)
    of_fit, of_chosen = with_modifier(fit), with_modifier(chosen)
    if len(of_fit) and len(of_chosen):
        p = base.gate.p_all(base_rows(chosen, probe))
        answers = [fit[i].modifier for i in of_fit], [chosen[i].modifier for i in of_chosen]
        after_base = (
            [fit[i].modifier_signals(float(base.out_of_fold[i])) for i in of_fit],
            [chosen[i].modifier_signals(float(p[i])) for i in of_chosen],
        )
        direct = [fit[i].direct_signals for i in of_fit], [chosen[i].direct_signals for i in of_chosen]
        gates["modifier"] = fitted(after_base, answers)
        gates["direct"] = fitted(direct, answers)
    return gates, probe


def compare_benefit(rows: Mapping[str, list[Row]], gates: Mapping[str, Gate], probe: Net | None, seed: int) -> Any:
    """Compare two scores for escalation to a modifier: P(the base is wrong) and P(the modifier corrects the base).

    For each, the mean accuracy over all shares of escalated questions, highest scores first (arXiv 2604.14251). None
    if no modifier answered.
    """
    parts = {name: [split[i] for i in with_modifier(split)] for name, split in rows.items()}
    if not all(parts.values()):
        return None

    def fixed(split: Sequence[Row]) -> Doubles:
        return _correct([r.modifier for r in split]) * (1 - _correct([r.base for r in split]))

    signals = {name: base_rows(split, probe) for name, split in parts.items()}
    fitted = fit_gate(signals["fit"], fixed(parts["fit"]), signals["selection"], fixed(parts["selection"]), seed)
    tested = parts["threshold"]
    benefit, wrong = fitted.gate.p_all(signals["threshold"]), 1 - gates["base"].p_all(signals["threshold"])
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
    fitted, probe = fit_gates(rows, seed)
    gates = {name: one.gate for name, one in fitted.items()}
    easy = {name: [_easy(r, config) for r in rows[name]] for name in rows}
    question = fit_question_gate(rows["fit"], easy["fit"], config)
    limit = config.answer_perplexity or _answer_perplexity(rows["fit"])
    without_guarantee = Calibration(question, gates, probe, limit, {}, {})
    p = {name: probabilities(rows[name], gates, probe) for name in ("selection", "threshold")}

    known = {name: familiar(rows[name], without_guarantee) for name in p}

    def answers(split: str, policy: Policy) -> PolicyAnswers:
        every = policy_answers(rows[split], p[split], policy, question.base_perplexity, cost)
        return every.rows(np.flatnonzero(known[split]))

    def limits(split: str, answers: PolicyAnswers, config: Config) -> list[RiskLimit]:
        """Limits on the errors of accepted answers and, if the split has any, on accepted unanswerable questions."""
        without = np.array([not r.example.answerable for r in rows[split]], dtype=bool)
        found = [RiskLimit(answers.count, config.e)]
        if without.any():
            claimed = answers.rows(np.flatnonzero(without[known[split]])).claimed
            found.append(RiskLimit(claimed, config.unanswerable, True))
        return found

    policies = [one for one in POLICIES if all(tier in gates for tier in one.order(one.modifier, False))]
    promises: dict[str, Guarantee] = {}
    searched: dict[str, tuple[float, list[tuple[float, float, float]]]] = {}
    for policy in policies:
        chosen, tested = answers("selection", policy), answers("threshold", policy)
        order = threshold_order(limits("selection", chosen, config))
        tests = limits("threshold", tested, config)
        promises[policy.name] = guarantee(order, tests, len(rows["threshold"]), config.confidence)
        searched[policy.name] = search(chosen)
    found = Calibration(question, gates, probe, limit, promises, {name: t for name, (t, _) in searched.items()})
    write_json(out / FILE, found.to_json())
    _draw(out, rows["threshold"], easy["threshold"], p["threshold"], found)
    tried_by_policy = {name: tried for name, (_, tried) in searched.items()}
    frontier_picture(out / "frontier.png", tried_by_policy, len(rows["selection"]))
    return {
        "rows": {name: len(split) for name, split in rows.items()},
        "question": _question_figures(question, rows["threshold"], easy["threshold"]),
        "gates": {
            name: {**fitted[name].figures, **_figures(*judged)}
            for name, judged in _judged(rows["threshold"], p["threshold"], gates).items()
        },
        "benefit": compare_benefit(rows, gates, probe, seed),
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
    """`base`, `draft`, `modifier_<domain>` (GGUF), `difficulty`, `router`, `data` -> calibration.json, pictures."""
    examples = {name: read_examples(split_path(inputs["data"].path, name))[: config.rows] for name in SPLITS}
    if empty := [name for name, found in examples.items() if not found]:
        raise DataError(f"the split '{empty[0]}' is empty: calibration needs rows in {', '.join(SPLITS)}")
    models = [role for role in ("draft", "base") if role in inputs]
    cost = {role: float((inputs[role].path / "model.gguf").stat().st_size) for role in models}
    with ExitStack() as opened:
        everything = [example for found in examples.values() for example in found]
        tiers = open_tiers(inputs, everything, config, opened)
        options = AskOptions(config.max_tokens, 2 * config.slots, context.progress)
        answered = iter(ask(tiers, everything, options))
        rows = {name: [next(answered) for _ in found] for name, found in examples.items()}
    return calibrate(rows, cost, config, context.seed, out)
