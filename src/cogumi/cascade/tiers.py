"""The models of one cascade side by side, and what each is asked: the draft reads, base and modifiers answer.

In a mobile package (SPEC D10) one model is both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from cogumi.confidence.domain_router import in_scope, route
from cogumi.confidence.nets import Net, sigmoid
from cogumi.confidence.signals import FLOOR, answer_signals, opinion_signals, question_signals
from cogumi.core.errors import ContextError
from cogumi.core.text import last_user_message
from cogumi.core.types import Reading, Reply, Request, Score
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import Engine, Event


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
    draft's states. Questions of which no domain is as likely as `scope` belong to none.
    """

    base: Engine
    draft: Engine
    difficulty: Net
    router: Net
    scope: float = 0.0

    @property
    def has_draft(self) -> bool:
        """Whether another model than the base reads questions."""
        return self.draft is not self.base

    @property
    def reader(self) -> str:
        """The tier that reads questions before they are answered."""
        return "draft" if self.has_draft else "base"

    def modifier_of(self, question: Question) -> str | None:
        """The modifier that a question belongs to, None for the base's own business."""
        return route(question.domains, self.base.adapters) if in_scope(question.domains, self.scope) else None

    def read_question(self, request: Request) -> Question:
        """Let the draft read a request's messages. Raises `ContextError` if they do not fit."""
        return self.judge(request, self.draft.read(_alone(request)))

    def judge(self, request: Request, reading: Reading) -> Question:
        """What difficulty head and router make of the draft's reading of a request."""
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
        """Have a domain's modifier loaded and the prompt read by it while the base answers."""
        if isinstance(self.base, LlamaEngine):
            self.base.prefill(name, replace(request, adapter=domain))

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
        return {**own, **question.signals, **opinion_signals(opinion, own)}

    def drafting_speedup(self) -> float:
        """How many times faster the base is expected to answer with drafts; 0 where it cannot have any."""
        base = self.base
        return base.drafting_speedup if isinstance(base, LlamaEngine) and base.costs else 0.0

    def close(self) -> None:
        """Free both models."""
        self.base.close()
        self.draft.close()


def _alone(request: Request) -> Request:
    """What the draft reads of a request: not its examples, which are the base's business."""
    return replace(request, examples=(), adapt=None)
