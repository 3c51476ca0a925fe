"""The models of one cascade and their roles: the draft reads questions, base and modifiers answer.

Without a draft the base has both roles (SPEC M3), as in a mobile package (SPEC D10).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from cogumi.confidence.domain_router import in_scope, route
from cogumi.confidence.gate import Calibration
from cogumi.confidence.nets import Net, sigmoid
from cogumi.confidence.signals import FLOOR, answer_signals, draft_score_signals, question_signals
from cogumi.core.errors import ContextError, RequestError
from cogumi.core.text import last_user_message
from cogumi.core.types import Reading, Reply, Request, Score
from cogumi.engine.protocol import Capability, Engine, Event, PrefillingEngine, SpeculatingEngine

UNCALIBRATED = "this model is not calibrated, so P(correct) is unknown and no answer is accepted"


@dataclass(frozen=True, slots=True)
class Question:
    """The reading of a question: signals, `perplexity` of its prompt, P(easy), and the router's `domains`."""

    signals: Mapping[str, float]
    perplexity: float
    p_easy: float
    domains: Mapping[str, float]


def router_input(reading: Reading) -> np.ndarray:
    """Input of the domain router: mean and last hidden state of the reader [2 width]."""
    return np.concatenate([np.array(reading.mean), np.array(reading.last)])


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """Nets on the hidden states of the reader; a question belongs to no domain if none is as probable as `scope`."""

    difficulty: Net
    router: Net
    scope: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Tiers:
    """`base` holds one adapter per modifier, named by its domain; `draft` is the base itself if no other model reads
    the questions. `heads` belong to `draft`; None for a model without calibration. `calibrated`: modifiers that the
    gates were fitted on (None: all of the base).
    """

    base: Engine
    draft: Engine
    heads: Heads | None
    calibrated: frozenset[str] | None = None

    @property
    def modifiers(self) -> tuple[str, ...]:
        """The base's adapters that the router may choose: those that the gates were fitted on."""
        known = self.calibrated
        return tuple(name for name in self.base.adapters if known is None or name in known)

    @property
    def has_draft(self) -> bool:
        """Whether a separate model reads questions."""
        return self.draft is not self.base

    @property
    def reader(self) -> str:
        """The tier that reads questions before they are answered."""
        return "draft" if self.has_draft else "base"

    def gap(self, calibration: Calibration) -> str:
        """Why the gates do not apply: there are none, or the engines lack what they need; empty if they apply."""
        if self.heads is None:
            return UNCALIBRATED
        reading = {Capability.SCORES, Capability.HIDDEN_STATES}
        answering = {Capability.WHOLE_DISTRIBUTIONS} | ({Capability.HIDDEN_STATES} if calibration.probe else set())
        needs = [(self.reader, self.draft, reading), ("base", self.base, answering)]
        found = [what for role, engine, wanted in needs if (what := _lacking(role, engine, wanted))]
        return f"{' and '.join(found)}, which the gates need, so no answer is accepted" if found else ""

    def missing(self, calibration: Calibration) -> tuple[str, ...]:
        """One line for each feature that a cascade of these engines lacks."""
        gap = self.gap(calibration)
        if self.heads is None:
            return (f"{gap}; calibrate it on questions of yours: cogumi adopt",)
        found = [f"{gap}, P(correct) is unknown, and modifiers answer only requests that name them"] if gap else []
        if calibration.has_modifiers and not self.modifiers:
            found.append("the base has no modifiers: only the base answers")
        if what := _lacking("base", self.base, {Capability.SPECULATION}):
            found.append(f"{what}: it generates token by token")
        if self.modifiers and (what := _lacking("base", self.base, {Capability.PREFILL})):
            found.append(f"{what}: a modifier is loaded at its first request")
        return tuple(found)

    def modifier_of(self, question: Question) -> str | None:
        """The modifier for a question; None if the base should answer."""
        scope = self.heads.scope if self.heads else 0.0
        return route(question.domains, self.modifiers) if in_scope(question.domains, scope) else None

    def read_question(self, request: Request) -> Question:
        """Let the draft read a request's messages. Raises `ContextError` if they do not fit."""
        return self.judge(request, self.draft.read(_without_examples(request)))

    def judge(self, request: Request, reading: Reading) -> Question:
        """Apply the heads to the reader's reading of a request. Raises `RequestError` without heads that fit it."""
        if self.heads is None:
            raise RequestError(UNCALIBRATED)
        difficulty = self.heads.difficulty
        if len(reading.last) != len(difficulty.mean):
            raise RequestError(
                f"the {self.reader} has hidden states of {len(reading.last)} numbers, the bundle's heads need "
                f"{len(difficulty.mean)}: open the bundle with the model that they were trained on"
            )
        p_easy = float(sigmoid(difficulty.logits(reading.last)[0]))
        domains = self.heads.router.probabilities(router_input(reading))
        text = last_user_message(request.messages)
        signals = question_signals(reading, p_easy, domains, text)
        return Question(signals, reading.score.perplexity, p_easy, domains)

    def answer(self, request: Request, tier: str) -> Iterator[Event]:
        """Start the answer of a tier: `draft`, `base`, or the name of a modifier."""
        if tier == "draft":
            return self.draft.generate(replace(request, speculate=False))
        return self.base.generate(replace(request, adapter=None if tier == "base" else tier))

    def prefill(self, request: Request, domain: str, name: str) -> None:
        """Load a domain's modifier and let it read the prompt while the base answers, if the engine supports it."""
        if Capability.PREFILL in self.base.capabilities:
            cast(PrefillingEngine, self.base).prefill(name, replace(request, adapter=domain))

    def base_perplexity(self, request: Request, question: Question) -> float:
        """The base's perplexity of a request's prompt, without generation; known already if the base is the reader."""
        return self.base.read(request).score.perplexity if self.has_draft else question.perplexity

    def base_signals(self, request: Request, reply: Reply, question: Question) -> dict[str, float]:
        """Signals of the base's answer without the probe: of the answer, the question, and the draft's score of it.

        Tokenized again as text, an answer may have more tokens than were generated. If it no longer fits the draft's
        context, it gets the worst score. Without a draft there is no score: the base's own is among its signals.
        """
        own = answer_signals(reply)
        if not self.has_draft:
            return {**own, **question.signals}
        try:
            opinion = self.draft.score(_without_examples(request), reply.text)
        except ContextError:
            opinion = Score(FLOOR, 1, len(reply.text.encode()))
        return {**own, **question.signals, **draft_score_signals(opinion, own)}

    def drafting_speedup(self) -> float:
        """Expected speed-up of the base with drafts; 0 if it cannot speculate."""
        speculates = Capability.SPECULATION in self.base.capabilities
        return cast(SpeculatingEngine, self.base).drafting_speedup if speculates else 0.0

    def close(self) -> None:
        """Free both models."""
        self.base.close()
        if self.has_draft:
            self.draft.close()


def _lacking(role: str, engine: Engine, wanted: Collection[Capability]) -> str:
    """Message about capabilities of `wanted` that an engine lacks; empty if it has all."""
    lacking = sorted(set(wanted) - engine.capabilities)
    return f"the {role} ({type(engine).__name__}) has no {' and no '.join(lacking)}" if lacking else ""


def _without_examples(request: Request) -> Request:
    """The request as the draft reads it: without few-shot examples, which only the base gets."""
    return replace(request, examples=(), adapt=None)
