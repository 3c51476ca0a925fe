"""Dialogues with satisfaction ratings of user turns (Sun et al. 2021, User Satisfaction Simulation).

A line holds role, text, action and ratings, separated by tabs; the ratings (1 to 5) of several annotators are separated
by commas; a blank line ends a dialogue. A rating is the satisfaction of the user at this turn with the answers before.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogumi.core.errors import DataError
from cogumi.core.types import Message

DISSATISFIED = 2.75
"""A turn with a lower mean rating counts as dissatisfied."""

_ROLES = {"USER": "user", "SYSTEM": "assistant"}


@dataclass(frozen=True, slots=True)
class RatedTurn:
    """A conversation up to a user turn, the ratings of that turn, and the number of its dialogue."""

    messages: tuple[Message, ...]
    ratings: tuple[int, ...]
    dialogue: int

    @property
    def dissatisfied(self) -> bool:
        """Whether the mean rating is below `DISSATISFIED`."""
        return sum(self.ratings) < DISSATISFIED * len(self.ratings)


@dataclass(frozen=True, slots=True)
class Rated:
    """Content of rated files: rated turns after an answer, number of dialogues, number of malformed lines, and number
    of user turns left out because they have no rating or no answer before them.
    """

    turns: tuple[RatedTurn, ...]
    dialogues: int
    malformed: int
    left_out: int


def read_rated(path: Path) -> Rated:
    """Read one file, or every `.txt` file of a folder. Raises `DataError` if there is no rated turn."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    turns: list[RatedTurn] = []
    dialogues = malformed = left_out = 0
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig", errors="replace")
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}") from error
        for block in re.split(r"\n[ \t\r]*\n", text):
            lines = [line for line in block.split("\n") if line.strip()]
            found, wrong, without = _dialogue(lines, dialogues)
            turns += found
            malformed += wrong
            left_out += without
            dialogues += wrong < len(lines)
    if not turns:
        raise DataError(f"no rated turn in {path}; a line is role, text, action, ratings, separated by tabs")
    return Rated(tuple(turns), dialogues, malformed, left_out)


def _dialogue(lines: Sequence[str], number: int) -> tuple[list[RatedTurn], int, int]:
    """Rated turns of one dialogue, number of malformed lines, number of user turns left out."""
    messages: list[Message] = []
    turns: list[RatedTurn] = []
    malformed = left_out = 0
    for line in lines:
        role, text, *rest = [*line.rstrip("\r").split("\t"), ""]
        ratings = _ratings(rest[1]) if role == "USER" and len(rest) > 1 else ()
        if role not in _ROLES or not rest or ratings is None:
            malformed += 1
            continue
        if role == "USER" and text == "OVERALL":
            continue
        messages.append(Message(_ROLES[role], text))
        if role == "USER" and ratings and len(messages) > 1 and messages[-2].role == "assistant":
            turns.append(RatedTurn(tuple(messages), ratings, number))
        else:
            left_out += role == "USER"
    return turns, malformed, left_out


def _ratings(text: str) -> tuple[int, ...] | None:
    """The ratings in a field; () for an empty field, None for an invalid one."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    return tuple(map(int, parts)) if all(part in ("1", "2", "3", "4", "5") for part in parts) else None


def halves(rated: Rated, share: float, seed: int) -> tuple[list[RatedTurn], list[RatedTurn]]:
    """The turns of a `share` of the dialogues, and those of all others."""
    numbers = sorted({turn.dialogue for turn in rated.turns})
    chosen = set(random.Random(seed).sample(numbers, round(share * len(numbers))))
    one = [turn for turn in rated.turns if turn.dialogue in chosen]
    return one, [turn for turn in rated.turns if turn.dialogue not in chosen]
