"""The critic: a small net that estimates the quality of an answer to a question (SPEC F14).

The input per answer token is the signals of its forward pass, hashed embeddings of its word and the two neighbouring
words, and the mean embedding of the question's words. Attention pooling over the tokens, whose weights locate the
faulty passage, is followed by a classifier over `none` and the six error types (SPEC B3). numpy only; trained in
`train.critic`.

The critic reads only the question and the answer of a conversation. Question words that did not occur in training are
ignored, so that a prompt cannot influence the critic by praising its own answer.
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
"""Signals of the whole answer, concatenated with the pooled token features."""
FEATURES = 7
"""Features per token: log-probability, entropy, margin, draft agreement (1, -1, or 0 without a draft), whether its word
occurs in the question, relative position, whether it is the last token."""

_WORD = re.compile(r"\d|[^\W\d]+|[^\w\s]")
_EMPTY = Token(0, "", -FLOOR, FLOOR, 0.0)  # stands for an answer without tokens, as in `answer_signals`

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class CriticInput:
    """Hash buckets of the question's words [m] and of the answer's tokens [n] (never empty), `features` [n, FEATURES]
    and `summary` [len(SUMMARY)].
    """

    question: Ints
    words: Ints
    features: Floats
    summary: Floats


def critic_input(question: str, reply: Reply) -> CriticInput:
    """Features of a question and an answer; accepts any text and any signal values."""
    question_words = [word.casefold() for word in _WORD.findall(question)]
    tokens = reply.tokens or (_EMPTY,)
    words = _words(tokens)
    known = set(question_words)
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
    return CriticInput(_buckets(question_words), _buckets(words), features, summary)


def _words(tokens: Sequence[Token]) -> list[str]:
    """For each token the first word that it overlaps, in lower case; empty for white space or an empty token."""
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
class CriticResult:
    """Calibrated `p_correct`; `errors`: P(error type | wrong) for each of `ERRORS`; `attention` per token [n]."""

    p_correct: float
    errors: dict[str, float]
    attention: NDArray[np.float64]

    @property
    def error(self) -> str:
        """The most probable error type if the answer is wrong."""
        return max(self.errors, key=lambda name: self.errors[name])


@dataclass(frozen=True, slots=True, eq=False)
class CriticNet:
    """Weights by name (see `shapes`; `known` is 1 for training words) and the calibrator of `correct_logit`."""

    weights: dict[str, Floats]
    calibrator: Calibrator

    def logits(self, inputs: CriticInput) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Logits of `CLASSES` and attention weights [n]."""
        w = self.weights
        embedding = w["embedding"]
        known = inputs.question[w["known"][inputs.question] > 0]
        question = embedding[known].mean(axis=0) if len(known) else np.zeros_like(embedding[0])
        words = np.pad(embedding[inputs.words], ((1, 1), (0, 0)))
        features = (inputs.features - w["feature_mean"]) / w["feature_scale"]
        context = np.tile(question, (len(features), 1))
        x = np.concatenate([features, words[1:-1], words[:-2], words[2:], context], axis=1)
        h = np.maximum(x @ w["token_weight"] + w["token_bias"], 0.0)
        attention = softmax(h @ w["attention"])
        summary = (inputs.summary - w["summary_mean"]) / w["summary_scale"]
        u = np.maximum(np.concatenate([attention @ h, question, summary]) @ w["hidden_weight"] + w["hidden_bias"], 0.0)
        return np.asarray(u @ w["out_weight"] + w["out_bias"], np.float64), attention

    def judge(self, features: CriticInput) -> CriticResult:
        """Evaluate one answer."""
        logits, attention = self.logits(features)
        errors = softmax(logits[1:])
        p = float(self.calibrator(correct_logit(logits)))
        return CriticResult(p, dict(zip(ERRORS, map(float, errors), strict=True)), attention)

    def save(self, path: Path) -> None:
        """Write a safetensors file with the calibrator in its metadata."""
        from safetensors.numpy import save_file

        head = {"format": FORMAT, "classes": CLASSES, "summary": SUMMARY, "calibrator": self.calibrator.to_json()}
        save_file(self.weights, path, {"critic": json.dumps(head)})  # one key: safetensors does not order several


def correct_logit(logits: NDArray[Any]) -> NDArray[np.float64]:
    """The logit of `NONE` against all error types combined, from logits [..., classes]."""
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
    """Load a critic written by `CriticNet.save`; `BundleError` if the file is not a valid critic."""
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
            raise ValueError("unexpected weight shapes")
        return CriticNet(weights, Calibrator.from_json(head["calibrator"]))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is not a critic of this version ({error!r}); build the bundle again") from error


def passage(tokens: Sequence[Token], attention: NDArray[np.float64]) -> str:
    """The words around the token of highest attention: its neighbours with at least half of that weight."""
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
