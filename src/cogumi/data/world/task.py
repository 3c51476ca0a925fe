"""The record of a generated question, and word lists shared by several domains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cogumi.core.types import ABSTENTION

NAMES = (
    "Tom", "Ann", "Bob", "Eve", "Sam", "Mia", "Leo", "Ida", "Max", "Zoe", "Ben", "Amy", "Dan", "Kim", "Roy", "Sue",
)  # fmt: skip
CITIES = (
    "Paris",
    "Rome",
    "Oslo",
    "Cairo",
    "Lima",
    "Tokyo",
    "Delhi",
    "Berlin",
    "Madrid",
    "Boston",
    "Dublin",
    "Vienna",
)
OPENINGS = ("", "Tell me: ", "Quick: ", "Please say: ", "Question: ", "I wonder: ", "Think: ", "Say: ")
"""Optional prefixes of a question, so that few facts still make many different questions."""
COLORS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink")


@dataclass(frozen=True, slots=True)
class Task:
    """A question, its reference answer and its check (see `grading.graders`)."""

    question: str
    answer: str
    check: Mapping[str, Any]


def exact(question: str, answer: str) -> Task:
    """A question with an exact text as answer."""
    return Task(question, answer, {"kind": "exact"})


def no_answer(question: str) -> Task:
    """An unanswerable question: only an abstention is correct."""
    return Task(question, ABSTENTION, {"kind": "abstain"})
