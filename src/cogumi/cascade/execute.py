"""Executes the plan of one request (SPEC F1, F2, F4, F6, F7, F9, F11, F12, F13, F14, F15, F18, F19).

The cache answers a request that had an accepted answer before. Otherwise a model reads the question, `decide` makes a
plan, and the tiers answer in its order until a gate accepts an answer. Without an accepted answer, the plan's extra
methods follow (`deliberate`); then the answer is returned, marked as not accepted if unsure, or withheld.

Extra methods (examples, votes, critique, a second attempt for a dissatisfied user) may improve an unsure answer but
never make it accepted. So only answers that the guarantee was tested on are accepted.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Generator
from dataclasses import replace

from cogumi.cascade.attempt import Attempt, Judge
from cogumi.cascade.decide import DISSATISFIED, Plan, Situation, decide
from cogumi.cascade.deliberate import deliberate
from cogumi.cascade.disclaimers import finish
from cogumi.cascade.history import last_answer
from cogumi.cascade.self_critique import question_of
from cogumi.cascade.services import Services
from cogumi.cascade.tiers import Question
from cogumi.cascade.worker_stream import Flow, as_flow
from cogumi.confidence.policy import select_answer
from cogumi.confidence.signals import abstains
from cogumi.core.errors import ContextError
from cogumi.core.text import system_prompt
from cogumi.core.types import Decision, Message, Reply, Request, Revision, Usage
from cogumi.engine.protocol import Event

SHORT_COMPLAINT = 12
"""A complaint of at most this many words, without numbers or quotes, adds nothing to the question."""
_DETAILS = re.compile(r"[\d\"“”`]")


class RequestFlow:
    """Processes one request; `run` yields its events and returns its reply."""

    def __init__(self, services: Services, request: Request) -> None:
        self._services, self._tiers = services, services.tiers
        self._request = with_system(request, services.system)
        self._id, self._user = request.id or uuid.uuid4().hex, request.user or ""
        self._decisions: list[Decision] = []
        self._usage = Usage()
        self._streamed = ""

    def run(self) -> Flow:
        """Answer the request; store the turn in the memory, and an accepted answer in the cache."""
        services, history, request = self._services, self._services.history, self._request
        dissatisfied = yield from self._dissatisfied()
        if dissatisfied:
            request = _without_complaint(request)
        elif hit := history.cached(self._id, request):
            yield hit.decisions[-1]
            history.remember(self._id, request, hit, None, "cache", None)
            return hit
        request = self._with_similar_examples(request)
        situation = self._situation(request, dissatisfied)
        plan = decide(request, situation, services.settings, services.calibration, services.gate)
        for decision in plan.decisions:
            self._decisions.append(decision)
            yield decision
        judge = Judge(services, self._id, self._user, situation.question, plan, self._decisions)
        attempt = yield from self._answer(replace(request, speculate=plan.speculate), plan, judge)
        if attempt is None:
            return Reply("", (), "cancelled", self._usage, id=self._id)
        reply = yield from self._deliver(attempt, plan)
        gate_p = attempt.gate_p if plan.calibrated else None
        history.remember(self._id, self._request, reply, plan.domain, plan.mode, gate_p)
        history.cache_answer(self._id, self._request, reply)
        return reply

    def _dissatisfied(self) -> Generator[Decision, None, bool]:
        """Whether the last message complains about the previous answer, which is then recorded as wrong."""
        net = self._services.escalation
        unhappy = net.dissatisfied(self._request.messages) if net else 0.0
        if net is None or unhappy < net.sure:
            return False
        self._services.history.record_complaint(self._request)
        decision = Decision("cascade", "dissatisfied", unhappy, net.sure, True, DISSATISFIED)
        self._decisions.append(decision)
        yield decision
        return True

    def _with_similar_examples(self, request: Request) -> Request:
        """Add similar examples of the template bank before the request's own, if they fit into the context."""
        if not (request.examples and self._services.templates):
            return request
        filled = replace(request, examples=self._services.templates.fill_up(question_of(request), request.examples))
        try:
            self._tiers.base.check(filled)
        except ContextError:
            return request
        return filled

    def _situation(self, request: Request, dissatisfied: bool) -> Situation:
        """Collect the input of `decide`; the question is not read if the gates do not apply."""
        tiers, history, systems = self._tiers, self._services.history, self._services.systems
        gap = tiers.gap(self._services.calibration)
        question = None if gap else tiers.read_question(request)
        return Situation(
            question=question,
            gap=gap,
            routed=tiers.modifier_of(question) if question else None,
            modifiers=tiers.modifiers,
            has_draft=tiers.has_draft,
            speedup=tiers.drafting_speedup(),
            other_system=systems is not None and system_prompt(request.messages) not in systems,
            dissatisfied=dissatisfied,
            failed=history.failed(self._user),
            habit=history.habit(self._user),
        )

    def _answer(self, request: Request, plan: Plan, judge: Judge) -> Generator[Event | None, None, Attempt | None]:
        """Ask the tiers in turn, then deliberate if no answer was accepted; None if the request was cancelled."""
        order = self._order(request, plan, judge.question)
        if plan.preload and plan.domain and "modifier" in order:
            self._tiers.prefill(request, plan.domain, self._id)
        if plan.preview:
            self._streamed = (yield from self._ask("draft", request, live=True)).text
        attempts: list[Attempt] = []
        for tier in order:
            name = plan.domain if tier in ("modifier", "direct") and plan.domain else tier
            live = tier in plan.streamed
            reply = yield from self._ask(name, request, live=live)
            if reply.finish_reason == "cancelled":
                return None
            if live:
                self._streamed = reply.text
            attempts.append(judge.attempt(tier, name, request, reply, attempts))
            yield from judge.record_attempt(attempts[-1])
            if attempts[-1].check.accepted:
                break
        which, accepted = select_answer([a.check.p for a in attempts], [a.check.accepted for a in attempts])
        if accepted or plan.deliberation is None:
            return attempts[which]
        attempt, usage = yield from deliberate(judge, plan.deliberation, request, attempts[which])
        self._usage += usage
        return attempt

    def _order(self, request: Request, plan: Plan, question: Question | None) -> tuple[str, ...]:
        """The order of tiers; if it depends on the base's perplexity, the base reads the prompt first."""
        if plan.surprising_order is None or question is None:
            return plan.order
        perplexity = self._tiers.base_perplexity(request, question)
        return plan.surprising_order if perplexity > self._services.calibration.question.base_perplexity else plan.order

    def _ask(self, tier: str, request: Request, *, live: bool) -> Flow:
        """Ask one tier; its tokens are streamed only if `live`."""
        hidden = tier == "base" and self._services.wants_hidden
        reply = yield from as_flow(self._tiers.answer(replace(request, hidden=hidden), tier), live=live)
        self._usage += reply.usage
        return reply

    def _deliver(self, chosen: Attempt, plan: Plan) -> Flow:
        """Return the answer: accepted, not accepted, or withheld."""
        reply, judged, request = chosen.reply, chosen.decision(), self._request
        disclaimer = plan.disclaimer if request.note else ""
        final = finish(chosen.tier, reply.text, bool(reply.usage.drafted), judged.accepted, request.abstain, disclaimer)
        if final.reason:
            signal, value, threshold = judged.signal, judged.value, judged.threshold
            if abstains(reply.text):
                signal, value, threshold = "abstains", 1.0, 0.0
            decision = Decision(chosen.tier, signal, value, threshold, False, final.reason)
            self._decisions.append(decision)
            yield decision
        if not self._streamed and not final.withheld:
            yield from reply.tokens
            self._streamed = reply.text
        if final.text != self._streamed:
            yield Revision(final.text)
        return Reply(
            text=final.text,
            tokens=() if final.withheld else reply.tokens,
            finish_reason=reply.finish_reason,
            usage=self._usage,
            signals=chosen.signals,
            decisions=tuple(self._decisions),
            tier=chosen.tier,
            route=final.route,
            p_correct=chosen.check.p if plan.calibrated else None,
            accepted=final.accepted,
            id=self._id,
        )


def with_system(request: Request, system: str) -> Request:
    """The request with the system prompt that the bundle was calibrated with, unless it has its own."""
    if not system or any(message.role == "system" for message in request.messages):
        return request
    return replace(request, messages=(Message("system", system), *request.messages))


def _without_complaint(request: Request) -> Request:
    """The conversation up to the question, if the complaint adds nothing to it; else the whole conversation."""
    complaint = request.messages[-1].content
    if len(complaint.split()) > SHORT_COMPLAINT or _DETAILS.search(complaint):
        return request
    return replace(request, messages=request.messages[: last_answer(request.messages)])
