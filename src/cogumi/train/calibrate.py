"""Stage `calibrate`: everything that decides at run time, learned from graded answers (SPEC F1 to F4, F10).

The finished models answer three splits. On `fit` the gates are fitted, on `selection` form and calibrator are chosen,
thresholds searched (F10) and the order of their tests fixed, on `threshold` the promise is tested and the figures are
measured. For an unanswerable question the abstention is the correct answer; in the promise, abstentions count neither
as accepted nor as wrong.
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

from cogumi.cascade.tiers import Tiers
from cogumi.confidence.gate import Calibration, Gate, QuestionGate
from cogumi.confidence.guarantee import Guarantee, Limit, guarantee, sequence
from cogumi.confidence.metrics import aurc, auroc, brier, crossing, ece, log_loss
from cogumi.confidence.nets import Net, load_head, load_net, load_scope
from cogumi.confidence.policy import POLICIES, Answers, Policy
from cogumi.confidence.signals import perplexity
from cogumi.core.errors import DataError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import FileFacts, FileSize
from cogumi.core.files import write_json
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.examples import is_easy, read_examples, split_path
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.train.confidence_plots import frontier_picture, histogram_picture, reliability_picture
from cogumi.train.fit_gate import Fitted, Signals, fit_gate, fit_probe
from cogumi.train.tier_answers import (
    Answer,
    Asking,
    Row,
    ask,
    asked,
    base_rows,
    familiar,
    hidden,
    policy_answers,
    probabilities,
)

VERSION = 2
KIND = "calibration"
INPUTS = {"data": "examples", "base": "gguf", "draft": "gguf", "draft_model": "model", "router": "router"}
OPTIONAL = {"modifier_*": "gguf"}
SPLITS = ("fit", "selection", "threshold")
MODIFIER = "modifier_"
NOVEL = 0.005
"""Share of calibrated questions that may be taken for novel ones: what it costs to notice those that are."""
HARD_PASSED = 0.01
"""Share of hard questions that the draft may take for easy ones."""
SEARCH = tuple(round(0.70 + 0.02 * i, 2) for i in range(11))
"""Thresholds tried for the best accuracy at its cost."""
FILE = "calibration.json"

Doubles = NDArray[np.float64]


class Config(BaseModel):
    """At most `e` of the accepted answers may be wrong, and `unanswerable` of the questions without an answer accepted,
    with `confidence`; questions up to `easy_up_to` are easy.

    The documents' perplexities are 20 (`draft_perplexity`), 12.4 (`base_perplexity`) and 30 (`answer_perplexity`);
    none: learned, where the histograms cross.
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
    context: int = Field(256, ge=16)


def open_tiers(inputs: Mapping[str, Artifact], config: Config, opened: ExitStack) -> Tiers:
    """The models of the inputs; `opened` closes them."""
    adapters = {
        role.removeprefix(MODIFIER): artifact.path / "adapter.gguf"
        for role, artifact in inputs.items()
        if role.startswith(MODIFIER)
    }
    size: dict[str, Any] = {"slots": config.slots, "context": config.context, "lookup": False}
    base = LlamaEngine(inputs["base"].path / "model.gguf", adapters=adapters, **size)
    opened.callback(base.close)
    draft = LlamaEngine(inputs["draft"].path / "model.gguf", **size)
    opened.callback(draft.close)
    difficulty = load_head(inputs["draft_model"].path / "difficulty.safetensors")
    router = inputs["router"].path / "router.safetensors"
    return Tiers(base, draft, difficulty, load_net(router), load_scope(router))


def fit_question_gate(rows: Sequence[Row], easy: Sequence[bool], config: Config) -> QuestionGate:
    """Thresholds where the histograms of easy and hard questions cross; all are easy if one kind is missing.

    First that of P(easy), where at most `HARD_PASSED` of the hard ones may pass; then that of perplexity among the
    questions that P(easy) lets pass, so that a perplexity which says nothing refuses nothing. The base's is learned
    from what it answered right and wrong.
    """
    perplexities, p_easy = _readings(rows).T
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


