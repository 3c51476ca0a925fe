"""Confidence signals of an answer and of a question, taken from forward passes that run anyway (SPEC F1, F2).

Pure functions from records to named numbers. Calibration and the cascade call the same functions, so a gate gets the
same signals at run time as in fitting. Every value is finite for any answer, including an empty one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from cogumi.core.text import abstains as text_abstains
from cogumi.core.text import normalise
from cogumi.core.types import Reading, Reply, Score

BY = "by_"
"""Prefix of the signals that say which modifier answered: the gate of all modifiers learns how often each is right."""
FLOOR = 20.0  # nats: larger surprisals carry no more information; also keeps -inf out of the gates
_EMPTY = (-FLOOR, FLOOR, 0.0)  # an answer without tokens counts as one token of maximum surprisal


def abstains(text: str) -> bool:
    """Whether a text is an abstention, in plain words; `core.text.abstains` defines it for graders too."""
    return text_abstains(text)


def same_text(one: str, other: str) -> bool:
    """Whether two answers are equal, ignoring case, spacing, quotes and the final full stop."""
    return normalise(one) == normalise(other)


def answer_signals(reply: Reply) -> dict[str, float]:
    """Signals of one generated answer; log-probabilities, entropies and margins in nats."""
    rows = [(t.logprob, t.entropy, t.margin) for t in reply.tokens] or [_EMPTY]
    logprob, entropy, margin = np.clip(np.nan_to_num(np.array(rows, dtype=np.float64)), -FLOOR, FLOOR).T
    q10, q25 = np.quantile(logprob, (0.10, 0.25))
    return {
        "mean_logprob": float(logprob.mean()),
        "min_logprob": float(logprob.min()),
        "q10_logprob": float(q10),
        "q25_logprob": float(q25),
        "first_logprob": float(logprob[0]),
        "mean_entropy": float(entropy.mean()),
        "max_entropy": float(entropy.max()),
        "min_margin": float(margin.min()),
        "mean_margin": float(margin.mean()),
        "log_length": math.log1p(len(reply.tokens)),
        "cut": float(reply.finish_reason == "length"),
        "abstains": float(abstains(reply.text)),
    }


def perplexity(signals: Mapping[str, float]) -> float:
    """Perplexity of an answer, from its `answer_signals`."""
    return math.exp(-signals["mean_logprob"])


def question_signals(reading: Reading, p_easy: float, domains: Mapping[str, float], text: str) -> dict[str, float]:
    """Signals of a question `text`: the draft's surprisal (nats), outputs of its heads, length and digits."""
    surprise = np.minimum(np.array(reading.surprise or (0.0,)), FLOOR)
    return {
        "question_nats": min(reading.score.nats / max(reading.score.tokens, 1), FLOOR),
        "question_max_nats": float(surprise.max()),
        "question_log_length": math.log1p(len(reading.surprise)),
        "question_log_digits": math.log1p(sum(c.isdigit() for c in text)),
        "p_easy": p_easy,
        **{f"domain_{name}": p for name, p in domains.items()},
    }


def draft_score_signals(score: Score, base: Mapping[str, float]) -> dict[str, float]:
    """The draft's score of the base's answer, and its difference from the base's own signals; nats per token."""
    nats = min(score.nats / max(score.tokens, 1), FLOOR)
    return {"draft_nats": nats, "draft_gap": nats + base["mean_logprob"]}


def answered_by(modifier: str) -> dict[str, float]:
    """The signal that says which modifier answered; in rows of other modifiers it is missing, which means 0."""
    return {f"{BY}{modifier}": 1.0}


def modifier_signals(
    modifier: Mapping[str, float], base: Mapping[str, float], base_p: float, agree: bool
) -> dict[str, float]:
    """Signals of a modifier's answer (including the question's) and of the base's answer before it."""
    return {
        **modifier,
        **{f"base_{name}": base[name] for name in ("mean_logprob", "min_logprob", "log_length", "abstains")},
        "base_p": base_p,
        "agrees_with_base": float(agree),
    }
