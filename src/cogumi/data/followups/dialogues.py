"""Short dialogues with a satisfied or dissatisfied follow-up, made from templates (SPEC F7).

The templates are lines of `contented.txt` and `dissatisfied.txt` under a heading `[kind]`. `{a|b}` is a choice, `$name`
a value that is fixed within one dialogue, `<slot>` a word of that kind or a text of the dialogue's topic.

The sets `train`, `selection` and `heldout` share no topic and no template: a hash of the template selects its set (a
bare slot belongs to every set), two kinds occur only in `heldout`, and a follow-up that a training template could also
produce is drawn again. Both labels use the same registers: lower case, no punctuation, capitals, typos.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from typing import Literal

from cogumi.core.types import Message
from cogumi.data.followups import topics
from cogumi.data.followups.topics import VALUES, Topic

Set = Literal["train", "selection", "heldout"]

FAILURES: dict[Set, tuple[str, ...]] = {
    "train": (
        "I'm sorry, I could not find <subject>.",
        "Sorry, there is nothing available.",
        "Unfortunately I cannot help with that. {Is there anything else?|Would you like to try something else?}",
        "I don't know.",
        "I am afraid that did not work. What else can I do?",
    ),
    "selection": ("Sorry, no results.", "I'm afraid I can't do that."),
    "heldout": ("My apologies, {that failed|nothing came up}.", "There are no matches, unfortunately. Anything else?"),
}
"""Answers that fail to answer the question."""

WORDS: dict[str, tuple[str, ...]] = {
    kind: tuple(words.split())
    for kind, words in {
        "bad": """
            awful bad terrible horrible useless wrong stupid ridiculous silly absurd poor weak pathetic annoying
            confusing misleading misguided unhelpful inaccurate incorrect incomplete sloppy lazy lousy dreadful
            unacceptable dumb rude worthless disappointing insufficient vague boring questionable nonsensical
            laughable frustrating false flawed
        """,
        "good": """
            good great excellent perfect helpful useful right correct clear nice wonderful amazing brilliant
            awesome lovely interesting clever smart impressive fine beautiful outstanding precise accurate
            complete convincing pleasant terrific thorough friendly quick satisfying superb fantastic
            informative valuable true
        """,
        "upset": """
            angry annoyed upset disappointed frustrated unhappy confused irritated dissatisfied mad furious
            displeased fed-up lost discouraged unsatisfied bothered
        """,
        "glad": """
            happy glad pleased satisfied delighted content impressed thrilled grateful thankful excited relieved
            convinced amazed
        """,
        "reply": """
            answer reply response result solution explanation suggestion text list summary translation code
            example recommendation advice information
        """,
    }.items()
}

TOPICS: dict[Set, tuple[Topic, ...]] = {
    "train": topics.listed("train"),
    "selection": topics.listed("selection"),
    "heldout": topics.listed("heldout"),
}
UNSEEN = ("amazement", "small_talk")
"""Kinds that occur only in the held-out set."""

_MAY_FOLLOW_A_FAILURE = ("thanks", "decline", "new")


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A question, its answer and a follow-up, made from `template`, of a `kind`."""

    messages: tuple[Message, ...]
    dissatisfied: bool
    kind: str
    template: str


@cache
def templates(name: Set, dissatisfied: bool) -> dict[str, tuple[str, ...]]:
    """The templates of each kind in a set."""
    text = files(__package__).joinpath("dissatisfied.txt" if dissatisfied else "contented.txt").read_text("utf-8")
    found: dict[str, list[str]] = {}
    kind = ""
    for line in filter(None, text.splitlines()):
        if line.startswith("["):
            kind = line.strip("[]")
        elif _belongs(line, kind) in (name, None):
            found.setdefault(kind, []).append(line)
    return {kind: tuple(lines) for kind, lines in found.items()}


def _belongs(line: str, kind: str) -> Set | None:
    """The set of a template; None for a bare slot, which belongs to every set."""
    if re.fullmatch(r"<\w+>", line):
        return None
    roll = int(hashlib.sha256(line.encode()).hexdigest(), 16) % 100
    if kind in UNSEEN or roll < 20:
        return "heldout"
    return "selection" if roll < 28 else "train"


@cache
def _trained() -> re.Pattern[str]:
    """Pattern of all `_bare` texts that training templates can produce."""
    lines = [line for bad in (False, True) for found in templates("train", bad).values() for line in found]
    lines += [line for topic in TOPICS["train"] for line in (*topic.questions, *topic.nexts)]
    return re.compile(
        "|".join(_pattern(line) for line in lines if not re.search("<(question|next|new)>|^<\\w+>$", line))
    )


def _pattern(line: str) -> str:
    pattern = ""
    for part in re.split(r"(\{[^{}]*\}|<\w+>|\$\w+)", line):
        choices = VALUES.get(part[1:]) if part.startswith("$") else WORDS.get(part.strip("<>")) if "<" in part else None
        if part.startswith("{"):
            pattern += "(?:" + "|".join(map(_pattern, part[1:-1].split("|"))) + ")"
        elif choices:
            pattern += "(?:" + "|".join(map(_bare, choices)) + ")"
        else:
            pattern += "\\w+" if part.startswith("<") else _bare(part)
    return pattern


