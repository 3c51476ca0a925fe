"""The critic: a small net that reads a question and an answer and says how good the answer is (SPEC F14).

Per token of the answer it sees the signals of the pass that made it and a hashed embedding of its word and of the two
beside it, before the mean embedding of the question's words. One attention pooling over the tokens, whose weights name
the passage; then the chances of `none` and of the six error types of SPEC B3. numpy only; trained elsewhere.

It reads the question and the answer and nothing else of a conversation. Words of a question that training never met are
not there for it, so that a text which praises its own answer says nothing.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.confidence.calibrators import Calibrator
from cogumi.confidence.nets import softmax
from cogumi.confidence.signals import FLOOR, answer_signals
from cogumi.core.errors import BundleError
from cogumi.core.types import Reply, Token

ERRORS = ("logic", "calculation", "incomplete", "code logic", "format", "hallucination")
NONE = "none"
CLASSES = (NONE, *ERRORS)
BUCKETS = 8192
FILE = "critic.safetensors"
FORMAT = 1

SUMMARY = (
    *("mean_logprob", "min_logprob", "q10_logprob", "first_logprob", "max_entropy", "min_margin", "mean_margin"),
    *("log_length", "cut", "abstains"),
)
"""Signals of the whole answer that stand beside the pooled ones."""
FEATURES = 7
"""Numbers per token: log-probability, entropy, margin, whether the draft agreed (0: nobody asked it), whether its word
stands in the question, position, whether it is the last."""

_WORD = re.compile(r"\d|[^\W\d]+|[^\w\s]")
_NOTHING = Token(0, "", -FLOOR, FLOOR, 0.0)  # as in `answer_signals`: an answer without tokens

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What the critic sees: buckets of the question's words [m] and of the answer's tokens [n] (never empty),
    `features` [n, FEATURES] and `summary` [len(SUMMARY)].
    """

    question: Ints
    words: Ints
    features: Floats
    summary: Floats


def look(question: str, reply: Reply) -> Seen:
    """The critic's view of an answer; any texts, any signals."""
    asked = [word.casefold() for word in _WORD.findall(question)]
    tokens = reply.tokens or (_NOTHING,)
    words = _words(tokens)
    known = set(asked)
    n = len(tokens)
    rows = [
        (t.logprob, t.entropy, t.margin, 0.0 if t.draft_agreed is None else 2.0 * t.draft_agreed - 1, w in known, i / n)
        for i, (t, w) in enumerate(zip(tokens, words, strict=True))
    ]
    features = np.zeros((n, FEATURES), np.float32)
    features[:, :-1] = np.clip(np.nan_to_num(np.array(rows, np.float64)), -FLOOR, FLOOR)
    features[-1, -1] = 1.0
    signals = answer_signals(reply)
    summary = np.array([signals[name] for name in SUMMARY], np.float32)
    return Seen(_buckets(asked), _buckets(words), features, summary)


def _words(tokens: Sequence[Token]) -> list[str]:
    """For each token the word it begins in, in lower case; empty where it holds only space or nothing."""
    text = "".join(token.text for token in tokens)
    word_at: list[str] = [""] * len(text)
    for found in _WORD.finditer(text):
        word_at[found.start() : found.end()] = [found.group().casefold()] * len(found.group())
    words, at = [], 0
    for token in tokens:
        inside = word_at[at : at + len(token.text)]
        words.append(next((word for word in inside if word), ""))
        at += len(token.text)
    return words


def _buckets(words: Sequence[str]) -> Ints:
    return np.array([zlib.crc32(word.encode("utf-8", "replace")) % BUCKETS for word in words], np.int64)


@dataclass(frozen=True, slots=True)
class Opinion:
    """`p_correct` calibrated; `errors` that of each of `ERRORS` if it is wrong; `attention` per token [n]."""

    p_correct: float
    errors: dict[str, float]
    attention: NDArray[np.float64]

    @property
    def error(self) -> str:
        """The likeliest of `ERRORS`, were the answer wrong."""
        return max(self.errors, key=lambda name: self.errors[name])


