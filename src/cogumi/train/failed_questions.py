"""The questions that a model failed, as rows to train on (SPEC C3, C6)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cogumi.core.types import Example


def with_rehearsal(failed: Sequence[Example], right: Sequence[Example], share: float, seed: int) -> list[Example]:
    """The failed questions, and a seeded sample of `right` ones as that share of all rows, or all if they are fewer.

    Rehearsal of what a model knew prevents that it forgets (Robins 1995). `share` is at least 0 and below 1.
    """
    wanted = round(len(failed) * share / (1 - share))
    return [*failed, *random.Random(seed).sample(right, min(wanted, len(right)))]


def with_usual_abstentions(failed: Sequence[Example], questions: Sequence[Example], seed: int) -> list[Example]:
    """The failed questions, with at most the share of unanswerable ones that all `questions` have.

    A base that never abstains fails every unanswerable question, but only some of the others. Trained on all of these
    failures, a modifier abstains where an answer exists.
    """
    unanswerable = [e for e in failed if not e.answerable]
    others, asked = len(failed) - len(unanswerable), sum(e.answerable for e in questions)
    most = max(round(others * (len(questions) - asked) / asked), 1) if asked and others else len(unanswerable)
    dropped = set(random.Random(seed).sample([e.id for e in unanswerable], max(len(unanswerable) - most, 0)))
    return [e for e in failed if e.id not in dropped]