def _readings(rows: Sequence[Row]) -> Doubles:
    """The draft's perplexity and P(easy) of each question [n, 2]."""
    return np.array([(r.question.perplexity, r.question.p_easy) for r in rows])


def _correct(answers: Sequence[Answer | None]) -> Doubles:
    """Which answers are correct [n]; 0 where there is none."""
    return np.array([a is not None and a.correct for a in answers], dtype=np.float64)


def fit_base(rows: Mapping[str, list[Row]], seed: int) -> tuple[Fitted, Net | None]:
    """The base's gate, and the probe of its hidden states that is one of the gate's signals."""
    fit, chosen = rows["fit"], rows["selection"]
    right = {name: _correct([r.base for r in rows[name]]) for name in ("fit", "selection")}
    probe, out_of_fold = fit_probe(hidden(fit), right["fit"], seed)
    seen: list[Mapping[str, float]] = [r.base.signals for r in fit]
    if probe:  # what it says of rows that it has not seen
        seen = [{**signals, "probe": float(z)} for signals, z in zip(seen, out_of_fold, strict=True)]
    return fit_gate(seen, right["fit"], base_rows(chosen, probe), right["selection"], seed), probe


def fit_gates(rows: Mapping[str, list[Row]], seed: int) -> tuple[dict[str, Fitted], Net | None]:
    """A gate for every tier of which `fit` and `selection` hold answers, and the probe."""
    fit, chosen = rows["fit"], rows["selection"]
    base, probe = fit_base(rows, seed)

    def fitted(
        seen: Signals, answers: Sequence[Answer | None], later: Signals, chosen_by: Sequence[Answer | None]
    ) -> Fitted:
        return fit_gate(seen, _correct(answers), later, _correct(chosen_by), seed)

    drafts, drafts_later = [r.draft for r in fit], [r.draft for r in chosen]
    gates = {
        "draft": fitted([a.signals for a in drafts], drafts, [a.signals for a in drafts_later], drafts_later),
        "base": base,
    }
    ours, theirs = asked(fit), asked(chosen)
    if len(ours) and len(theirs):
        p = base.gate.p_all(base_rows(chosen, probe))
        answers = [fit[i].modifier for i in ours], [chosen[i].modifier for i in theirs]
        after = (
            [fit[i].modifier_signals(float(base.out_of_fold[i])) for i in ours],
            [chosen[i].modifier_signals(float(p[i])) for i in theirs],
        )
        alone = [fit[i].direct_signals for i in ours], [chosen[i].direct_signals for i in theirs]
        gates["modifier"] = fitted(after[0], answers[0], after[1], answers[1])
        gates["direct"] = fitted(alone[0], answers[0], alone[1], answers[1])
    return gates, probe


def compare_benefit(rows: Mapping[str, list[Row]], gates: Mapping[str, Gate], probe: Net | None, seed: int) -> Any:
    """Two ways to rank who should be asked a modifier: the base is wrong, or the modifier would put it right.

    For each, the mean accuracy over all shares of questions that are handed on, highest ranked first
    (arXiv 2604.14251). None where no modifier answered.
    """
    parts = {name: [split[i] for i in asked(split)] for name, split in rows.items()}
    if not all(parts.values()):
        return None

    def fixed(split: Sequence[Row]) -> Doubles:
        return _correct([r.modifier for r in split]) * (1 - _correct([r.base for r in split]))

    seen = {name: base_rows(split, probe) for name, split in parts.items()}
    fitted = fit_gate(seen["fit"], fixed(parts["fit"]), seen["selection"], fixed(parts["selection"]), seed)
    tested = parts["threshold"]
    benefit, wrong = fitted.gate.p_all(seen["threshold"]), 1 - gates["base"].p_all(seen["threshold"])
    base, modifier = _correct([r.base for r in tested]), _correct([r.modifier for r in tested])

    def mean_accuracy(score: Doubles) -> float:
        order = np.argsort(-score, kind="stable")
        handed_on = np.cumsum((modifier - base)[order]) / len(base)
        return float(base.mean() + np.mean(np.concatenate([[0.0], handed_on])))

    return {
        "n": len(tested),
        "fixed": float(fixed(tested).mean()),
        "auroc_benefit": auroc(benefit, fixed(tested)),
        "auroc_base_wrong": auroc(wrong, fixed(tested)),
        "mean_accuracy_benefit": mean_accuracy(benefit),
        "mean_accuracy_base_wrong": mean_accuracy(wrong),
        "mean_accuracy_random": float((base.mean() + modifier.mean()) / 2),
    }