@dataclass(frozen=True, slots=True, eq=False)
class CriticNet:
    """Weights by name (see `shapes`; `known` is 1 for words of the training) and the calibrator of `correct_logit`."""

    weights: dict[str, Floats]
    calibrator: Calibrator

    def logits(self, seen: Seen) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Logits of `CLASSES` and attention weights [n]."""
        w = self.weights
        embedding = w["embedding"]
        question = seen.question[w["known"][seen.question] > 0]
        asked = embedding[question].mean(axis=0) if len(question) else np.zeros_like(embedding[0])
        words = np.pad(embedding[seen.words], ((1, 1), (0, 0)))
        features = (seen.features - w["feature_mean"]) / w["feature_scale"]
        around = np.tile(asked, (len(features), 1))
        x = np.concatenate([features, words[1:-1], words[:-2], words[2:], around], axis=1)
        h = np.maximum(x @ w["token_weight"] + w["token_bias"], 0.0)
        attention = softmax(h @ w["attention"])
        summary = (seen.summary - w["summary_mean"]) / w["summary_scale"]
        u = np.maximum(np.concatenate([attention @ h, asked, summary]) @ w["hidden_weight"] + w["hidden_bias"], 0.0)
        return np.asarray(u @ w["out_weight"] + w["out_bias"], np.float64), attention

    def judge(self, seen: Seen) -> Opinion:
        """The critic's opinion of one answer."""
        logits, attention = self.logits(seen)
        errors = softmax(logits[1:])
        p = float(self.calibrator(correct_logit(logits)))
        return Opinion(p, dict(zip(ERRORS, map(float, errors), strict=True)), attention)

    def save(self, path: Path) -> None:
        """Write as safetensors, the calibrator in its metadata."""
        from safetensors.numpy import save_file

        head = {"format": FORMAT, "classes": CLASSES, "summary": SUMMARY, "calibrator": self.calibrator.to_json()}
        save_file(self.weights, path, {"critic": json.dumps(head)})  # one key: safetensors keeps no order of several


def correct_logit(logits: NDArray[Any]) -> NDArray[np.float64]:
    """The logit of `NONE` against all errors together, from logits [..., classes]."""
    errors = np.asarray(logits[..., 1:], np.float64)
    top = errors.max(axis=-1)
    return np.asarray(logits[..., 0] - top - np.log(np.exp(errors - top[..., None]).sum(axis=-1)))


def shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shape of every weight for embeddings of `width` and layers of `hidden` units."""
    summary = len(SUMMARY)
    return {
        "embedding": (BUCKETS, width),
        "known": (BUCKETS,),
        "feature_mean": (FEATURES,),
        "feature_scale": (FEATURES,),
        "summary_mean": (summary,),
        "summary_scale": (summary,),
        "token_weight": (FEATURES + 4 * width, hidden),
        "token_bias": (hidden,),
        "attention": (hidden,),
        "hidden_weight": (hidden + width + summary, hidden),
        "hidden_bias": (hidden,),
        "out_weight": (hidden, len(CLASSES)),
        "out_bias": (len(CLASSES),),
    }


def load_critic(path: Path) -> CriticNet:
    """A critic written by `CriticNet.save`. Raises `BundleError` if the file is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise BundleError(f"cannot read the critic {path}: {error}; build the bundle again") from error
    try:
        head = json.loads(metadata["critic"])
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']}")
        expected = shapes(weights["embedding"].shape[1], len(weights["attention"]))
        if {name: w.shape for name, w in weights.items()} != expected:
            raise ValueError("weights of other shapes")
        return CriticNet(weights, Calibrator.from_json(head["calibrator"]))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is not a critic of this version ({error!r}); build the bundle again") from error


def passage(tokens: Sequence[Token], attention: NDArray[np.float64]) -> str:
    """The words around the token that the critic looks at most: its neighbours with at least half of its weight."""
    if not tokens:
        return ""
    peak = int(attention.argmax())
    first = last = peak
    while first > 0 and attention[first - 1] >= attention[peak] / 2:
        first -= 1
    while last + 1 < len(tokens) and attention[last + 1] >= attention[peak] / 2:
        last += 1
    text = "".join(token.text for token in tokens)
    start = sum(len(token.text) for token in tokens[:first])
    end = start + sum(len(token.text) for token in tokens[first : last + 1])
    while (
        start > 0 and not text[start - 1].isspace() and text[start : start + 1].isalnum() and text[start - 1].isalnum()
    ):
        start -= 1
    while 0 < end < len(text) and text[end - 1].isalnum() and text[end].isalnum():
        end += 1
    return text[start:end].strip()
