"""Groups of questions with a similar meaning: k-means on sentence embeddings, named by their words (SPEC A1)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GROUPS = range(2, 9)
"""Numbers of groups that are tried; the one with the best silhouette (Rousseeuw 1987) is taken."""
_WORDS = 4
_WORD = re.compile(r"[^\W\d_]{4,}")


@dataclass(frozen=True, slots=True)
class Group:
    """A group: its share of the questions, the words that mark it, and the question next to its centre."""

    share: float
    words: tuple[str, ...]
    example: str


def question_groups(questions: Sequence[str], vectors: NDArray[np.float32]) -> list[Group]:
    """Groups of n questions with embeddings [n, width], the largest first; none for fewer than 20 questions."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    if len(questions) < 20 or len(np.unique(vectors, axis=0)) <= GROUPS[-1]:
        return []
    fits = [KMeans(k, n_init=4, random_state=0).fit(vectors) for k in GROUPS]
    best = max(fits, key=lambda fit: float(silhouette_score(vectors, fit.labels_)))
    words = [set(_WORD.findall(question.casefold())) for question in questions]
    everywhere = Counter(word for found in words for word in found)
    groups = []
    for label, centre in enumerate(best.cluster_centers_):
        members = np.flatnonzero(best.labels_ == label)
        nearest = members[np.argmin(np.linalg.norm(vectors[members] - centre, axis=1))]
        counts = Counter(word for i in members for word in words[i])
        marks = sorted(counts, key=lambda word: (-counts[word] * counts[word] / everywhere[word], word))
        groups.append(Group(len(members) / len(questions), tuple(marks[:_WORDS]), questions[nearest]))
    return sorted(groups, key=lambda group: -group.share)
