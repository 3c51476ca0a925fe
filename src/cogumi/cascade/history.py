"""What a cascade knows of earlier requests: remembered turns, answers that may be given again, what was learned.

An answer does not fail because any of these does: a memory that cannot be used is a warning.
"""

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

from cogumi.cascade.disclaimers import without_note
from cogumi.cascade.memory.answer_cache import AnswerCache, Scope
from cogumi.cascade.memory.learner import Learner
from cogumi.cascade.memory.personal_offsets import PersonalRouting
from cogumi.cascade.memory.turns import Memory, Turn
from cogumi.confidence.gate import KINDS
from cogumi.core.errors import RequestError, StateError
from cogumi.core.text import last_user_message
from cogumi.core.types import Decision, Message, Reply, Request, Usage

T = TypeVar("T")
RECENT = 10_000
"""Requests kept so that a cached answer can be taken back when somebody calls it wrong."""


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """None for what is not kept. Answers of another `model` (a bundle's fingerprint) or `gate` are not given again."""

    memory: Memory | None = None
    learner: Learner | None = None
    cache: AnswerCache | None = None
    model: str = ""
    gate: str = KINDS[0]
    _recent: OrderedDict[tuple[str, str], Request] = field(default_factory=OrderedDict)
    """By user and answer's id."""

    def failed(self, user: str) -> frozenset[str]:
        """Domains in which an answer to this user was wrong."""
        memory = self.memory
        return self._recalled(lambda: memory.failed(user), frozenset()) if memory and user else frozenset()

    def habit(self, user: str) -> Mapping[str, int]:
        """How many questions of each domain this user has asked."""
        memory = self.memory
        return self._recalled(lambda: memory.habit(user), {}) if memory and user else {}

    def _recalled(self, recall: Callable[[], T], nothing: T) -> T:
        try:
            return recall()
        except (StateError, sqlite3.Error) as error:
            warnings.warn(f"the memory cannot be used: {error}", stacklevel=2)
            return nothing

    def p_correct(self, id: str, user: str, p: float, signals: Mapping[str, float]) -> tuple[float, float]:
        """What a gate says, corrected by what was learned from use: for everybody, and for this user."""
        if self.learner is None:
            return p, p
        shared = self.learner.p_correct(id, "", p, signals)
        return shared, self.learner.p_correct(id, user, p, signals) if user else shared

    def personal(self, user: str, on: bool | None = None) -> PersonalRouting:
        """Switch a user's personal routing (None: as it is), and what is known of it. Raises `RequestError`."""
        if self.learner is None:
            raise RequestError("nothing is remembered here, so nothing can be personal: open it with a state folder")
        if not user:
            raise RequestError("personal routing belongs to a user: name one")
        return self.learner.personal(user, on)

    def complained(self, request: Request) -> None:
        """The user is not satisfied with the answer before the last message: it is taken for wrong."""
        at = last_answer(request.messages)
        self._take_back(replace(request, messages=request.messages[:at]))
        memory, user = self.memory, request.user or ""
        if not memory or not user:
            return
        answer = without_note(request.messages[at].content)
        nothing: tuple[Turn, ...] = ()
        for turn in self._recalled(lambda: memory.recent(user), nothing):
            if turn.answer == answer and turn.outcome is None:
                self.rated(turn.id, user, False)
                return

    def cached(self, id: str, request: Request) -> Reply | None:
        """An accepted answer that was given before to the same question, or to one that counts as the same."""
        if self.cache is None or not _reusable(request):
            return None
        hit = self.cache.find(self._scope(request), request.messages[-1].content)
        if hit is None:
            return None
        reason = "the same question was answered before" if hit.exact else f"answered before: {hit.question!r}"
        reused = Decision("cache", "similarity", hit.similarity, 1.0, True, reason)
        self._keep_request(id, request)
        return replace(hit.reply, route="cache", usage=Usage(), decisions=(*hit.reply.decisions, reused), id=id)

    def keep(self, id: str, request: Request, reply: Reply) -> None:
        """Let an accepted answer be given again."""
        if self.cache is not None and _reusable(request) and reply.accepted:
            self.cache.keep(self._scope(request), request.messages[-1].content, reply)
            self._keep_request(id, request)

    def _keep_request(self, id: str, request: Request) -> None:
        self._recent[request.user or "", id] = request
        while len(self._recent) > RECENT:
            self._recent.popitem(last=False)

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
        return Scope(request.user or "", self.model, request.mode or "", "", before, settings)

    def remember(
        self, id: str, request: Request, reply: Reply, domain: str | None, mode: str, gate_p: float | None
    ) -> None:
        """Keep what was asked and answered; `gate_p` is P(correct) before anything learned from use."""
        memory = self.memory
        if not memory:
            return
        turn = Turn(
            id=id,
            user=request.user or "",
            session=request.session or "",
            at=time.time(),
            question=last_user_message(request.messages),
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
        asked = self._recent.pop((user, id), None)
        if asked and not right:
            self._take_back(asked)
        if self.learner:
            self.learner.rated(turn)

    def forget(self, user: str) -> int:
        """Delete the turns of a user and what was derived from them; how many there were. Raises `RequestError`."""
        if self.learner is None:
            raise RequestError("nothing is remembered here, so nothing can be forgotten: open it with a state folder")
        return self.learner.forget(user)

    def close(self) -> None:
        """Close what is kept on disk."""
        with ExitStack() as closing:
            for part in (self.memory, self.cache):
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
