"""Stage `report`: figures of the finished bundle on held-out questions that no earlier step has read (SPEC H1, H3).

All figures are measured here on answers of the shipped files. Modifiers are compared with the base on the answerable
questions of their domain (`gain`), and on questions of other domains that the cascade routed to them
(`lost_elsewhere`, as a share of all held-out questions). Controls (adapters trained on random rows instead of failures)
answer beside the modifiers and are not part of the bundle.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cogumi.bundle.format import open_bundle
from cogumi.confidence.guarantee import Guarantee
from cogumi.confidence.metrics import auroc, brier, ece
from cogumi.confidence.signals import answer_signals, perplexity
from cogumi.core.files import write_text
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example, Reply, Request
from cogumi.data.examples import SPLITS, is_easy, level, read_examples, split_path
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import Engine, final_reply, replies
from cogumi.evaluate.remembering import remembering_cascade
from cogumi.evaluate.report_baselines import alone_figures, base_alone, baselines, conversation_figures, price
from cogumi.evaluate.report_page import page
from cogumi.grading.graders import grade_all
from cogumi.teach.context_size import context_for
from cogumi.train.confidence_plots import Doubles, accuracy_picture, reliability_picture, risk_picture

VERSION = 8
KIND = "report"
INPUTS = {"data": "examples", "bundle": "bundle"}
OPTIONAL = {"control_*": "gguf"}
REPORTS = True
CONTROL = "control_"
LONGEST_SHOWN = 300
"""Characters of a question in the showcase."""
BASE_ALONE = "fast"
"""The mode in which only the base answers."""


class Config(BaseModel):
    """Speculation is measured on questions up to difficulty `easy_up_to`."""

    model_config = ConfigDict(extra="forbid")
    rows: int | None = Field(None, ge=1, description="held-out questions to ask; none: all")
    easy_up_to: int = Field(2, ge=1)
    speculation_prompts: int = Field(200, ge=1)
    p_true: int = Field(0, ge=0, description="answers whose correctness the base is asked itself, as a baseline")
    priced: int = Field(0, ge=0, description="questions on which the cascade's time is compared with the base's")
    max_tokens: int = Field(64, ge=1)
    slots: int = Field(16, ge=1)
    context: int | None = Field(None, ge=16, description="tokens of question and answer; none: the longest")


@dataclass(frozen=True, slots=True)
class GradedAnswers:
    """Questions with the replies of one tier and their verdicts."""

    examples: Sequence[Example]
    replies: Sequence[Reply]
    correct: Sequence[bool]

    def on(self, examples: Sequence[Example]) -> list[bool]:
        """Verdicts of some of the questions."""
        wanted = {e.id for e in examples}
        return [c for e, c in zip(self.examples, self.correct, strict=True) if e.id in wanted]

    def table(self) -> dict[str, dict[str, list[int]]]:
        """`{domain: {level: [correct, n]}}`; levels are those of `data.examples.level`."""
        cells: dict[str, dict[str, list[int]]] = {}
        for example, correct in zip(self.examples, self.correct, strict=True):
            cell = cells.setdefault(example.domain, {}).setdefault(level(example), [0, 0])
            cell[0] += correct
            cell[1] += 1
        return {domain: dict(sorted(levels.items())) for domain, levels in sorted(cells.items())}


@dataclass(slots=True)
class AnswerCollector:
    """Collects graded answers of engines and reports the progress."""

    config: Config
    context: Context
    total: int
    done: int = 0

    def ask(
        self, engine: Engine, examples: Sequence[Example], adapter: str | None = None, mode: str | None = None
    ) -> GradedAnswers:
        """An engine's graded answers to all questions, greedy and without speculation; `mode` is that of a cascade."""
        options = Request(max_tokens=self.config.max_tokens, adapter=adapter, mode=mode, speculate=False)
        requests = [replace(options, messages=e.messages) for e in examples]
        answers = []
        for reply in replies(engine, requests, 2 * self.config.slots):
            answers.append(reply)
            self.done += 1
            if self.done % 100 == 0 or self.done == self.total:
                self.context.progress(self.done, self.total, {})
        verdicts = grade_all([(e, a.text) for e, a in zip(examples, answers, strict=True)])
        return GradedAnswers(examples, answers, [v.correct for v in verdicts])