def _bare(text: str) -> str:
    """Text in lower case without white space and punctuation."""
    return re.sub(r"[\s!-/:-@\[-`{-~]", "", text.lower())


def draw(name: Set, rows: int, seed: int, *, registers: bool = True) -> list[Dialogue]:
    """`rows` dialogues of a set; deterministic for a seed.

    Pairs of dialogues share question and answer, and one of them is dissatisfied: only the follow-up differs. With
    `registers` the user's texts are written in random registers, else only in standard spelling.
    """
    rng = random.Random(f"{seed}/{name}")
    lines = {bad: templates(name, bad) for bad in (False, True)}
    dialogues: list[Dialogue] = []
    while len(dialogues) < rows:
        dialogues += _pair(rng, name, lines, registers)
    return dialogues[:rows]


def _pair(
    rng: random.Random, name: Set, lines: Mapping[bool, Mapping[str, tuple[str, ...]]], registers: bool
) -> list[Dialogue]:
    topic, another = rng.sample(TOPICS[name], 2)
    if name == "train" and rng.random() < 0.5:
        topic, another = topics.attribute(rng), topics.attribute(rng)
    values = {key: rng.choice(found) for key, found in VALUES.items()}
    asked, repeated = rng.sample(topic.questions, 2)
    slots: dict[str, Callable[[], str]] = {
        "question": lambda: repeated if rng.random() < 0.8 else asked,
        "next": lambda: rng.choice(topic.nexts),
        "new": lambda: rng.choice(another.questions),
        "subject": lambda: topic.subject,
        "othersubject": lambda: another.subject,
        "fact": lambda: topic.fact,
        "other": lambda: topic.other,
        "error": lambda: values["error"],
        **{word: partial(rng.choice, found) for word, found in WORDS.items()},
    }
    failed = rng.random() < 0.2
    question, answer = (
        _fill(rng, text, slots, values) for text in (asked, rng.choice(FAILURES[name] if failed else topic.answers))
    )
    question = _register(rng, question) if registers else question
    pair = []
    for dissatisfied in (False, True):
        fitting = {kind: found for kind, found in lines[dissatisfied].items() if _fits(kind, dissatisfied, failed)}
        followup = ""
        while not followup or (name != "train" and _trained().fullmatch(_bare(followup))):
            kind, line = _template(rng, fitting)
            followup = _fill(rng, line, slots, values)
        followup = _register(rng, followup) if registers else followup
        messages = (Message("user", question), Message("assistant", answer), Message("user", followup))
        pair.append(Dialogue(messages, dissatisfied, kind, line))
    return pair


def _fits(kind: str, dissatisfied: bool, failed: bool) -> bool:
    """Whether a kind of follow-up makes sense after an answer, or after a failed one."""
    return (failed or kind != "after_failure") if dissatisfied else (kind in _MAY_FOLLOW_A_FAILURE or not failed)


def _template(rng: random.Random, lines: Mapping[str, tuple[str, ...]]) -> tuple[str, str]:
    """Draw a template; half the time uniformly over kinds, so that kinds with few templates are not rare."""
    if rng.random() < 0.5:
        kind = rng.choice(sorted(lines))
        return kind, rng.choice(lines[kind])
    return rng.choice([(kind, line) for kind, found in lines.items() for line in found])


def _fill(rng: random.Random, text: str, slots: Mapping[str, Callable[[], str]], values: Mapping[str, str]) -> str:
    text = re.sub(r"\{([^{}]*)\}", lambda m: rng.choice(m[1].split("|")), text)
    text = re.sub(r"<(\w+)>", lambda m: slots[m[1]](), text)
    return re.sub(r"\$(\w+)", lambda m: values[m[1]], text)


def _register(rng: random.Random, text: str) -> str:
    """The text in a random register: lower case, no punctuation, capitals, typo, filler word, or unchanged."""
    roll = rng.random()
    if roll < 0.25:
        text = text.lower()
    elif roll < 0.4:
        text = re.sub(r"[.,!?'](?!\S)|'", "", text).lower()
    elif roll < 0.44:
        text = text.upper()
    if rng.random() < 0.15:
        text = _typo(rng, text)
    if rng.random() < 0.1:
        text = rng.choice(("hmm, ", "ok so ", "hey, ", "well, ", "um ", "hi, ")) + text[:1].lower() + text[1:]
    if rng.random() < 0.06:
        text = text.rstrip(".!? ") + rng.choice(("...", "!!", " please", "??" if text.endswith("?") else "!"))
    return text


def _typo(rng: random.Random, text: str) -> str:
    """One letter dropped, doubled or swapped with its neighbour, inside a word."""
    places = [i for i in range(1, len(text) - 1) if text[i - 1 : i + 2].isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    dropped, doubled = text[:i] + text[i + 1 :], text[:i] + text[i] + text[i:]
    swapped = text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    return rng.choice((dropped, doubled, swapped))
