"""Short reports to be summarized in a phrase; the checker knows what the summary must name, and what it must not.

1  who of a report did what is asked          2  the one thing that all sentences are about
3  the outcome of a match                     4  the decision of a meeting
5  what changed, and by how much
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from cogumi.data.world.task import CITIES, NAMES, Maker, Task, Wording, no_answer, openings

_DEEDS = ("won the race", "found the key", "wrote the letter", "fixed the roof", "cooked the soup", "sold the boat")
_TOPICS: Mapping[str, tuple[str, ...]] = {
    "rain": ("Streets are under water.", "Umbrellas are sold out.", "The river is rising.", "Matches were called off."),
    "snow": (
        "Children build white figures.",
        "Ploughs clear the roads.",
        "Skis are in demand.",
        "The hills are white.",
    ),
    "heat": ("Fans are sold out.", "The pools are full.", "Schools close at noon.", "Water is scarce."),
    "wind": ("Roofs were torn off.", "Kites fill the sky.", "Trees fell on the road.", "Ferries stay in port."),
}
_PLANS = ("build a bridge", "plant trees", "paint the school", "open a library", "repair the harbor", "buy a bus")
_MEASURES = ("rent", "price of bread", "number of visitors", "number of pupils", "water level", "speed limit")


def make(difficulty: int, rng: random.Random, wording: Wording = "terse") -> Task:
    """A report, what to say of it in a phrase, and the phrase."""
    report, asked, answer, check = (_deed, _topic, _match, _decision, _change)[difficulty - 1](rng)
    return Task(f"{rng.choice(openings(wording))}{asked}\n\n{report}", answer, check)


def _named(answer: str, rivals: list[str]) -> dict[str, Any]:
    return {"kind": "short_answer", "answers": [answer], "rivals": rivals}


def _report(rng: random.Random, sentences: list[str]) -> str:
    rng.shuffle(sentences)
    return " ".join(sentences)


def _deed(rng: random.Random) -> tuple[str, str, str, dict[str, Any]]:
    names, deeds = rng.sample(NAMES, 4), rng.sample(_DEEDS, 4)
    report = _report(rng, [f"{name} {deed}." for name, deed in zip(names, deeds, strict=True)])
    return report, f"Sum up in one word who {deeds[0]}.", names[0], _named(names[0], names[1:])


def _topic(rng: random.Random) -> tuple[str, str, str, dict[str, Any]]:
    topic = rng.choice(list(_TOPICS))
    others = [name for name in _TOPICS if name != topic]
    report = f"{rng.choice(CITIES)}: {_report(rng, rng.sample(_TOPICS[topic], 3))}"
    listed = ", ".join(sorted(_TOPICS))
    return report, f"Sum up the report in one of these words: {listed}.", topic, _named(topic, others)


def _match(rng: random.Random) -> tuple[str, str, str, dict[str, Any]]:
    one, other, third = rng.sample(CITIES, 3)
    goals = sorted(rng.sample(range(8), 2), reverse=True)
    report = _report(
        rng,
        [
            f"{one} scored {goals[0]} times.",
            f"{other} scored {goals[1]} times.",
            f"The match was played in {third}.",
            f"{rng.choice(NAMES)} was the referee.",
        ],
    )
    return report, "Sum up in one word which team won.", one, _named(one, [other, third])


def _decision(rng: random.Random) -> tuple[str, str, str, dict[str, Any]]:
    plans, names = rng.sample(_PLANS, 3), rng.sample(NAMES, 3)
    said = [f"{name} wanted to {plan}." for name, plan in zip(names, plans, strict=True)]
    winner = rng.randrange(3)
    votes = f"After a long debate the council voted for the plan of {names[winner]}."
    report = f"{_report(rng, said)} {votes}"
    rivals = [plan for plan in plans if plan != plans[winner]]
    return report, "Sum up what the council will do, in a few words.", plans[winner], _named(plans[winner], rivals)


def _change(rng: random.Random) -> tuple[str, str, str, dict[str, Any]]:
    measure, others = rng.choice(_MEASURES), rng.sample(CITIES, 2)
    before, step = rng.randrange(20, 90), rng.randrange(2, 15)
    up = rng.random() < 0.5
    after = before + step if up else before - step
    report = _report(
        rng,
        [
            f"Last year the {measure} of {others[0]} was {before}.",
            f"This year it is {after} there.",
            f"In {others[1]} it stayed at {rng.randrange(20, 90)}.",
        ],
    )
    asked = f"Sum up by how much the {measure} of {others[0]} {'rose' if up else 'fell'}: one number."
    return report, asked, str(step), {"kind": "numeric"}


def _missing_deed(rng: random.Random, wording: Wording = "terse") -> Task:
    """What a report does not say."""
    names, deeds = rng.sample(NAMES, 3), rng.sample(_DEEDS, 4)
    report = _report(rng, [f"{name} {deed}." for name, deed in zip(names, deeds[:3], strict=True)])
    return no_answer(f"Sum up in one word who {deeds[3]}.\n\n{report}")


UNANSWERABLE: Mapping[str, Maker] = {"missing_deed": _missing_deed}