def base_probabilities(base: GradedAnswers) -> tuple[GradedAnswers, Doubles]:
    """The base's answers in a mode in which only the base answers, and their P(correct) [n].

    Answers without P(correct), to questions unlike the calibration data, are left out.
    """
    at = [i for i, reply in enumerate(base.replies) if reply.p_correct is not None]
    judged = GradedAnswers([base.examples[i] for i in at], [base.replies[i] for i in at], [base.correct[i] for i in at])
    return judged, np.array([base.replies[i].p_correct for i in at], dtype=np.float64)


def confidence_by_domain(cascade: GradedAnswers) -> dict[str, dict[str, Any]]:
    """Of each domain: questions, AUROC of P(correct) of the answers given (None without right and wrong ones),
    accepted answers and wrong ones among them. Unanswerable questions count to their domain.
    """
    found: dict[str, dict[str, Any]] = {}
    for domain in sorted({e.domain for e in cascade.examples}):
        rows = [
            (reply, right)
            for e, reply, right in zip(cascade.examples, cascade.replies, cascade.correct, strict=True)
            if e.domain == domain
        ]
        told = [(reply.p_correct, right) for reply, right in rows if reply.p_correct is not None]
        both = len({right for _, right in told}) == 2
        kept = [right for reply, right in rows if reply.accepted]
        found[domain] = {
            "n": len(rows),
            "auroc": auroc([p for p, _ in told], [right for _, right in told]) if both else None,
            "accepted": len(kept),
            "wrong": len(kept) - sum(kept),
        }
    return found


def gate_figures(base: GradedAnswers, cascade: GradedAnswers, promise: Guarantee) -> dict[str, Any]:
    """Calibration and ranking of P(correct), of the base's answers and of those given (`given`); error and coverage of
    the accepted answers.
    """
    judged, p = base_probabilities(base)
    told = [(r.p_correct, c) for r, c in zip(cascade.replies, cascade.correct, strict=True) if r.p_correct is not None]
    p_given, right = [p for p, _ in told], [c for _, c in told]
    signals = [answer_signals(reply) for reply in judged.replies]
    kept = [c for r, c in zip(cascade.replies, cascade.correct, strict=True) if r.accepted]
    return {
        "n": len(p),
        "ece": ece(p, judged.correct),
        "brier": brier(p, judged.correct),
        "auroc": auroc(p, judged.correct),
        "auroc_perplexity": auroc([-perplexity(s) for s in signals], judged.correct),
        "auroc_length": auroc([-s["log_length"] for s in signals], judged.correct),
        "given": {
            "n": len(told),
            "ece": ece(p_given, right),
            "brier": brier(p_given, right),
            "auroc": auroc(p_given, right),
        },
        "domains": confidence_by_domain(cascade),
        "threshold": promise.threshold,
        "coverage": len(kept) / max(len(cascade.replies), 1),
        "accepted": len(kept),
        "accepted_error": 1 - sum(kept) / len(kept) if kept else 0.0,
        "bound": promise.risk,
        "confidence": promise.confidence,
        "certified": promise.certified,
        "promise": promise.sentence(),
        "assumption": promise.assumption,
    }


def speculation_figures(base: Engine, examples: Sequence[Example], config: Config) -> dict[str, Any]:
    """One request at a time with speculation forced on and off: acceptance rate, equal answers and speed-up."""
    seconds, drafted, accepted, identical = {True: 0.0, False: 0.0}, 0, 0, 0
    for example in examples:
        outputs = []
        for speculate in (True, False):
            request = Request(messages=example.messages, max_tokens=config.max_tokens, speculate=speculate)
            began = time.perf_counter()
            reply = final_reply(base.generate(request))
            seconds[speculate] += time.perf_counter() - began
            drafted, accepted = drafted + reply.usage.drafted, accepted + reply.usage.accepted
            outputs.append([(t.id, t.logprob) for t in reply.tokens])
        identical += outputs[0] == outputs[1]
    return {
        "acceptance": accepted / max(drafted, 1),
        "speedup": seconds[False] / max(seconds[True], 1e-9),
        "identical": identical,
        "n": len(examples),
    }


