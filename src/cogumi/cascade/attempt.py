"""The answer of one tier, with the judgement of its gate (SPEC F2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cogumi.cascade.decide import Plan
from cogumi.cascade.services import Services
from cogumi.cascade.tiers import Question
from cogumi.confidence.gate import Check, check, with_probe
from cogumi.confidence.signals import abstains, answer_signals, answered_by, modifier_signals, same_text
from cogumi.core.types import Decision, Reply, Request

UNCALIBRATED = Check(p=0.0, signal="calibrated", value=0.0, threshold=1.0, accepted=False)
"""Result of the check if the gates do not apply to the engines."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """`tier` is draft, base or modifier:<domain>, with a suffix for an extra method (`base+votes`).

    `gate_p` is the gate's own P(correct), before any correction learned from ratings; `check` is the judgement. `doubt`
    is the reason why the answer cannot be accepted whatever the gate's result, else empty. `personal` is set if the
    user's ratings changed P(correct).
    """

    tier: str
    reply: Reply
    signals: Mapping[str, float]
    gate_p: float
    check: Check
    doubt: str = ""
    personal: Decision | None = None

    def decision(self) -> Decision:
        """The judgement with its reason."""
        gate_check = self.check
        if self.doubt:
            reason = self.doubt
        elif math.isinf(gate_check.threshold):
            reason = f"no threshold is certified for answers of {self.tier}, so none is accepted"
        elif gate_check.accepted and abstains(self.reply.text):
            found = f"{gate_check.signal} {gate_check.value:.2f}, threshold {gate_check.threshold:.2f}"
            reason = f"accepted abstention ({found})"
        else:
            relation = "meets" if gate_check.accepted else "misses"
            reason = f"{gate_check.signal} {gate_check.value:.2f} {relation} the threshold {gate_check.threshold:.2f}"
        threshold = min(gate_check.threshold, 1.0) if gate_check.signal == "p_correct" else gate_check.threshold
        return Decision(self.tier, gate_check.signal, gate_check.value, threshold, gate_check.accepted, reason)


@dataclass(frozen=True, slots=True)
class Judge:
    """Judges the answers to one question under a plan; `decisions` collects the decisions for the reply."""

    services: Services
    id: str
    user: str
    question: Question | None
    plan: Plan
    decisions: list[Decision]

    def record(self, decision: Decision) -> Decision:
        """Append a decision to the reply's decisions and return it."""
        self.decisions.append(decision)
        return decision

    def record_attempt(self, attempt: Attempt) -> Iterator[Decision]:
        """Record and yield the decisions about an attempt."""
        for decision in (attempt.personal, attempt.decision()):
            if decision:
                yield self.record(decision)

    def attempt(self, tier: str, name: str, request: Request, reply: Reply, earlier: Sequence[Attempt]) -> Attempt:
        """Judge the answer of a policy's tier (see `Policy`); `name`: modifier's name, `earlier`: previous attempts."""
        if tier == "base":
            return self.base(request, reply)
        assert self.question is not None  # otherwise only the base is asked
        own = {**answer_signals(reply), **self.question.signals}
        if tier == "draft":
            return self._judged("draft", "draft", reply, own)
        own |= answered_by(name)
        if tier == "direct":
            return self._judged("direct", f"modifier:{name}", reply, own)
        base = earlier[-1]
        agree = same_text(reply.text, base.reply.text)
        signals = modifier_signals(own, base.signals, base.gate_p, agree)
        return self._judged("modifier", f"modifier:{name}", reply, signals)

    def base(self, request: Request, reply: Reply) -> Attempt:
        """Judge the base's answer to `request`."""
        tier = "base+examples" if request.examples else "base"
        if self.question is None:
            return Attempt(tier, reply, answer_signals(reply), 0.0, UNCALIBRATED, self.plan.doubt)
        signals = self.services.tiers.base_signals(request, reply, self.question)
        probe = self.services.calibration.probe if reply.hidden else None
        return self._judged("base", tier, reply, with_probe(signals, probe, reply.hidden))

    def _judged(self, gate: str, tier: str, reply: Reply, signals: Mapping[str, float]) -> Attempt:
        doubt = self.plan.doubt
        own = self.services.calibration.gates[gate].p_correct(signals)
        shared, p = self.services.history.p_correct(self.id, self.user, own, signals)
        found = check(self.services.gate, p, signals, self.plan.thresholds[gate])
        found = replace(found, accepted=found.accepted and not doubt)
        personal = _personal(tier, shared, p) if self.plan.calibrated and p != shared else None
        return Attempt(tier, reply, signals, own, found, doubt, personal)


def _personal(tier: str, shared: float, p: float) -> Decision:
    """The decision that P(correct) is `p` for this user and `shared` for other users."""
    reason = f"personal routing: this user's ratings move P(correct) from {shared:.2f} to {p:.2f}"
    return Decision(tier, "personal", p, shared, True, reason)
