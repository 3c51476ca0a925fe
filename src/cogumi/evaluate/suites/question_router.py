"""The question router: predict from a question alone which of two models will be right (SPEC F1, F5).

The stem and the options of a question are embedded separately, because the similarity of the options says more about
difficulty than the topic. The router returns probabilities of the four outcomes, from which follow P(the weak model is
right), P(the strong model repairs it) and the expected gain (RouteLLM, Ong et al. 2024, learns the last from
preferences). The net runs in numpy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogumi.confidence.nets import Net, softmax

Doubles = NDArray[np.float64]

OUTCOMES = ("neither", "strong", "weak", "both")
"""Which of the two models are right; the classes of a question router, in the net's order."""

OPTIONS = 10
LIMIT = 20_000  # characters of a question that are used, to bound the time

# up to H, because "I." is usually a Roman numeral
_OPTION = re.compile(r"^[ \t]*\(?[A-H][.):][ \t]+(.*)$", re.MULTILINE)
_ALL_OR_NONE = re.compile(r"(?i)(?:all|none|both|neither)\b")
_STOP = re.compile(r"[.!?](?:\s|$)")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_PHRASES = {
    "negated": r"\b(?:not|never|no|none|cannot|without|except|least|incorrect|false)\b|n't\b",
    "excepted": r"\b(?:EXCEPT|NOT|LEAST)\b",
    "choice": r"(?i)\bwhich (?:one )?of (?:the|these)\b",
    "quantity": r"(?i)\b(?:how (?:many|much)|calculate|compute|find the|evaluate|value of|solve|probability|percent)\b",
    "reason": r"(?i)\b(?:why|because|explain|best describes|most likely|if|suppose|assume|given that)\b",
    "statements": r"(?i)\b(?:statement|scenario|premise|argument)\b",
    "naming": r"(?i)\b(?:who|whom|when|where|known as|called|refers to|termed|defined as|name)\b",
    "source": r"(?i)\b(?:according to|argues?|claims?|believes?|thinks?)\b",
    "blank": r"_{2,}|\.{3,}$",
    "formula": r"[=^<>\\{}|]|\$[^$]+\$",
    "operator": r"(?<=[\w)])\s?[-+*/]\s?(?=[\w(])",
    "year": r"\b1[5-9]\d\d\b|\b20\d\d\b",
    "quote": r"[\"\u201c\u201d]",
    "first_person": r"\b(?:I|my|me|we|our)\b",
}
_COMPILED = {name: re.compile(pattern) for name, pattern in _PHRASES.items()}
FEATURES = (
    "log_words",
    "log_sentences",
    "word_length",
    "long_words",
    "variety",
    "log_digits",
    "digit_share",
    "capital_share",
    "foreign_share",
    *_PHRASES,
    "options",
    "log_option_words",
    "option_spread",
    "option_likeness",
    "option_overlap",
    "numeric_options",
    "all_or_none",
)


LIKENESS = (
    "nearest_option",
    "nearest_gap",
    "nearest_lead",
    "mean_to_stem",
    "spread_to_stem",
    "mean_of_pairs",
    "closest_pair",
    "farthest_pair",
    "spread_of_pairs",
)
"""Statistics of cosines between stem and options; 0 for questions without options."""

SURFACE = len(FEATURES) + len(LIKENESS)


def parts(text: str) -> list[str]:
    """The texts to embed: the stem and, if there are two or more, the options (`A. ...`, one per line)."""
    text = text[:LIMIT]
    options = [option.strip() for option in _OPTION.findall(text)][:OPTIONS]
    return [_OPTION.sub("", text).strip().removesuffix("Answer:").strip(), *options] if len(options) > 1 else [text]


def question_features(text: str) -> Doubles:
    """Surface features of a question [len(FEATURES)], finite for every text."""
    stem, *options = parts(text)
    words = [w.casefold() for w in _WORD.findall(stem)]
    size, count = max(len(stem), 1), max(len(words), 1)
    digits = sum(c.isdigit() for c in stem)
    found = [
        math.log1p(len(words)),
        math.log1p(len(_STOP.findall(stem))),
        sum(map(len, words)) / count,
        sum(len(w) > 9 for w in words) / count,
        len(set(words)) / count,
        math.log1p(digits),
        digits / size,
        sum(c.isupper() for c in stem) / size,
        sum(ord(c) > 127 for c in stem) / size,
        *(math.log1p(len(pattern.findall(stem))) for pattern in _COMPILED.values()),
    ]
    return np.array(found + _option_features(options, set(words)))


def _option_features(options: Sequence[str], stem: set[str]) -> list[float]:
    if not options:
        return [0.0] * 7
    bags = [{w.casefold() for w in _WORD.findall(option)} for option in options]
    lengths = np.array([math.log1p(len(option.split())) for option in options])
    pairs = [len(a & b) / max(len(a | b), 1) for a, b in combinations(bags, 2)]
    return [
        math.log1p(len(options)),
        float(lengths.mean()),
        float(lengths.std()),
        float(np.mean(pairs)),
        float(np.mean([len(bag & stem) / max(len(bag), 1) for bag in bags])),
        float(np.mean([any(c.isdigit() for c in option) for option in options])),
        float(any(_ALL_OR_NONE.match(option) for option in options)),
    ]


def likeness(vectors: ArrayLike) -> Doubles:
    """Statistics [len(LIKENESS)] of cosines between the normalized vectors [parts, width], stem first."""
    stem, options = np.split(np.asarray(vectors, dtype=np.float64), [1])
    if len(options) < 2:
        return np.zeros(len(LIKENESS))
    cosines = np.sort(options @ stem[0])[::-1]
    pairs = (options @ options.T)[np.triu_indices(len(options), 1)]
    to_stem = [cosines[0], cosines[0] - cosines[1], cosines[0] - cosines.mean(), cosines.mean(), cosines.std()]
    return np.array([*to_stem, pairs.mean(), pairs.max(), pairs.min(), pairs.std()])


def question_input(text: str, vectors: ArrayLike) -> Doubles:
    """Input of a question router [SURFACE + 2 width]: features, cosines, the stem's vector, the options' mean vector.

    `vectors` [parts, width] are the embeddings of `parts(text)`.
    """
    stem, options = np.split(np.asarray(vectors, dtype=np.float64), [1])
    mean = options.mean(axis=0) if len(options) else np.zeros(stem.shape[1])
    return np.concatenate([question_features(text), likeness(vectors), stem[0], mean])


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """Probabilities [n, len(OUTCOMES)] of a question router for n questions."""

    outcomes: Doubles

    def _of(self, outcome: str) -> Doubles:
        return np.asarray(self.outcomes[:, OUTCOMES.index(outcome)])

    @property
    def weak_right(self) -> Doubles:
        """P(the weak model is right) [n]."""
        return self._of("weak") + self._of("both")

    @property
    def repaired(self) -> Doubles:
        """P(the weak model is wrong and the strong one is right) [n]."""
        return self._of("strong")

    @property
    def gain(self) -> Doubles:
        """Expected change of correct answers if the strong model replaces the weak one [n]: repaired minus lost."""
        return self._of("strong") - self._of("weak")


def forecast(router: Net, x: ArrayLike) -> Forecast:
    """The router's forecast for rows [n, in] of `question_input`."""
    return Forecast(np.atleast_2d(softmax(router.logits(x))))
