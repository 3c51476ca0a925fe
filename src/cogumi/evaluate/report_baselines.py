"""What confidence is compared with in the report, and what it costs (SPEC F2, H3, M7).

`alone`: the base without the cascade, which gives every answer as if it were sure. `baselines`: simpler scores of the
base's answers: perplexity, length, and P(True), the probability that the base itself gives to "the proposed answer is
right" (Kadavath et al. 2022). `conversations`: follow-up questions, apart. `price`: the time of an answer by the
cascade against the same file without it, where the base alone answered.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.cascade.opening import open_cascade
from cogumi.confidence.metrics import auroc, ece
from cogumi.confidence.signals import abstains, answer_signals
from cogumi.core.text import last_user_message
from cogumi.core.types import Example, Message, Reply, Request, Token
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import Engine, replies

ASKED_ITSELF = "Question: {question}\nProposed answer: {answer}\nIs the proposed answer right? Reply Yes or No."
STREAMS, ROUNDS = 8, 3
Doubles = NDArray[np.float64]


def alone_figures(
    examples: Sequence[Example], right: Sequence[bool], without: Sequence[Reply], accepted: int
) -> dict[str, Any]:
    """The base alone: accuracy by domain, and answers that claim something to unanswerable questions (`without`).

    `accepted` counts those that the cascade accepted.
    """
    domains: dict[str, list[bool]] = {}
    for example, ok in zip(examples, right, strict=True):
        if example.answerable:
            domains.setdefault(example.domain, []).append(ok)
    claims = sum(not abstains(reply.text) for reply in without)
    return {
        "accuracy": {name: sum(found) / len(found) for name, found in sorted(domains.items())},
        "unanswerable": {"n": len(without), "answered": claims, "accepted_by_cascade": accepted},
    }


def p_true(base: Engine, examples: Sequence[Example], answers: Sequence[str]) -> Doubles:
    """The base's probability of "Yes" against "No" when asked whether each answer is right [n]."""
    found = []
    for example, answer in zip(examples, answers, strict=True):
        text = ASKED_ITSELF.format(question=last_user_message(example.messages), answer=answer)
        request = Request(messages=(Message("user", text),))
        yes, no = (-base.score(request, word).nats for word in ("Yes", "No"))
        found.append(1 / (1 + np.exp(no - yes)))
    return np.array(found)


def baselines(
    base: Engine, examples: Sequence[Example], answers: Sequence[Reply], right: Sequence[bool], p: Doubles, asked: int
) -> dict[str, Any]:
    """AUROC and, for probabilities, ECE on the base's answers [n]; `p` is P(correct). P(True) on the first `asked`."""
    signals = [answer_signals(reply) for reply in answers]
    likelihood = np.exp([s["mean_logprob"] for s in signals])
    found: dict[str, Any] = {
        "p_correct": {"n": len(p), "auroc": auroc(p, right), "ece": ece(p, right)},
        "likelihood": {"n": len(p), "auroc": auroc(likelihood, right), "ece": ece(likelihood, right)},
        "length": {"n": len(p), "auroc": auroc([-s["log_length"] for s in signals], right)},
    }
    if asked:
        some = slice(0, asked)
        own = p_true(base, examples[some], [reply.text for reply in answers[some]])
        found["p_true"] = {"n": len(own), "auroc": auroc(own, right[some]), "ece": ece(own, right[some])}
    return found


def conversation_figures(
    examples: Sequence[Example], answers: Sequence[Reply], right: Sequence[bool]
) -> dict[str, Any] | None:
    """The cascade's accuracy, ECE and accepted answers on follow-ups: questions after an answer. None without any."""
    follows = [any(message.role == "assistant" for message in e.messages) for e in examples]
    rows = [(r, ok) for r, ok, after in zip(answers, right, follows, strict=True) if after]
    if not rows:
        return None
    p = np.array([r.p_correct or 0.0 for r, _ in rows])
    kept = [ok for r, ok in rows if r.accepted]
    return {
        "n": len(rows),
        "accuracy": sum(ok for _, ok in rows) / len(rows),
        "ece": ece(p, [ok for _, ok in rows]),
        "accepted": len(kept),
        "wrong": len(kept) - sum(kept),
    }


def base_alone(reply: Reply) -> bool:
    """Whether the base gave the answer and nothing else was generated, so that the cascade only reads and judges."""
    return reply.tier == "base" and reply.usage.completion_tokens == len(reply.tokens)


def price(
    bundle: Path, base: Path, examples: Sequence[Example], max_tokens: int, context: int
) -> dict[str, Any] | None:
    """Time of the cascade divided by that of its base alone, on questions with answers that are `base_alone`.

    Of the first token and of the whole answer, one at a time (median of pairs), and of all answers, `STREAMS` at a
    time (median of `ROUNDS`). None without questions.
    """
    if not examples:
        return None
    requests = [Request(messages=e.messages, max_tokens=max_tokens) for e in examples]
    plain = LlamaEngine(base, slots=STREAMS, context=context)
    with closing(plain), closing(open_cascade(bundle, slots=STREAMS, context=context)) as cascade:
        pairs = []
        for request in requests[: len(requests) // 2]:
            pairs.append([timed(engine, request) for engine in (plain, cascade)])
        rest = requests[len(requests) // 2 :]
        together = [_seconds(cascade, rest) / _seconds(plain, rest) for _ in range(ROUNDS)]
    return {
        "n": len(requests),
        "first_token": statistics.median(two[0] / one[0] for one, two in pairs),
        "answer": statistics.median(two[1] / one[1] for one, two in pairs),
        f"{STREAMS}_streams": statistics.median(together),
    }


def _seconds(engine: Engine, requests: Sequence[Request]) -> float:
    """Seconds that the answers to all requests take, `STREAMS` at a time."""
    began = time.perf_counter()
    list(replies(engine, requests, STREAMS))
    return time.perf_counter() - began


def timed(engine: Engine, request: Request) -> tuple[float, float]:
    """Seconds to the first token and to the end of an answer."""
    began, first = time.perf_counter(), 0.0
    for event in engine.generate(request):
        if isinstance(event, Token) and not first:
            first = time.perf_counter() - began
    whole = time.perf_counter() - began
    return first or whole, whole