def search(answers: Answers) -> tuple[float, list[tuple[float, float, float]]]:
    """The threshold of `SEARCH` with the best accuracy x 1/cost, and every (threshold, accuracy, cost)."""
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

    `cost` is that of one token of `draft` and of `base`.
    """
    fitted, probe = fit_gates(rows, seed)
    gates = {name: one.gate for name, one in fitted.items()}
    easy = {name: [is_easy(r.example, config.easy_up_to) for r in rows[name]] for name in rows}
    question = fit_question_gate(rows["fit"], easy["fit"], config)
    limit = config.answer_perplexity or _answer_perplexity(rows["fit"])
    unbound = Calibration(question, gates, probe, limit, {}, {})
    p = {name: probabilities(rows[name], gates, probe) for name in ("selection", "threshold")}

    known = {name: familiar(rows[name], unbound) for name in p}

    def answers(split: str, policy: Policy) -> Answers:
        all_of_them = policy_answers(rows[split], p[split], policy, question.base_perplexity, cost)
        return all_of_them.rows(np.flatnonzero(known[split]))

    def limits(split: str, answers: Answers, config: Config) -> list[Limit]:
        """What must hold of accepted answers, and of questions without an answer where there are any."""
        without = np.array([r.example.meta.get("check", {}).get("kind") == "abstain" for r in rows[split]], dtype=bool)
        found = [Limit(answers.count, config.e)]
        if without.any():
            found.append(Limit(answers.rows(np.flatnonzero(without[known[split]])).claimed, config.unanswerable))
        return found

    policies = [policy for policy in POLICIES if "modifier" in gates or not policy.modifier]
    promises: dict[str, Guarantee] = {}
    searched: dict[str, tuple[float, list[tuple[float, float, float]]]] = {}
    for policy in policies:
        chosen, tested = answers("selection", policy), answers("threshold", policy)
        order = sequence(limits("selection", chosen, config))
        tests = limits("threshold", tested, config)
        promises[policy.name] = guarantee(order, tests, len(rows["threshold"]), config.confidence)
        searched[policy.name] = search(chosen)
    found = Calibration(question, gates, probe, limit, promises, {name: t for name, (t, _) in searched.items()})
    write_json(out / FILE, found.to_json())
    _draw(out, rows["threshold"], easy["threshold"], p["threshold"], found)
    frontier_picture(out / "frontier.png", {name: tried for name, (_, tried) in searched.items()})
    return {
        "rows": {name: len(split) for name, split in rows.items()},
        "question": _question_figures(question, rows["threshold"], easy["threshold"]),
        "gates": {
            name: {**fitted[name].figures, **_figures(*seen)}
            for name, seen in _judged(rows["threshold"], p["threshold"], gates).items()
        },
        "benefit": compare_benefit(rows, gates, probe, seed),
        "guarantee": {name: _promised(promise) for name, promise in promises.items()},
        "searched": {
            name: {"threshold": t, "tried": [list(row) for row in tried]} for name, (t, tried) in searched.items()
        },
    }


def _answer_perplexity(rows: Sequence[Row]) -> float:
    """Where the perplexities of the base's right and wrong answers cross; infinite where one kind is missing."""
    values = np.array([perplexity(r.base.signals) for r in rows])
    right = _correct([r.base for r in rows]) > 0
    return crossing(values[right], values[~right]) if right.any() and not right.all() else float(values.max())


