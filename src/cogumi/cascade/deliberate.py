"""What is tried for a hard question to which no answer was sure (SPEC F1, F13, F14, F18).

Examples that suit the question, votes of sampled answers, a critic that chooses among further answers: each may replace
the unsure answer by another one, and says why. None makes it a sure one.
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

Tried: TypeAlias = Generator[Decision | None, None, tuple[Attempt, Usage]]
"""Decisions, None while work goes on, and at the end the answer to give with what was spent."""

AGAIN = 5
"""New answers in a round of critique."""
BELOW = 7.0
"""Score under which an answer is written again."""
MAJORITY = 0.5
"""Share of the votes above which the winner takes the place of a greedy answer."""


def deliberate(judge: Judge, mode: Mode, request: Request, unsure: Attempt) -> Tried:
    """Everything that the mode allows, one after the other."""
    spent = Usage()
    votes = 0 if judge.services.critic and mode.critique else mode.votes  # whom the critic picks is right more often
    for allowed, method in ((mode.examples, _examples), (votes, _votes), (mode.critique, _critique)):
        if allowed:
            unsure, usage = yield from method(judge, allowed, request, unsure)
            spent += usage
    return unsure, spent


def _examples(judge: Judge, count: int, request: Request, unsure: Attempt) -> Tried:
    """The base once more, with up to `count` examples that suit the question; kept if that is likelier correct."""
    templates, domains = judge.services.templates, judge.question.domains if judge.question else {}
    domain = max(domains, key=lambda name: domains[name], default="")
    examples = templates.suiting(question_of(request), domain, count) if templates else ()
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
    reason = f"with {len(examples)} examples the answer is {'likelier' if better else 'no likelier'}"
    least = min(max(unsure.check.p, 0.0), 1.0)
    yield judge.record(Decision(found.tier, "p_correct", found.check.p, least, better, reason))
    return (found if better else unsure), reply.usage


def _votes(judge: Judge, count: int, request: Request, unsure: Attempt) -> Tried:
    """Sampled answers of the same tier vote; a majority takes the place of the greedy answer."""
    asked = replace(request, adapter=_adapter(unsure), seed=request.seed or 0)
    found = yield from vote(judge.services.tiers.base, asked, paths=count)
    won = found.winner is not None and found.agreement > MAJORITY
    reason = f"{found.agreement:.0%} of {count} sampled answers say the same"
    yield judge.record(Decision(f"{unsure.tier}+votes", "agreement", found.agreement, MAJORITY, won, reason))
    if found.winner is None or not won:
        return unsure, found.usage
    return replace(unsure, tier=f"{unsure.tier}+votes", reply=found.winner), found.usage


def _critique(judge: Judge, rounds: int, request: Request, unsure: Attempt) -> Tried:
    """The critic scores the answer; below `BELOW` it picks among this and `AGAIN` new ones.

    The model is not told what is wrong: a small base that never learned to read hints answers worse with them.
    """
    critic = judge.services.critic
    if critic is None:
        return unsure, Usage()
    asked = replace(request, adapter=_adapter(unsure), seed=request.seed or 0)
    base = judge.services.tiers.base
    found = yield from improve(base, asked, unsure.reply, critic, rounds=rounds, below=BELOW, answers=AGAIN, tell=False)
    first = found.critiques[0]
    named = f": {first.error} in {first.passage!r}" if first.error != NONE else ""
    reason = f"the critic gives {first.score:.1f} of 10{named}"
    yield judge.record(Decision(unsure.tier, "critique", first.score, BELOW, first.score >= BELOW, reason))
    if found.reply is unsure.reply:
        return unsure, found.usage
    return replace(unsure, tier=f"{unsure.tier}+critique", reply=found.reply), found.usage


def _adapter(attempt: Attempt) -> str | None:
    """The modifier that gave an answer; None for the base's."""
    return attempt.tier.partition(":")[2].partition("+")[0] or None
