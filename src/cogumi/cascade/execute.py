"""The path of one request through the cascade (SPEC F1, F2, F4, F6, F7, F9, F11 to F15, F18, F19).

The draft reads the question -> the tiers of the mode's policy answer in turn, each judged by its gate, until one is
sure -> where none is, what the mode still allows is tried -> the answer is given, marked, or withheld.

What is tried after the gates (examples, votes, critique, another answer for a dissatisfied user) may better an unsure
answer; it never makes it a sure one. So what counts as sure is what the guarantee was tested on.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import cast

from cogumi.cascade.attempt import Attempt, Judge
from cogumi.cascade.deliberate import deliberate
from cogumi.cascade.disclaimers import AGAIN, LOW_CONFIDENCE, ending_of
from cogumi.cascade.modes import AUTO, Choice, Mode
from cogumi.cascade.self_critique import question_of
from cogumi.cascade.services import Parts, last_answer
from cogumi.cascade.tiers import Question
from cogumi.cascade.worker_stream import Flow, answered
from cogumi.confidence.domain_router import PRELOAD, preload, with_history
from cogumi.confidence.policy import settle
from cogumi.confidence.signals import abstains
from cogumi.core.errors import ContextError
from cogumi.core.types import Decision, Reply, Request, Revision, Usage
from cogumi.engine.protocol import Event

BARE = 12
"""Words up to which a complaint without figures or quotes says nothing new about the question."""
_CONTENT = re.compile(r"[\d\"“”`]")


class Path:
    """One request on its way; `run` is its flow."""

    def __init__(self, parts: Parts, request: Request) -> None:
        self._parts, self._tiers, self._asked = parts, parts.tiers, request
        self._id, self._user = request.id or uuid.uuid4().hex, request.user or ""
        self._decisions: list[Decision] = []
        self._usage = Usage()
        self._streamed = ""

    def run(self) -> Flow:
        """Answer, and let memory and cache keep what they should."""
        parts, request, gate = self._parts, self._asked, self._parts.calibration.question
        complaint = yield from self._complaint()
        if complaint:
            request = _without_complaint(request)
        elif hit := parts.cached(self._id, request):
            yield hit.decisions[-1]
            parts.remember(self._id, request, hit, None, "cache", None)
            return hit
        question = self._tiers.read_question(request)
        adapters = self._tiers.base.adapters
        domain = parts.settings.file_domain(request.files, adapters) or self._tiers.modifier_of(question)
        choice = parts.settings.choose(request.mode, domain, parts.failed(self._user))
        if request.mode in (None, AUTO):
            if choice.name != parts.settings.default:
                yield self._decide(Decision("cascade", "mode", 1.0, 1.0, True, f"mode {choice.name}: {choice.reason}"))
            if complaint:
                choice = replace(choice, mode=choice.mode.model_copy(update={"modifier": True}))
        if not self._tiers.has_draft:
            choice = replace(choice, mode=choice.mode.model_copy(update={"draft": False}))
            request = replace(request, progressive=False)
        novel = gate.novel(question.perplexity)
        if request.examples:
            request, choice = self._filled_up(request), replace(choice, mode=Mode())
            complaint = complaint or "nothing was calibrated for a request's own examples, so no answer counts as sure"
            yield self._decide(Decision("cascade", "examples", len(request.examples), 0.0, False, complaint))
        else:
            speculation = self._speculation(request, question)
            yield self._decide(speculation)
            if request.speculate is None and not speculation.accepted:
                request = replace(request, speculate=False)
        if novel:
            complaint = complaint or "the question is unlike those it was calibrated on, so no answer counts as sure"
            seen, most = question.perplexity, gate.novelty or 0.0
            yield self._decide(Decision(self._tiers.reader, "novelty", seen, most, False, complaint))
        calibrated = not novel and not request.examples
        judge = Judge(parts, self._id, self._user, question, parts.threshold(choice.mode.policy), complaint)
        attempt = yield from self._answer(request, domain, choice, judge)
        if attempt is None:
            return Reply("", (), "cancelled", self._usage)
        reply = yield from self._give(attempt, AGAIN if complaint and calibrated else LOW_CONFIDENCE)
        if not calibrated:
            reply = replace(reply, p_correct=None)
        parts.remember(self._id, self._asked, reply, domain, choice.name, attempt.gate_p if calibrated else None)
        parts.keep(self._id, self._asked, reply)
        return reply

    def _complaint(self) -> Generator[Decision, None, str]:
        """Why no answer may be taken for sure, if the last message complains about the answer before; else empty."""
        escalation = self._parts.escalation
        unhappy = escalation.dissatisfied(self._asked.messages) if escalation else 0.0
        if escalation is None or unhappy < escalation.sure:
            return ""
        self._parts.complained(self._asked)
        reason = "the answer before did not satisfy: it is answered again, and nothing counts as sure"
        yield self._decide(Decision("cascade", "dissatisfied", unhappy, escalation.sure, True, reason))
        return reason

    def _answer(
        self, request: Request, domain: str | None, choice: Choice, judge: Judge
    ) -> Generator[Event | None, None, Attempt | None]:
        """Ask the tiers in turn, deliberate where none was sure; None if somebody cancelled."""
        mode, gate, question = choice.mode, self._parts.calibration.question, judge.question
        has_modifier = domain in self._tiers.base.adapters and "modifier" in self._parts.calibration.gates
        if gate.novel(question.perplexity):
            has_modifier = False
        surprising = mode.straight and has_modifier and self._surprise(request, question) > gate.base_perplexity
        order = mode.policy.order(has_modifier, surprising)
        hard = not gate.easy(question.perplexity, question.p_easy)
        if gate.novel(question.perplexity):  # neither votes nor critic were ever tried on its like
            mode = mode.model_copy(update={"votes": 0, "critique": 0})
        deliberates = mode.deliberates and hard
        if domain and hard and "modifier" in order and self._foreseen(domain, question):
            self._tiers.read_ahead(request, domain, self._id)
        progressive = request.progressive and not (request.abstain or request.examples)
        if progressive and order[0] != "draft":
            self._streamed = (yield from self._ask("draft", request, live=True)).text
        live = order == ("base",) and not (request.abstain or deliberates or progressive)
        attempts: list[Attempt] = []
        for tier in order:
            name = domain if tier in ("modifier", "direct") and domain else tier
            shown = live or (progressive and tier == "draft")
            reply = yield from self._ask(name, request, live=shown)
            if reply.finish_reason == "cancelled":
                return None
            if shown:
                self._streamed = reply.text
            attempts.append(judge.attempt(tier, name, request, reply, attempts))
            yield self._decide(attempts[-1].decision())
            if attempts[-1].check.accepted:
                break
        which, accepted = settle([a.check.p for a in attempts], [a.check.accepted for a in attempts])
        if accepted or not deliberates:
            return attempts[which]
        tried = deliberate(judge, mode, request, attempts[which])
        with closing(tried):
            while True:
                try:
                    found = next(tried)
                except StopIteration as end:
                    attempt, usage = cast(tuple[Attempt, Usage], end.value)
                    self._usage += usage
                    return attempt
                if found:
                    self._decide(found)
                yield found

    def _surprise(self, request: Request, question: Question) -> float:
        """The base's perplexity of the prompt; if there is no draft, it has read it already."""
        return self._tiers.surprise(request) if self._tiers.has_draft else question.perplexity

    def _filled_up(self, request: Request) -> Request:
        """With near examples of the bank before the given ones, to as many as suit a domain, if they fit."""
        if not self._parts.templates:
            return request
        filled = replace(request, examples=self._parts.templates.filled_up(question_of(request), request.examples))
        try:
            self._tiers.base.check(filled)
        except ContextError:
            return request
        return filled

    def _foreseen(self, domain: str, question: Question) -> bool:
        """Whether the domain's modifier will likely be asked: it was needed before, or question and habit say so."""
        expected = with_history(question.domains, self._parts.habit(self._user))
        read = PRELOAD[-1][0]  # the draft has read the whole question: more tokens than any bar waits for
        known = preload(expected, self._tiers.base.adapters, read) == domain
        return known or domain in self._parts.failed(self._user)

    def _give(self, chosen: Attempt, note: str) -> Flow:
        """Say it: with confidence, with a note, or not at all."""
        reply, accepted = chosen.reply, chosen.check.accepted
        ending = ending_of(chosen.tier, reply.text, bool(reply.usage.drafted), accepted, self._asked.abstain, note)
        if ending.reason:
            signal = "abstains" if abstains(reply.text) else "p_correct"
            threshold = chosen.decision().threshold
            yield self._decide(Decision(chosen.tier, signal, chosen.check.p, threshold, False, ending.reason))
        if not self._streamed and not ending.withheld:
            yield from reply.tokens
            self._streamed = reply.text
        if ending.text != self._streamed:
            yield Revision(ending.text)
        return Reply(
            text=ending.text,
            tokens=() if ending.withheld else reply.tokens,
            finish_reason=reply.finish_reason,
            usage=self._usage,
            signals=chosen.signals,
            decisions=tuple(self._decisions),
            tier=chosen.tier,
            route=ending.route,
            p_correct=chosen.check.p,
        )

    def _decide(self, decision: Decision) -> Decision:
        self._decisions.append(decision)
        return decision

    def _ask(self, tier: str, request: Request, *, live: bool) -> Flow:
        """One tier's answer; its tokens pass on only if `live`."""
        hidden = tier == "base" and self._parts.calibration.probe is not None
        reply = yield from answered(self._tiers.answer(replace(request, hidden=hidden), tier), live=live)
        self._usage += reply.usage
        return reply

    def _speculation(self, request: Request, question: Question) -> Decision:
        """The question gate: whether the draft may propose tokens for the base."""
        if request.speculate is not None:
            wish = float(request.speculate)
            return Decision(self._tiers.reader, "requested", wish, 1.0, request.speculate, "the request says so")
        gate, reader, speedup = self._parts.calibration.question, self._tiers.reader, self._tiers.drafting_speedup()
        accepted, signal, value, threshold = False, "p_easy", question.p_easy, gate.p_easy
        if question.perplexity > gate.perplexity:
            signal, value, threshold = "perplexity", question.perplexity, gate.perplexity
            reason = f"hard question: the {reader} is surprised by it"
        elif question.p_easy < gate.p_easy:
            reason = "hard question"
        elif speedup <= 1.0:
            signal, value, threshold = "speedup", speedup, 1.0
            reason = "easy question, but drafting does not pay on this machine"
        else:
            accepted, reason = True, "easy question"
        if self._tiers.has_draft:
            reason += "; the draft proposes tokens, the base verifies them" if accepted else "; the base answers alone"
        return Decision(reader, signal, value, threshold, accepted, reason)


def _without_complaint(request: Request) -> Request:
    """The conversation up to the question that was answered badly, if the complaint says nothing more about it."""
    complaint = request.messages[-1].content
    if len(complaint.split()) > BARE or _CONTENT.search(complaint):
        return request
    return replace(request, messages=request.messages[: last_answer(request.messages)])