def unanswerable_figures(answers: GradedAnswers, unseen: Sequence[str]) -> dict[str, Any]:
    """Unanswerable questions with an accepted answer, by kind."""
    kinds: dict[str, list[int]] = {}
    for example, reply in zip(answers.examples, answers.replies, strict=True):
        cell = kinds.setdefault(str(example.meta.get("unanswerable", "unanswerable")), [0, 0])
        cell[0] += reply.accepted
        cell[1] += 1
    confident = sum(cell[0] for cell in kinds.values())
    return {"confident": confident, "n": len(answers.examples), "kinds": kinds, "unseen_kinds": list(unseen)}


def showcase(given: GradedAnswers, refused: GradedAnswers) -> list[dict[str, str]]:
    """Up to six questions that show what the cascade does, each of another domain where possible.

    `given` are its answers to held-out questions, `refused` those to unanswerable ones.
    """

    def by_p(answers: GradedAnswers, *, sure: bool, tier: str = "") -> list[Example]:
        rows = [
            (r.p_correct, i)
            for i, r in enumerate(answers.replies)
            if r.p_correct is not None and r.accepted == sure and r.tier.startswith(tier)
        ]
        return [answers.examples[i] for _, i in sorted(rows, reverse=True)]

    of_base, of_modifiers = by_p(given, sure=True, tier="base"), by_p(given, sure=True, tier="modifier")
    hopeless = by_p(refused, sure=False)[::-1]
    invented = [e for e in hopeless if "invented" in str(e.meta.get("unanswerable"))] or hopeless
    unsure = [e for e in by_p(given, sure=False, tier="base") if e.answerable]
    kinds = (
        ("the base is sure, and nothing else is asked", of_base),
        ("the base is unsure, the modifier of the domain is sure", of_modifiers),
        ("another domain, another modifier", of_modifiers),
        ("likely right, but not proved: an answer with a warning", unsure),
        ("too hard: P(correct) is low", unsure[::-1]),
        ("an invented name: there is no answer to this", invented),
    )
    chosen: list[Example] = []
    shown = []
    for why, candidates in kinds:
        new = [e for e in candidates if e not in chosen and _stands_alone(e)]
        domains = {e.domain for e in chosen}
        if found := next((e for e in new if e.domain not in domains), new[0] if new else None):
            chosen.append(found)
            shown.append({"question": found.messages[-1].content, "why": why})
    return shown


def _stands_alone(example: Example) -> bool:
    """Whether a question is short and needs no earlier turn."""
    follows = any(message.role == "assistant" for message in example.messages)
    return not follows and len(example.messages[-1].content) < LONGEST_SHOWN


