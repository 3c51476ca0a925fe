"""The models of one cascade side by side, and what each is asked: the draft reads, base and modifiers answer.

In a mobile package (SPEC D10) one model is both.
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


@dataclass(frozen=True, slots=True)
class Question:
    """What the draft makes of a question. `perplexity` is that of its prompt, `domains` the router's
    probabilities.
    """

    signals: Mapping[str, float]
    perplexity: float
    p_easy: float
    domains: Mapping[str, float]


def router_input(reading: Reading) -> np.ndarray:
    """What the domain router sees: mean and last hidden state of the draft, [2 width]."""
    return np.concatenate([np.array(reading.mean), np.array(reading.last)])


@dataclass(frozen=True, slots=True, eq=False)
class Tiers:
    """`base` carries one adapter per modifier, named by its domain; `difficulty` and `router` read the
    draft's states. Questions of which no domain is as likely as `scope` belong to none. The gates were fitted on the
    modifiers `calibrated` (None: on all of the base).
    """

    base: Engine
    draft: Engine
    difficulty: Net
    router: Net
    scope: float = 0.0
    calibrated: frozenset[str] | None = None

    @property
    def modifiers(self) -> tuple[str, ...]:
        """The base's adapters that may be chosen for a question: those whose answers the gates were fitted on."""
        known = self.calibrated
        return tuple(name for name in self.base.adapters if known is None or name in known)

    @property
    def has_draft(self) -> bool:
        """Whether another model than the base reads questions."""
        return self.draft is not self.base

    @property
    def reader(self) -> str:
        """The tier that reads questions before they are answered."""
        return "draft" if self.has_draft else "base"

    def gap(self, calibration: Calibration) -> str:
        """What the engines lack that the calibrated gates need, in words; empty where the gates apply."""
        reading = {Capability.SCORES, Capability.HIDDEN_STATES}
        answering = {Capability.WHOLE_DISTRIBUTIONS} | ({Capability.HIDDEN_STATES} if calibration.probe else set())
        needs = [(self.reader, self.draft, reading), ("base", self.base, answering)]
        found = [what for role, engine, wanted in needs if (what := _lack(role, engine, wanted))]
        return f"{' and '.join(found)}, which the gates need, so no answer counts as sure" if found else ""

    def missing(self, calibration: Calibration) -> tuple[str, ...]:
        """One line for each thing that a cascade of these engines does without."""
        gap = self.gap(calibration)
        found = [f"{gap}, P(correct) is not known, and modifiers answer only requests that name them"] if gap else []
        if calibration.has_modifiers and not self.modifiers:
            found.append("the base has no modifiers: it answers alone")
        if what := _lack("base", self.base, {Capability.SPECULATION}):
            found.append(f"{what}: it generates token by token")
        if self.modifiers and (what := _lack("base", self.base, {Capability.PREFILL})):
            found.append(f"{what}: a modifier is loaded only once it is asked")
        return tuple(found)

    def modifier_of(self, question: Question) -> str | None:
        """The modifier that a question belongs to, None for the base's own business."""
        return route(question.domains, self.modifiers) if in_scope(question.domains, self.scope) else None

    def read_question(self, request: Request) -> Question:
        """Let the draft read a request's messages. Raises `ContextError` if they do not fit."""
        return self.judge(request, self.draft.read(_alone(request)))

    def judge(self, request: Request, reading: Reading) -> Question:
        """What difficulty head and router make of the draft's reading of a request."""
        if len(reading.last) != len(self.difficulty.mean):
            raise RequestError(
                f"the {self.reader} has hidden states of {len(reading.last)} numbers, the bundle's heads read "
                f"{len(self.difficulty.mean)}: open the bundle with the model that they were trained on"
            )
        p_easy = float(sigmoid(self.difficulty.logits(reading.last)[0]))
        domains = self.router.probabilities(router_input(reading))
        text = last_user_message(request.messages)
        signals = question_signals(reading, p_easy, domains, text)
        return Question(signals, reading.score.perplexity, p_easy, domains)

    def answer(self, request: Request, tier: str) -> Iterator[Event]:
        """Start the answer of a tier: `draft`, `base`, or the modifier of a domain, by its name."""
        if tier == "draft":
            return self.draft.generate(replace(request, speculate=False))
        return self.base.generate(replace(request, adapter=None if tier == "base" else tier))

    def read_ahead(self, request: Request, domain: str, name: str) -> None:
        """Have a domain's modifier loaded and the prompt read by it while the base answers, if the base can."""
        if Capability.PREFILL in self.base.capabilities:
            cast(PrefillingEngine, self.base).prefill(name, replace(request, adapter=domain))

    def surprise(self, request: Request) -> float:
        """The base's perplexity of a request's prompt, read before anything is generated."""
        return self.base.read(request).score.perplexity

    def base_signals(self, request: Request, reply: Reply, question: Question) -> dict[str, float]:
        """All signals of the base's answer but the probe's: of its own pass, the question's, the draft's opinion.

        Read again as text, an answer may have more tokens than it was written with. One that does not fit the draft's
        context any more surprises it as much as anything can.
        """
        own = answer_signals(reply)
        try:
            opinion = self.draft.score(_alone(request), reply.text)
        except ContextError:
            opinion = Score(FLOOR, 1, len(reply.text.encode()))
        return {**own, **question.signals, **draft_score_signals(opinion, own)}

    def drafting_speedup(self) -> float:
        """How many times faster the base is expected to answer with drafts; 0 where it cannot have any."""
        speculates = Capability.SPECULATION in self.base.capabilities
        return cast(SpeculatingEngine, self.base).drafting_speedup if speculates else 0.0

    def close(self) -> None:
        """Free both models."""
        self.base.close()
        self.draft.close()


def _lack(role: str, engine: Engine, wanted: Collection[Capability]) -> str:
    """What of `wanted` an engine does not have, in words; empty if it has all."""
    lacking = sorted(set(wanted) - engine.capabilities)
    return f"the {role} ({type(engine).__name__}) has no {' and no '.join(lacking)}" if lacking else ""


def _alone(request: Request) -> Request:
    """What the draft reads of a request: not its examples, which are the base's business."""
    return replace(request, examples=(), adapt=None)
