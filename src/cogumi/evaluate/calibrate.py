"""Stage `calibrate`: everything that decides at run time, learned from graded answers (SPEC F1 to F4).

The finished models answer three splits, the base every row, and the modifier of a row's routed domain its
row. On `fit` the answer gates and the question gate are fitted, on `selection` form and calibrator are
chosen and the order of thresholds fixed, on `threshold` the promise is tested and the figures are measured.
For an unanswerable question the abstention is the correct answer; in the promise, abstentions count neither
as accepted nor as wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cogumi.artifact import write_json
from cogumi.cascade.tiers import Question, Tiers
from cogumi.data.examples import is_easy, read_examples, split_path
from cogumi.errors import DataError
from cogumi.evaluate.fit_gate import Fitted, fit_gate
from cogumi.evaluate.graders import grade_all
from cogumi.evaluate.metrics import aurc, auroc, brier, crossing, ece, log_loss
from cogumi.evaluate.plots import histogram_picture, reliability_picture
from cogumi.route.domains import route
from cogumi.route.gate import Calibration, Gate, QuestionGate, check, settle
from cogumi.route.guarantee import Count, Guarantee, guarantee, sequence
from cogumi.route.nets import load_head, load_net
from cogumi.route.signals import abstains, answer_signals, modifier_signals, perplexity, same_text
from cogumi.runtime.engine import replies
from cogumi.runtime.llama_engine import LlamaEngine
from cogumi.stage import Context
from cogumi.types import Artifact, Example, Reply, Request

VERSION = 1
KIND = "calibration"
SPLITS = ("fit", "selection", "threshold")
MODIFIER = "modifier_"
NOVEL = 0.005
"""Share of calibrated questions that may be taken for novel ones: what it costs to notice those that are."""
FILE = "calibration.json"

Doubles = NDArray[np.float64]


class Config(BaseModel):
    """At most `e` of the accepted answers may be wrong, with `confidence`; questions up to `easy_up_to` are
    easy.
    """

    model_config = ConfigDict(extra="forbid")
    e: float = Field(0.05, gt=0, lt=1)
    confidence: float = Field(0.95, gt=0, lt=1)
    easy_up_to: int = Field(2, ge=1)
    rows: int | None = Field(None, ge=1, description="at most so many rows of each split; none: all")
    max_tokens: int = Field(128, ge=1)
    slots: int = Field(16, ge=1)
    context: int = Field(256, ge=16)


@dataclass(frozen=True, slots=True)
class Answer:
    """A tier's graded reply to one row, and the signals of the reply itself."""

    reply: Reply
    correct: bool
    signals: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One example with what the draft made of it and what base and routed modifier answered."""

    example: Example
    question: Question
    base: Answer
    modifier: Answer | None

    @property
    def base_signals(self) -> dict[str, float]:
        """What the base's gate sees."""
        return {**self.base.signals, **self.question.signals}

    def modifier_signals(self, base_p: float) -> dict[str, float]:
        """What the modifiers' gate sees; only for rows with a modifier's answer."""
        assert self.modifier is not None
        agree = same_text(self.modifier.reply.text, self.base.reply.text)
        own = {**self.modifier.signals, **self.question.signals}
        return modifier_signals(own, self.base_signals, base_p, agree)


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
    return Tiers(base, draft, difficulty, load_net(inputs["router"].path / "router.safetensors"))


def answer_split(tiers: Tiers, examples: Sequence[Example], config: Config, context: Context) -> list[Row]:
    """Ask the base every question, the routed modifier those that have one, and grade all answers."""
    requests = [Request(messages=e.messages, max_tokens=config.max_tokens, speculate=False) for e in examples]
    readings = map(tiers.draft.read, requests)  # one at a time: how reads share batches must not reach the bytes
    questions = [tiers.judge(request, reading) for request, reading in zip(requests, readings, strict=True)]
    domains = [route(question.domains, tiers.base.adapters) for question in questions]
    asked = [(i, domain) for i, domain in enumerate(domains) if domain]
    adapted = [replace(requests[i], adapter=domain) for i, domain in sorted(asked, key=lambda a: (a[1], a[0]))]
    order = [i for i, _ in sorted(asked, key=lambda a: (a[1], a[0]))]
    total, answers = len(requests) + len(adapted), []
    for reply in replies(tiers.base, [*requests, *adapted], 2 * config.slots):
        answers.append(reply)
        if len(answers) % 100 == 0:
            context.progress(len(answers), total, {})
    subjects = [*examples, *(examples[i] for i in order)]
    verdicts = grade_all([(e, a.text) for e, a in zip(subjects, answers, strict=True)])
    graded = [Answer(a, v.correct, answer_signals(a)) for a, v in zip(answers, verdicts, strict=True)]
    modified = dict(zip(order, graded[len(examples) :], strict=True))
    return [
        Row(example, question, graded[i], modified.get(i))
        for i, (example, question) in enumerate(zip(examples, questions, strict=True))
    ]


