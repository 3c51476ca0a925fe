"""Extra methods for a hard question without an accepted answer (SPEC F1, F13, F14, F18).

Few-shot examples, votes among sampled answers, and a critic that chooses among new answers: each may replace the unsure
answer and records the reason. None makes the answer accepted.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import TypeAlias

from cogumi.cascade.attempt import Attempt, Judge
from cogumi.cascade.modes import Mode
from cogumi.cascade.self_consistency import gather, vote
from cogumi.cascade.self_critique import improve, question_of
from cogumi.confidence.critic_net import NONE
from cogumi.core.errors import ContextError
from cogumi.core.types import Decision, Request, Usage

Deliberation: TypeAlias = Generator[Decision | None, None, tuple[Attempt, Usage]]
"""Yields decisions, and None while waiting; returns the answer to give, and the usage."""

NEW_ANSWERS = 5
"""New answers per round of critique."""
MIN_SCORE = 7.0
"""Score below which new answers are sampled."""
MAJORITY = 0.5
"""Share of votes above which the winner replaces the greedy answer."""


def deliberate(judge: Judge, mode: Mode, request: Request, unsure: Attempt) -> Deliberation:
    """Apply every method of the mode in turn."""
    spent = Usage()
    votes = 0 if judge.services.critic and mode.critique else mode.votes  # the critic's choice is more often right
    for allowed, method in ((mode.examples, _examples), (votes, _votes), (mode.critique, _critique)):
        if allowed:
            unsure, usage = yield from method(judge, allowed, request, unsure)
            spent += usage
    return unsure, spent


def _examples(judge: Judge, count: int, request: Request, unsure: Attempt) -> Deliberation:
    """Ask the base again with up to `count` suitable examples; keep the answer with the higher P(correct)."""
    templates, domains = judge.services.templates, judge.question.domains if judge.question else {}
    domain = max(domains, key=lambda name: domains[name], default="")
    examples = templates.select(question_of(request), domain, count) if templates else ()
    if not examples:
        return unsure, Usage()
    hidden = judge.services.wants_hidden
    shown = replace(request, examples=examples, adapter=None, hidden=hidden, speculate=False)
    try:
        reply = (yield from gather(judge.services.tiers.base, [shown]))[0]
    except ContextError:
        return unsure, Usage()
    found = judge.base(shown, reply)
    if found.personal:
        yield judge.record(found.personal)
    better = found.check.p > unsure.check.p
    reason = f"with {len(examples)} examples, P(correct) is {'higher' if better else 'not higher'}"
    least = min(max(unsure.check.p, 0.0), 1.0)
    yield judge.record(Decision(found.tier, "p_correct", found.check.p, least, better, reason))
    return (found if better else unsure), reply.usage


def _votes(judge: Judge, count: int, request: Request, unsure: Attempt) -> Deliberation:
    """Vote among sampled answers of the same tier; the majority's answer replaces the greedy one."""
    asked = replace(request, adapter=_adapter(unsure), seed=request.seed or 0)
    found = yield from vote(judge.services.tiers.base, asked, paths=count)
    won = found.winner is not None and found.agreement > MAJORITY
    reason = f"{found.agreement:.0%} of {count} sampled answers agree"
    yield judge.record(Decision(f"{unsure.tier}+votes", "agreement", found.agreement, MAJORITY, won, reason))
    if found.winner is None or not won:
        return unsure, found.usage
    return replace(unsure, tier=f"{unsure.tier}+votes", reply=found.winner), found.usage


def _critique(judge: Judge, rounds: int, request: Request, unsure: Attempt) -> Deliberation:
    """Let the critic score the answer; below `MIN_SCORE`, keep the best of it and `NEW_ANSWERS` new ones.

    The model gets no hint about the error: a small base that was not trained on hints answers worse with them.
    """
    critic = judge.services.critic
    if critic is None:
        return unsure, Usage()
    asked = replace(request, adapter=_adapter(unsure), seed=request.seed or 0)
    base = judge.services.tiers.base
    found = yield from improve(
        base, asked, unsure.reply, critic, rounds=rounds, below=MIN_SCORE, answers=NEW_ANSWERS, hint=False
    )
    first = found.critiques[0]
    named = f": {first.error} in {first.passage!r}" if first.error != NONE else ""
    reason = f"the critic gives {first.score:.1f} of 10{named}"
    yield judge.record(Decision(unsure.tier, "critique", first.score, MIN_SCORE, first.score >= MIN_SCORE, reason))
    if found.reply is unsure.reply:
        return unsure, found.usage
    return replace(unsure, tier=f"{unsure.tier}+critique", reply=found.reply), found.usage


def _adapter(attempt: Attempt) -> str | None:
    """The modifier that gave an answer; None for the base."""
    return attempt.tier.partition(":")[2].partition("+")[0] or None