def _question_figures(gate: QuestionGate, rows: Sequence[Row], easy: Sequence[bool]) -> dict[str, Any]:
    """How the question gate does on rows it was not fitted on."""
    plain, read = np.array(easy, dtype=bool), _readings(rows)
    passed = np.array([gate.easy(perplexity, p_easy) for perplexity, p_easy in read], dtype=bool)
    surprise, right = np.array([r.surprise for r in rows]), _correct([r.base for r in rows])
    return {
        "perplexity": gate.perplexity,
        "p_easy": gate.p_easy,
        "base_perplexity": gate.base_perplexity if math.isfinite(gate.base_perplexity) else None,
        "auroc_perplexity": auroc(-read[:, 0], plain),
        "auroc_p_easy": auroc(read[:, 1], plain),
        "auroc_base_perplexity": auroc(-surprise, right),
        "easy_passed": float(passed[plain].mean()) if plain.any() else None,
        "hard_passed": float(passed[~plain].mean()) if not plain.all() else None,
    }


def _judged(rows: Sequence[Row], p: Doubles, gates: Mapping[str, Gate]) -> dict[str, tuple[Doubles, list[Answer]]]:
    """P(correct) and answers that each gate judged."""
    seen = {"draft": (p[:, 0], [r.draft for r in rows]), "base": (p[:, 1], [r.base for r in rows])}
    index = asked(rows)
    modified = [a for a in (rows[i].modifier for i in index) if a]
    seen |= {"modifier": (p[index, 2], modified), "direct": (p[index, 3], modified)}
    return {name: seen[name] for name in gates}


def _draw(out: Path, rows: Sequence[Row], easy: Sequence[bool], p: Doubles, found: Calibration) -> None:
    """The reliability of all gates, and the histograms behind the thresholds."""
    judged = _judged(rows, p, found.gates)
    reliability_picture(
        out / "reliability.png", {name: (values, _correct(answers)) for name, (values, answers) in judged.items()}
    )
    plain, right = np.array(easy, dtype=bool), _correct([r.base for r in rows]) > 0
    read, surprise = _readings(rows)[:, 0], np.array([r.surprise for r in rows])
    answered = np.log10([perplexity(r.base.signals) for r in rows])
    threshold = found.guarantees[Policy().name].threshold
    histogram_picture(
        out / "histogram.png",
        [
            (
                "draft's perplexity of the question",
                {"easy": read[plain], "hard": read[~plain]},
                found.question.perplexity,
            ),
            (
                "base's perplexity of the question",
                {"right": surprise[right], "wrong": surprise[~right]},
                _finite(found.question.base_perplexity),
            ),
            (
                "log10 of the answer's perplexity",
                {"right": answered[right], "wrong": answered[~right]},
                math.log10(found.perplexity),
            ),
            ("P(correct) of the base's answer", {"right": p[right, 1], "wrong": p[~right, 1]}, _finite(threshold)),
        ],
    )


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def estimate(config: Config, given: Given) -> Estimate:
    """Its file, as large as that of the recipe tiny."""
    return Estimate((FileFacts({FILE: FileSize(290_000, 0.73)}),))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`base`, `draft`, `modifier_<domain>` (GGUF), `draft_model`, `router`, `data` -> calibration.json, pictures."""
    examples = {name: read_examples(split_path(inputs["data"].path, name))[: config.rows] for name in SPLITS}
    if empty := [name for name, found in examples.items() if not found]:
        raise DataError(f"the split '{empty[0]}' is empty: calibration needs rows in {', '.join(SPLITS)}")
    cost = {role: float((inputs[role].path / "model.gguf").stat().st_size) for role in ("draft", "base")}
    with ExitStack() as opened:
        tiers = open_tiers(inputs, config, opened)
        asking = Asking(config.max_tokens, 2 * config.slots, context.progress)
        everything = [example for found in examples.values() for example in found]
        answered = iter(ask(tiers, everything, asking))
        rows = {name: [next(answered) for _ in found] for name, found in examples.items()}
    return calibrate(rows, cost, config, context.seed, out)