def fit_question_gate(rows: Sequence[Row], easy: Sequence[bool]) -> QuestionGate:
    """Thresholds where the histograms of easy and hard questions cross; all are easy if one kind is missing.

    First that of P(easy); then that of perplexity among the questions that P(easy) lets pass, so that a
    perplexity which says nothing refuses nothing.
    """
    perplexities, p_easy = _readings(rows).T
    novelty = float(np.quantile(perplexities, 1 - NOVEL))
    mask = np.array(easy, dtype=bool)
    if mask.all() or not mask.any():
        return QuestionGate(float(perplexities.max()), 0.0, novelty)
    threshold = -crossing(-p_easy[mask], -p_easy[~mask])
    passing = np.where(p_easy >= threshold, perplexities, np.inf)
    return QuestionGate(crossing(passing[mask], passing[~mask]), threshold, novelty)


def _readings(rows: Sequence[Row]) -> Doubles:
    """The draft's perplexity and P(easy) of each question [n, 2]."""
    return np.array([(r.question.perplexity, r.question.p_easy) for r in rows])


def count(rows: Sequence[Row], base_p: Doubles, modifier_p: Doubles, gate: QuestionGate, *, modifiers: bool) -> Count:
    """Threshold -> accepted, non-abstaining answers and wrong ones of the cascade's whole policy on these rows.

    `base_p` [n] and `modifier_p` [n] (ignored where a row has no modifier's answer) are the gates'
    probabilities.
    """

    def facts(answer: Answer) -> tuple[bool, bool]:
        return abstains(answer.reply.text), answer.correct

    answers = [facts(r.base) for r in rows]
    others = [facts(r.modifier) if r.modifier and modifiers else None for r in rows]
    known = [i for i, r in enumerate(rows) if not gate.novel(r.question.perplexity)]

    def at(threshold: float) -> tuple[int, int]:
        accepted = wrong = 0
        for i in known:
            answer, other = answers[i], others[i]
            base = check("calibrated", float(base_p[i]), {}, threshold)
            modifier = check("calibrated", float(modifier_p[i]), {}, threshold) if other else None
            tier, sure = settle(base, modifier)
            abstaining, correct = other if tier == "modifier" and other else answer
            accepted += sure and not abstaining
            wrong += sure and not abstaining and not correct
        return accepted, wrong

    return at


def _correct(rows: Sequence[Row]) -> Doubles:
    return np.array([r.base.correct for r in rows], dtype=np.float64)


def _asked(rows: Sequence[Row]) -> tuple[list[int], Doubles]:
    """Rows with a modifier's answer, and whether it is correct."""
    index = [i for i, r in enumerate(rows) if r.modifier]
    return index, np.array([bool(r.modifier and r.modifier.correct) for r in rows], dtype=np.float64)[index]


def fit_modifier_gate(rows: Mapping[str, list[Row]], base: Fitted, seed: int) -> Fitted | None:
    """The gate of all modifiers; None if the router sent no row of `fit` or of `selection` to any."""
    (fit, correct), (chosen, by) = _asked(rows["fit"]), _asked(rows["selection"])
    if not fit or not chosen:
        return None
    later = base.gate.p_all([r.base_signals for r in rows["selection"]])
    return fit_gate(
        [rows["fit"][i].modifier_signals(float(base.out_of_fold[i])) for i in fit],
        correct,
        [rows["selection"][i].modifier_signals(float(later[i])) for i in chosen],
        by,
        seed,
    )


