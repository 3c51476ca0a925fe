"""A cascade's data about earlier requests: stored turns, the answer cache, and learned corrections.

A failure of the memory is a warning and does not fail an answer.
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

from cogumi.cascade.disclaimers import without_disclaimer
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
"""Recent requests, kept so that a cached answer can be invalidated by a rating."""


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """Unused parts are None. Cached answers of another `model` (a bundle's fingerprint) or `gate` are not reused."""

    memory: Memory | None = None
    learner: Learner | None = None
    cache: AnswerCache | None = None
    model: str = ""
    gate: str = KINDS[0]
    _recent: OrderedDict[tuple[str, str], Request] = field(default_factory=OrderedDict)
    """Keyed by user and id of the answer."""

    def failed(self, user: str) -> frozenset[str]:
        """Domains with a wrong answer to this user."""
        memory = self.memory
        return self._read_memory(lambda: memory.failed(user), frozenset()) if memory and user else frozenset()

    def habit(self, user: str) -> Mapping[str, int]:
        """Number of this user's questions by domain."""
        memory = self.memory
        return self._read_memory(lambda: memory.habit(user), {}) if memory and user else {}

    def _read_memory(self, read: Callable[[], T], default: T) -> T:
        try:
            return read()
        except (StateError, sqlite3.Error) as error:
            warnings.warn(f"the memory cannot be used: {error}", stacklevel=2)
            return default

    def p_correct(self, id: str, user: str, p: float, signals: Mapping[str, float]) -> tuple[float, float]:
        """A gate's P(correct) with learned corrections: (for all users, for this user)."""
        if self.learner is None:
            return p, p
        shared = self.learner.p_correct(id, "", p, signals)
        return shared, self.learner.p_correct(id, user, p, signals) if user else shared

    def personal(self, user: str, on: bool | None = None) -> PersonalRouting:
        """Switch a user's personal routing (None: no change) and return its state. Raises `RequestError`."""
        if self.learner is None:
            raise RequestError("personal routing needs a state folder; open the bundle with one")
        if not user:
            raise RequestError("personal routing needs a user; give a user id")
        return self.learner.personal(user, on)

    def record_complaint(self, request: Request) -> None:
        """Record the answer before the last message as wrong, because the user is not satisfied with it."""
        at = last_answer(request.messages)
        self._invalidate(replace(request, messages=request.messages[:at]))
        memory, user = self.memory, request.user or ""
        if not memory or not user:
            return
        answer = without_disclaimer(request.messages[at].content)
        nothing: tuple[Turn, ...] = ()
        for turn in self._read_memory(lambda: memory.recent(user), nothing):
            if turn.answer == answer and turn.outcome is None:
                self.rate(turn.id, user, False)
                return

    def cached(self, id: str, request: Request) -> Reply | None:
        """An earlier accepted answer to the same or an equivalent question."""
        if self.cache is None or not _reusable(request):
            return None
        hit = self.cache.find(self._scope(request), request.messages[-1].content)
        if hit is None:
            return None
        reason = "reused the answer to the same question" if hit.exact else f"reused the answer to {hit.question!r}"
        reused = Decision("cache", "similarity", hit.similarity, 1.0, True, reason)
        self._keep_request(id, request)
        return replace(hit.reply, route="cache", usage=Usage(), decisions=(*hit.reply.decisions, reused), id=id)

    def cache_answer(self, id: str, request: Request, reply: Reply) -> None:
        """Store an accepted answer in the cache."""
        if self.cache is not None and _reusable(request) and reply.accepted:
            self.cache.keep(self._scope(request), request.messages[-1].content, reply)
            self._keep_request(id, request)

    def _keep_request(self, id: str, request: Request) -> None:
        self._recent[request.user or "", id] = request
        while len(self._recent) > RECENT:
            self._recent.popitem(last=False)

    def _invalidate(self, request: Request) -> None:
        """Mark the cached answer to this request as wrong."""
        if self.cache is None or not _reusable(request):
            return
        hit = self.cache.find(self._scope(request), request.messages[-1].content)
        if hit:
            self.cache.judge(hit, False)

    def _scope(self, request: Request) -> Scope:
        """All values that must be equal for reuse of an answer, including the conversation so far.

        Requests without a user share their cached answers.
        """
        before = json.dumps([[m.role, m.content, *m.calls] for m in request.messages[:-1]])
        settings = json.dumps([request.max_tokens, request.stop, request.files, self.gate])
        return Scope(request.user or "", self.model, request.mode or "", "", before, settings)

    def remember(
        self, id: str, request: Request, reply: Reply, domain: str | None, mode: str, gate_p: float | None
    ) -> None:
        """Store a question and its answer; `gate_p` is P(correct) before learned corrections."""
        memory = self.memory
        if not memory:
            return
        turn = Turn(
            id=id,
            user=request.user or "",
            session=request.session or "",
            at=time.time(),
            question=last_user_message(request.messages),
            answer=without_disclaimer(reply.text),
            domain=domain or "",
            tier=reply.tier,
            route=reply.route,
            mode=mode,
            p_correct=gate_p,
            signals=reply.signals,
            outcome=None,
        )
        self._read_memory(lambda: memory.remember(turn), None)

    def rate(self, id: str, user: str, right: bool) -> None:
        """Store a user's rating of an answer. Raises `RequestError` if this user has no such answer."""
        if not self.memory:
            raise RequestError("ratings need a state folder; start with --state FOLDER")
        turn = self.memory.rate(id, user, right)
        asked = self._recent.pop((user, id), None)
        if asked and not right:
            self._invalidate(asked)
        if self.learner:
            self.learner.rated(turn)

    def forget(self, user: str) -> int:
        """Delete the turns of a user and all derived data; returns the number of turns. Raises `RequestError`."""
        if self.memory is None:
            raise RequestError("nothing is stored without a state folder; open the bundle with one")
        return self.learner.forget(user) if self.learner else self.memory.forget(user)

    def close(self) -> None:
        """Close the files."""
        with ExitStack() as closing:
            for part in (self.memory, self.cache):
                if part is not None:
                    closing.callback(part.close)


def last_answer(messages: Sequence[Message]) -> int:
    """Index of the last answer in a conversation. Raises ValueError if there is none."""
    return max(i for i, message in enumerate(messages) if message.role == "assistant")


def _reusable(request: Request) -> bool:
    """Whether the answer depends only on the conversation and the values in `_scope`."""
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
