"""The record of a generated question, and word lists shared by several domains."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cogumi.core.types import ABSTENTION, Message

Wording = Literal["terse", "natural"]
"""How questions read: in few words, or as a person asks a pretrained model."""

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
NATURAL_OPENINGS = ("", "Quick question: ", "Please tell me: ", "I'd like to know: ")
COLORS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink")


@dataclass(frozen=True, slots=True)
class Task:
    """A question, its reference answer and its check (see `grading.graders`).

    Questions with the same `key` are about one fact, and go to the same split; empty: the question itself decides.
    `group` names the kind of fact. `before` are turns of the conversation so far, as (question, answer).
    """

    question: str
    answer: str
    check: Mapping[str, Any]
    key: str = ""
    group: str = ""
    before: tuple[tuple[str, str], ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation up to the question."""
        turns = [
            Message(role, text) for turn in self.before for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        return (*turns, Message("user", self.question))


class Maker(Protocol):
    """A generator of questions; the same state of `rng` gives the same question."""

    def __call__(self, rng: random.Random, wording: Wording = "terse") -> Task:
        """One question."""
        ...


def openings(wording: Wording) -> Sequence[str]:
    """The prefixes of a question in a wording."""
    return NATURAL_OPENINGS if wording == "natural" else OPENINGS


def exact(question: str, answer: str) -> Task:
    """A question with an exact text as answer."""
    return Task(question, answer, {"kind": "exact"})


def named(question: str, answer: str, rivals: Iterable[str], wording: Wording) -> Task:
    """A question with a name as answer: the exact text if terse, else any sentence that names it and no rival."""
    if wording == "terse":
        return exact(question, answer)
    others = [rival for rival in rivals if rival != answer]
    return Task(question, answer, {"kind": "short_answer", "answers": [answer], "rivals": others})


def no_answer(question: str, key: str = "", group: str = "") -> Task:
    """An unanswerable question: only an abstention is correct."""
    return Task(question, ABSTENTION, {"kind": "abstain"}, key, group)