def probabilities(rows: Sequence[Row], base: Gate, modifier: Gate | None) -> tuple[Doubles, Doubles]:
    """P(correct) [n] of each row's base answer and of its modifier's (0 where there is none)."""
    p = base.p_all([r.base_signals for r in rows])
    other = np.zeros(len(rows))
    index, _ = _asked(rows)
    if modifier and index:
        other[index] = modifier.p_all([rows[i].modifier_signals(float(p[i])) for i in index])
    return p, other


def _figures(p: Doubles, correct: Doubles, answers: Sequence[Answer]) -> dict[str, Any]:
    signals = [a.signals for a in answers]
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


def calibrate(rows: Mapping[str, list[Row]], config: Config, seed: int, out: Path) -> dict[str, Any]:
    """Rows of the three splits -> calibration.json and two pictures in `out`; returns the figures."""
    base = fit_gate(
        [r.base_signals for r in rows["fit"]],
        _correct(rows["fit"]),
        [r.base_signals for r in rows["selection"]],
        _correct(rows["selection"]),
        seed,
    )
    modifier = fit_modifier_gate(rows, base, seed)
    gates = base.gate, modifier.gate if modifier else None
    p = {name: probabilities(rows[name], *gates) for name in ("selection", "threshold")}
    easy = {name: [is_easy(r.example, config.easy_up_to) for r in rows[name]] for name in rows}
    question = fit_question_gate(rows["fit"], easy["fit"])
    promises = {}
    for policy in ("base", "modifier") if modifier else ("base",):
        counts = {name: count(rows[name], *p[name], question, modifiers=policy == "modifier") for name in p}
        order = sequence(counts["selection"], config.e)
        promises[policy] = guarantee(order, counts["threshold"], len(rows["threshold"]), config.e, config.confidence)
    write_json(out / FILE, Calibration(question, *gates, promises).to_json())

    tested = rows["threshold"]
    index, modified = _asked(tested)
    seen = {"base": (p["threshold"][0], _correct(tested))}
    fitted = {"base": base}
    if modifier:
        seen["modifier"] = p["threshold"][1][index], modified
        fitted["modifier"] = modifier
    reliability_picture(out / "reliability.png", seen)
    plain = np.array(easy["threshold"], dtype=bool)
    read = _readings(tested)
    passed = (read[:, 0] <= question.perplexity) & (read[:, 1] >= question.p_easy)
    right = seen["base"][1] > 0
    threshold = promises["base"].threshold
    histogram_picture(
        out / "histogram.png",
        [
            (
                "draft's perplexity of the question",
                {"easy": read[plain, 0], "hard": read[~plain, 0]},
                question.perplexity,
            ),
            (
                "P(correct) of the base's answer",
                {"right": seen["base"][0][right], "wrong": seen["base"][0][~right]},
                threshold if math.isfinite(threshold) else None,
            ),
        ],
    )
    answers = {"base": [r.base for r in tested], "modifier": [r.modifier for r in tested if r.modifier]}
    return {
        "rows": {name: len(split) for name, split in rows.items()},
        "question": {
            "perplexity": question.perplexity,
            "p_easy": question.p_easy,
            "auroc_perplexity": auroc(-read[:, 0], plain),
            "auroc_p_easy": auroc(read[:, 1], plain),
            "easy_passed": float(passed[plain].mean()) if plain.any() else None,
            "hard_passed": float(passed[~plain].mean()) if not plain.all() else None,
        },
        "gates": {name: {**fitted[name].figures, **_figures(*seen[name], answers[name])} for name in seen},
        "guarantee": {policy: _promised(promise) for policy, promise in promises.items()},
    }


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`base`, `draft`, `modifier_<domain>` (GGUF), `draft_model`, `router`, `data` -> calibration.json,
    pictures.
    """
    examples = {name: read_examples(split_path(inputs["data"].path, name))[: config.rows] for name in SPLITS}
    if empty := [name for name, found in examples.items() if not found]:
        raise DataError(f"the split '{empty[0]}' is empty: calibration needs rows in {', '.join(SPLITS)}")
    with ExitStack() as opened:
        tiers = open_tiers(inputs, config, opened)
        rows = {name: answer_split(tiers, found, config, context) for name, found in examples.items()}
    return calibrate(rows, config, context.seed, out)
