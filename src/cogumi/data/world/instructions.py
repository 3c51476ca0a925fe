"""Instructions about the form of a text, whose following is checked by rules (see `grading.constraints`).

1  a word so many times                       2  a sentence with a word, in small or capital letters
3  a list of so many points, with a word      4  a text of so many words that begins and ends as told
5  three or four rules at once, one of them about letters to avoid
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from cogumi.data.world.task import Maker, Task, Wording, openings

_WORDS = (
    "river", "music", "garden", "winter", "bridge", "letter", "silver", "window", "forest", "market", "harbor",
    "candle", "kitchen", "summer", "ticket", "pencil", "mountain", "orange", "tunnel", "basket", "doctor", "island",
    "pocket", "shadow",
)  # fmt: skip
_FILLERS = ("the", "old", "and", "quiet", "small", "near", "under", "a", "with", "long", "calm", "dry")
Rule = dict[str, Any]


def make(difficulty: int, rng: random.Random, wording: Wording = "terse") -> Task:
    """An instruction, and a text that follows it."""
    asked, answer, rules = (_repeat, _case, _points, _frame, _several)[difficulty - 1](rng)
    return Task(rng.choice(openings(wording)) + asked, answer, {"kind": "constraints", "rules": rules})


def _text(rng: random.Random, words: Sequence[str], number: int) -> str:
    """A text of `number` words that holds `words`."""
    filled = [*words, *rng.choices(_FILLERS, k=number - len(words))]
    rng.shuffle(filled)
    return " ".join(filled)


def _repeat(rng: random.Random) -> tuple[str, str, list[Rule]]:
    word, count = rng.choice(_WORDS), rng.randrange(2, 9)
    rules: list[Rule] = [
        {"rule": "times", "word": word, "count": count},
        {"rule": "words", "least": count, "most": count},
    ]
    return f'Write the word "{word}" exactly {count} times, and nothing else.', " ".join([word] * count), rules


def _case(rng: random.Random) -> tuple[str, str, list[Rule]]:
    word, case = rng.choice(_WORDS), rng.choice(("lower", "upper"))
    names = {"lower": "small letters only", "upper": "capital letters only"}
    least = rng.randrange(4, 8)
    text = f"{_text(rng, [word], least + 2)}."
    rules: list[Rule] = [
        {"rule": case},
        {"rule": "contains", "word": word},
        {"rule": "words", "least": least, "most": 30},
        {"rule": "sentences", "least": 1, "most": 1},
    ]
    asked = f'Write one sentence of at least {least} words with the word "{word}", in {names[case]}.'
    return asked, text.upper() if case == "upper" else text, rules


def _points(rng: random.Random) -> tuple[str, str, list[Rule]]:
    word, count = rng.choice(_WORDS), rng.randrange(2, 7)
    lines = [f"- {_text(rng, [word] if i == 0 else [], 4)}" for i in range(count)]
    rules: list[Rule] = [{"rule": "bullets", "least": count, "most": count}, {"rule": "contains", "word": word}]
    asked = f'Write a list of exactly {count} points, each on a line that begins with "-". Use the word "{word}".'
    return asked, "\n".join(lines), rules


def _frame(rng: random.Random) -> tuple[str, str, list[Rule]]:
    first, last, number = *rng.sample(_WORDS, 2), rng.randrange(5, 16)
    text = " ".join([first, *rng.choices(_FILLERS, k=number - 2), last])
    rules: list[Rule] = [
        {"rule": "words", "least": number, "most": number},
        {"rule": "begins", "text": first},
        {"rule": "ends", "text": last},
    ]
    return f'Write exactly {number} words. The first is "{first}", the last is "{last}".', text, rules


def _several(rng: random.Random) -> tuple[str, str, list[Rule]]:
    word, other = rng.sample(_WORDS, 2)
    letters = [c for c in "zqxjkvp" if c not in word]
    letter, number = rng.choice(letters), rng.randrange(6, 13)
    fillers = [filler for filler in _FILLERS if letter not in filler]
    filled = [word, *rng.choices(fillers, k=number - 1)]
    rng.shuffle(filled)
    rules: list[Rule] = [
        {"rule": "contains", "word": word},
        {"rule": "excludes", "word": other},
        {"rule": "without", "letters": letter},
        {"rule": "words", "least": number, "most": number + 4},
    ]
    asked = (
        f'Write {number} to {number + 4} words. Use the word "{word}", but not the word "{other}", and never '
        f'the letter "{letter}".'
    )
    return asked, " ".join(filled), rules


UNANSWERABLE: Mapping[str, Maker] = {}