def comparisons(
    of: Mapping[str, Sequence[Example]],
    base: GradedAnswers,
    cascade: GradedAnswers,
    modifiers: Mapping[str, GradedAnswers],
    controls: Mapping[str, GradedAnswers],
) -> dict[str, Any]:
    """Accuracy of each modifier and its control on the questions `of` its domain, before and after."""
    found: dict[str, Any] = {}
    for name, modifier in modifiers.items():
        before, after = base.on(of[name]), modifier.correct
        found[name] = {
            "before": _share(before),
            "after": _share(after),
            "gain": _share(after) - _share(before),
            "lost_elsewhere": lost_elsewhere(name, base, cascade),
            "n": len(after),
        }
        if name in controls:
            found[name]["control"] = _share(controls[name].correct)
    return found


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`bundle`, `data` and `control_<domain>` (GGUF adapters) -> report.md with pictures; metrics are the report."""
    folder, data = inputs["bundle"].path, inputs["data"]
    heldout = read_examples(split_path(data.path, SPLITS[-1]))[: config.rows]
    lost = data.path / "unanswerable.jsonl"
    without = read_examples(lost) if lost.exists() else []
    controls = {r.removeprefix(CONTROL): a.path / "adapter.gguf" for r, a in inputs.items() if r.startswith(CONTROL)}
    bundle = open_bundle(folder)
    models = [bundle.base] + ([bundle.draft] if bundle.draft else [])
    size = context_for(models, [*heldout, *without], config.max_tokens, config.context)
    with remembering_cascade(folder, config.slots, size) as (cascade, plain):
        tiers = cascade.tiers
        answerable = [e for e in heldout if e.answerable]
        domains = [name for name in tiers.base.adapters if any(e.domain == name for e in answerable)]
        of = {name: [e for e in answerable if e.domain == name] for name in domains}
        asked_adapters = sum(len(of[d]) * (1 + (d in controls)) for d in domains)
        whole = 2 + tiers.has_draft  # draft, base and cascade
        collector = AnswerCollector(config, context, whole * len(heldout) + 2 * len(without) + asked_adapters)
        given = collector.ask(cascade, heldout)  # first, because its answers of the base are remembered with more
        refused = collector.ask(cascade, without)
        base = collector.ask(cascade, heldout, mode=BASE_ALONE)
        answers = {"draft": collector.ask(tiers.draft, heldout)} if tiers.has_draft else {}
        answers["base"] = base
        modifiers = {name: collector.ask(tiers.base, of[name], name) for name in domains}
        if modifiers:
            answers["modifier"] = GradedAnswers(
                [e for a in modifiers.values() for e in a.examples],
                [r for a in modifiers.values() for r in a.replies],
                [c for a in modifiers.values() for c in a.correct],
            )
        answers["cascade"] = given
        controlled = _controls(collector, bundle.base, size, controls, of)
        judged, base_p = base_probabilities(base)
        simple = [e for e, r in zip(heldout, given.replies, strict=True) if base_alone(r)]
        right = zip(heldout, base.correct, strict=True)
        easy = [e for e, answered in right if is_easy(e, config.easy_up_to, answered)][: config.speculation_prompts]
        metrics = {
            "questions": len(heldout),
            "accuracy": {tier: graded.table() for tier, graded in answers.items()},
            "modifiers": comparisons(of, base, given, modifiers, controlled),
            "alone": alone_figures(
                heldout,
                base.correct,
                collector.ask(tiers.base, without).replies,
                sum(r.accepted for r in refused.replies),
            ),
            "baselines": baselines(plain, judged.examples, judged.replies, judged.correct, base_p, config.p_true),
            "conversations": conversation_figures(heldout, given.replies, given.correct),
            "speculation": speculation_figures(plain, easy, config),
            "gate": gate_figures(base, answers["cascade"], cascade.promise),
            "routes": _routes(answers["cascade"].replies),
            "unanswerable": unanswerable_figures(refused, data.metrics.get("unseen_kinds", ())),
            "bytes": inputs["bundle"].metrics["bytes"],
            "showcase": showcase(given, refused),
        }
    metrics["price"] = price(folder, bundle.base, simple[: config.priced], config.max_tokens, size)
    accuracy_picture(out / "accuracy.png", metrics["accuracy"])
    reliability_picture(out / "reliability.png", {"base": (base_p, np.array(judged.correct, dtype=np.float64))})
    p_given = [r.p_correct or 0.0 for r in given.replies]
    risk_picture(out / "risk.png", p_given, [r.accepted for r in given.replies], given.correct, metrics["gate"])
    write_text(out / "report.md", page(metrics))
    return metrics


def lost_elsewhere(name: str, base: GradedAnswers, cascade: GradedAnswers) -> float:
    """Questions of other domains answered correctly by the base only, minus those by the modifier only, as a share of
    all questions; negative if the modifier helped there too.
    """
    lost = 0
    rows = zip(base.examples, cascade.replies, base.correct, cascade.correct, strict=True)
    for example, reply, before, after in rows:
        if example.domain != name and reply.tier == f"modifier:{name}":
            lost += before - after
    return lost / len(base.examples)


def _controls(
    collector: AnswerCollector,
    base: Path,
    context: int,
    adapters: Mapping[str, Path],
    of: Mapping[str, Sequence[Example]],
) -> dict[str, GradedAnswers]:
    """Graded answers of the controls to the questions of their domains."""
    if not adapters:
        return {}
    engine = LlamaEngine(base, slots=collector.config.slots, context=context, lookup=False, adapters=adapters)
    with closing(engine):
        return {name: collector.ask(engine, of[name], name) for name in adapters if name in of}


def _share(correct: Sequence[bool]) -> float:
    return sum(correct) / max(len(correct), 1)


def _routes(answers: Sequence[Reply]) -> dict[str, float]:
    return {route: n / len(answers) for route, n in Counter(r.route for r in answers).most_common()}
