"""What a cascade is made of: its models and calibration, and what may be there besides."""

from __future__ import annotations

import json
import sqlite3
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TypeVar

from cogumi.bundle.unpack import Files
from cogumi.cascade.disclaimers import without_note
from cogumi.cascade.dissatisfaction import Escalation
from cogumi.cascade.memory.answer_cache import AnswerCache, Scope
from cogumi.cascade.memory.learner import Learner
from cogumi.cascade.memory.turns import Memory, Turn
from cogumi.cascade.modes import Settings
from cogumi.cascade.self_critique import Critic
from cogumi.cascade.template_bank import Templates
from cogumi.cascade.tiers import Tiers
from cogumi.confidence.gate import KINDS, Calibration
from cogumi.confidence.policy import Policy
from cogumi.core.errors import RequestError, StateError
from cogumi.core.text import last_user_message
from cogumi.core.types import Decision, Message, Reply, Request, Usage

T = TypeVar("T")
NOTED = 10_000
"""Requests of which it is known what to take back."""


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """`gate` is one of `confidence.gate.KINDS`; None for a part that is not there."""

    tiers: Tiers
    calibration: Calibration
    settings: Settings = field(default_factory=Settings)
    gate: str = KINDS[0]
    memory: Memory | None = None
    learner: Learner | None = None
    escalation: Escalation | None = None
    cache: AnswerCache | None = None
    critic: Critic | None = None
    templates: Templates | None = None
    name: str = ""
    files: Files | None = None
    _asked: OrderedDict[tuple[str, str], Request] = field(default_factory=OrderedDict)
    """By user and answer's id, the latest requests whose answers may be given again."""

    def threshold(self, policy: Policy) -> float:
        """What the gate compares an answer with (see `confidence.gate.check`)."""
        return (
            self.calibration.perplexity if self.gate == "perplexity" else self.calibration.threshold(self.gate, policy)
        )

    def failed(self, user: str) -> frozenset[str]:
        """Domains in which an answer to this user was wrong."""
        memory = self.memory
        return self._recalled(lambda: memory.failed(user), frozenset()) if memory and user else frozenset()

    def habit(self, user: str) -> Mapping[str, int]:
        """How many questions of each domain this user has asked."""
        memory = self.memory
        return self._recalled(lambda: memory.habit(user), {}) if memory and user else {}

    def _recalled(self, recall: Callable[[], T], nothing: T) -> T:
        """What memory holds; an answer does not fail because memory does."""
        try:
            return recall()
        except (StateError, sqlite3.Error) as error:
            warnings.warn(f"the memory cannot be used: {error}", stacklevel=2)
            return nothing

    def p_correct(self, id: str, user: str, p: float, signals: Mapping[str, float]) -> float:
        """What the gate says, corrected by what was learned from use."""
        return self.learner.p_correct(id, user, p, signals) if self.learner else p

    def complained(self, request: Request) -> None:
        """The user is not satisfied with the answer before the last message: it is taken for wrong."""
        self._take_back(replace(request, messages=request.messages[: last_answer(request.messages)]))
        memory, user = self.memory, request.user or ""
        if not memory or not user:
            return
        answer = without_note(request.messages[last_answer(request.messages)].content)
        nothing: tuple[Turn, ...] = ()
        for turn in self._recalled(lambda: memory.recent(user), nothing):
            if turn.answer == answer and turn.outcome is None:
                self.rated(turn.id, user, False)
                return

    def cached(self, id: str, request: Request) -> Reply | None:
        """A sure answer that was given before to the same question, or to one that counts as the same."""
        if self.cache is None or not _reusable(request):
            return None
        hit = self.cache.find(self._scope(request), request.messages[-1].content)
        if hit is None:
            return None
        reason = "the same question was answered before" if hit.exact else f"answered before: {hit.question!r}"
        told = Decision("cache", "similarity", hit.similarity, 1.0, True, reason)
        self._note(id, request)
        return replace(hit.reply, route="cache", usage=Usage(), decisions=(*hit.reply.decisions, told))

    def keep(self, id: str, request: Request, reply: Reply) -> None:
        """Let a sure answer be given again."""
        if self.cache is not None and _reusable(request) and reply.decisions[-1].accepted:
            self.cache.keep(self._scope(request), request.messages[-1].content, reply)
            self._note(id, request)

    def _note(self, id: str, request: Request) -> None:
        """Know what was asked, should the answer be called wrong."""
        self._asked[request.user or "", id] = request
        while len(self._asked) > NOTED:
            self._asked.popitem(last=False)

    def _take_back(self, request: Request) -> None:
        """Whatever would be given again for this request was wrong."""
        if self.cache is None or not _reusable(request):
            return
        hit = self.cache.find(self._scope(request), request.messages[-1].content)
        if hit:
            self.cache.judge(hit, False)

    def _scope(self, request: Request) -> Scope:
        """All that must be equal for an answer to be given again, the conversation so far included.

        Requests without a user share what they get.
        """
        before = json.dumps([[m.role, m.content] for m in request.messages[:-1]])
        settings = json.dumps([request.max_tokens, request.stop, request.files, self.gate])
        return Scope(request.user or "", self.name, request.mode or "", "", before, settings)

    def remember(
        self, id: str, request: Request, reply: Reply, domain: str | None, mode: str, gate_p: float | None
    ) -> None:
        """Keep what was asked and answered; `gate_p` is P(correct) before anything learned from use."""
        memory = self.memory
        if not memory:
            return
        question = last_user_message(request.messages)
        turn = Turn(
            id=id,
            user=request.user or "",
            session=request.session or "",
            at=time.time(),
            question=question,
            answer=without_note(reply.text),
            domain=domain or "",
            tier=reply.tier,
            route=reply.route,
            mode=mode,
            p_correct=gate_p,
            signals=reply.signals,
            outcome=None,
        )
        self._recalled(lambda: memory.remember(turn), None)

    def rated(self, id: str, user: str, right: bool) -> None:
        """A user says whether an answer was right. Raises `RequestError` if this user has no such answer."""
        if not self.memory:
            raise RequestError("nothing is remembered here, so nothing can be rated: serve with --state FOLDER")
        turn = self.memory.rate(id, user, right)
        asked = self._asked.pop((user, id), None)
        if asked and not right:
            self._take_back(asked)
        if self.learner:
            self.learner.rated(turn)

    def close(self) -> None:
        """Free the models, close what is kept on disk."""
        with ExitStack() as closing:
            for part in (self.files, self.tiers, self.memory, self.cache):  # the last first
                if part is not None:
                    closing.callback(part.close)


def last_answer(messages: Sequence[Message]) -> int:
    """Where the last answer of a conversation stands. Raises ValueError if there is none."""
    return max(i for i, message in enumerate(messages) if message.role == "assistant")


def _reusable(request: Request) -> bool:
    """Whether an answer depends on nothing but the conversation and what `_scope` names."""
    plain = Request(
        messages=request.messages,
        max_tokens=request.max_tokens,
        stop=request.stop,
        mode=request.mode,
        user=request.user,
        session=request.session,
        id=request.id,
        files=request.files,
        seed=request.seed,
        speculate=request.speculate,
    )
    return request == plain and bool(request.messages)
