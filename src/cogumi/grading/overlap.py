"""How many words two texts share: token F1 (Rajpurkar et al. 2016) and ROUGE-L (Lin 2004) (SPEC B3)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from cogumi.core.text import normalise

_WORD = re.compile(r"\w+")
_ARTICLES = {"a", "an", "the"}


def token_f1(output: str, answer: str) -> float:
    """Harmonic mean of precision and recall of words, without articles and punctuation, as SQuAD measures it."""
    one, other = ([w for w in _words(text) if w not in _ARTICLES] for text in (output, answer))
    return _f1(sum((Counter(one) & Counter(other)).values()), len(one), len(other))


def rouge_l(output: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the longest common subsequence of words."""
    one, other = _words(output), _words(answer)
    return _f1(_common_subsequence(one, other), len(one), len(other))


MEASURES: Mapping[str, Callable[[str, str], float]] = {"f1": token_f1, "rouge_l": rouge_l}
"""Kind of check -> measure of (output, answer)."""


def _words(text: str) -> list[str]:
    return _WORD.findall(normalise(text))


def _f1(common: int, one: int, other: int) -> float:
    if not one or not other:
        return float(one == other)
    return 2 * common / (one + other)


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, with one bit per word of `other` (Hyyro 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(other):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(other)) - 1
    row = full
    for word in one:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(other) - row.bit_count()
