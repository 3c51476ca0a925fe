"""Graded answers of all tiers to a list of questions, for calibration and the honesty suite.

The base and, if there is one, the draft answer every question, a modifier the questions routed to its domain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cogumi.cascade.tiers import Question, Tiers
from cogumi.confidence.gate import Calibration, Gate, with_probe
from cogumi.confidence.nets import Net
from cogumi.confidence.policy import Policy, PolicyAnswers
from cogumi.confidence.signals import abstains, answer_signals, modifier_signals, same_text
from cogumi.core.types import Example, Reply, Request
from cogumi.engine.protocol import final_reply, replies
from cogumi.grading.graders import grade_all

Doubles = NDArray[np.float64]
Progress = Callable[[int, int, Mapping[str, float]], None]
T = TypeVar("T")

PER_REPORT = 20
"""Questions between two reports of the progress."""
COLUMNS = ("draft", "base", "modifier", "direct")
"""The order of `PolicyAnswers`' columns; a policy uses those of its tiers."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A tier's graded reply to one row, with its signals (those of the base without the probe's)."""

    reply: Reply
    correct: bool
    signals: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One example with the reading of the question, the base's perplexity of it (`surprise`), and the answers."""

    example: Example
    question: Question
    surprise: float
    draft: Answer | None
    base: Answer
    modifier: Answer | None

    @property
    def direct_signals(self) -> dict[str, float]:
        """Signals for the gate of a modifier that answers first, without the base."""
        assert self.modifier is not None
        return {**self.modifier.signals, **self.question.signals}

    def modifier_signals(self, base_p: float) -> dict[str, float]:
        """Signals for the gate of a modifier that answers after the base; only for rows with a modifier's answer."""
        assert self.modifier is not None
        agree = same_text(self.modifier.reply.text, self.base.reply.text)
        return modifier_signals(self.direct_signals, self.base.signals, base_p, agree)


@dataclass(frozen=True, slots=True)
class AskOptions:
    """Options of `ask`: most tokens of an answer, requests in flight, and a progress callback."""

    max_tokens: int
    window: int
    progress: Progress = lambda done, total, figures: None


class _Unmodified(NamedTuple):
    """What the tiers without modifiers say about one question."""

    question: Question
    surprise: float
    draft: Reply | None
    base: Reply
    signals: Mapping[str, float]


def _without_modifier(tiers: Tiers, request: Request) -> _Unmodified:
    """Read a question and answer it at once, while its prompt is in the base's cache."""
    question = tiers.read_question(request)
    surprise = tiers.base_perplexity(request, question)
    base = final_reply(tiers.base.generate(replace(request, hidden=True)))
    draft = final_reply(tiers.draft.generate(request)) if tiers.has_draft else None
    return _Unmodified(question, surprise, draft, base, tiers.base_signals(request, base, question))


def ask(tiers: Tiers, examples: Sequence[Example], options: AskOptions) -> list[Row]:
    """Let every tier answer, greedily and without speculation, and grade all answers."""
    requests = [Request(messages=e.messages, max_tokens=options.max_tokens, speculate=False) for e in examples]
    counter = _ProgressCounter(options.progress, len(requests))
    with ThreadPoolExecutor(options.window // 2) as pool:
        said = list(counter.counted(pool.map(partial(_without_modifier, tiers), requests)))
    routed = [tiers.modifier_of(one.question) for one in said]
    order = sorted((i for i, domain in enumerate(routed) if domain), key=lambda i: (routed[i], i))
    counter.total += len(order)
    adapted = (replace(requests[i], adapter=routed[i]) for i in order)
    modified = list(counter.counted(replies(tiers.base, adapted, options.window)))
    drafts = [(i, one.draft) for i, one in enumerate(said) if one.draft]
    answered = [*enumerate(one.base for one in said), *drafts, *zip(order, modified, strict=True)]
    correct = [v.correct for v in grade_all([(examples[i], reply.text) for i, reply in answered])]
    judged = [(i, reply, right) for (i, reply), right in zip(answered, correct, strict=True)]
    n, m = len(said), len(said) + len(drafts)
    of_base = [Answer(reply, right, said[i].signals) for i, reply, right in judged[:n]]
    of_draft = {
        i: Answer(reply, right, {**answer_signals(reply), **said[i].question.signals})
        for i, reply, right in judged[n:m]
    }
    of_modifier = {i: Answer(reply, right, answer_signals(reply)) for i, reply, right in judged[m:]}
    return [
        Row(examples[i], one.question, one.surprise, of_draft.get(i), of_base[i], of_modifier.get(i))
        for i, one in enumerate(said)
    ]


class _ProgressCounter:
    """Reports progress every `PER_REPORT` items."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def counted(self, items: Iterable[T]) -> Iterable[T]:
        for item in items:
            self.done += 1
            if self.done % PER_REPORT == 0:
                self.progress(self.done, self.total, {})
            yield item


def hidden(rows: Sequence[Row]) -> Doubles:
    """The hidden states of the base's answers [n, width]."""
    return np.array([r.base.reply.hidden for r in rows])


def base_rows(rows: Sequence[Row], probe: Net | None) -> list[Mapping[str, float]]:
    """Signals for the base's gate, including the probe's logit."""
    return [with_probe(r.base.signals, probe, r.base.reply.hidden) for r in rows]


def with_modifier(rows: Sequence[Row]) -> NDArray[np.intp]:
    """Indices of the rows with a modifier's answer."""
    return np.array([i for i, r in enumerate(rows) if r.modifier], dtype=np.intp)


def probabilities(rows: Sequence[Row], gates: Mapping[str, Gate], probe: Net | None) -> Doubles:
    """P(correct) from the gate of each column [n, 4]; NaN for a tier without a gate or an answer."""
    p = np.full((len(rows), len(COLUMNS)), np.nan)
    drafts = [r.draft for r in rows if r.draft]
    if drafts and "draft" in gates:
        p[:, 0] = gates["draft"].p_all([draft.signals for draft in drafts])
    if rows:
        p[:, 1] = gates["base"].p_all(base_rows(rows, probe))
    index = with_modifier(rows)
    if len(index) and "modifier" in gates:
        p[index, 2] = gates["modifier"].p_all([rows[i].modifier_signals(float(p[i, 1])) for i in index])
    if len(index) and "direct" in gates:
        p[index, 3] = gates["direct"].p_all([rows[i].direct_signals for i in index])
    return p


def policy_answers(
    rows: Sequence[Row], p: Doubles, policy: Policy, surprising: float, cost: Mapping[str, float]
) -> PolicyAnswers:
    """The answers of a policy's tiers to these rows; `cost` is the cost per token of `draft` and of `base`."""
    used = np.full(p.shape, np.nan)
    facts = np.zeros((*p.shape, 3))
    for i, row in enumerate(rows):
        answers = (row.draft, row.base, row.modifier, row.modifier)
        has_modifier = row.modifier is not None and not np.isnan(p[i, 2])
        for tier in policy.order(has_modifier, row.surprise > surprising):
            at = COLUMNS.index(tier)
            if (answer := answers[at]) is not None:
                used[i, at] = p[i, at]
                price = cost["draft" if tier == "draft" else "base"]
                facts[i, at] = answer.correct, not abstains(answer.reply.text), price * len(answer.reply.tokens)
    return PolicyAnswers(used, facts[..., 0] > 0, facts[..., 1] > 0, facts[..., 2])


def familiar(rows: Sequence[Row], calibration: Calibration) -> NDArray[np.bool_]:
    """Whether each question is similar to the calibration data, i.e. not novel [n]."""
    return np.array([not calibration.question.novel(r.question.perplexity) for r in rows], dtype=bool)
