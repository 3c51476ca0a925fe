"""Facts about the real world: countries, cities, currencies, languages, elements, units (SPEC A2).

1 to 5  from what everybody knows to what few know: see `fact_tables` for the packages, and how levels are made

All questions about one fact, in either direction, share a key, so that held-out facts were never trained on. Questions
are asked as a person asks them, in either wording of the world. Unanswerable questions are about invented countries,
cities and elements, made of plausible syllables and checked against the packages.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from cogumi.data.world.fact_tables import facts, known_names
from cogumi.data.world.task import Maker, Task, Wording, no_answer

_QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "capital": (
        "What is the capital of {s}?",
        "Which city is the capital of {s}?",
        "Name the capital city of {s}.",
        "What's the capital city of {s}?",
    ),
    "country_of_capital": (
        "Which country has the capital {s}?",
        "{s} is the capital of which country?",
        "Of which country is {s} the capital?",
        "Name the country whose capital is {s}.",
    ),
    "continent": (
        "On which continent is {s}?",
        "Which continent does {s} belong to?",
        "What continent is {s} in?",
        "Name the continent where {s} lies.",
    ),
    "currency": (
        "What is the currency of {s}?",
        "Which currency is used in {s}?",
        "What money do people pay with in {s}?",
        "Name the official currency of {s}.",
    ),
    "language": (
        "Name an official language of {s}.",
        "What is an official language of {s}?",
        "Which official language is spoken in {s}?",
        "Tell me one official language of {s}.",
    ),
    "symbol": (
        "What is the chemical symbol of {s}?",
        "Which symbol does the element {s} have?",
        "What's the symbol for {s} in the periodic table?",
        "Name the chemical symbol for {s}.",
    ),
    "element_of_symbol": (
        "Which chemical element has the symbol {s}?",
        "What element does the symbol {s} stand for?",
        "Name the element with the symbol {s}.",
        "In the periodic table, what is {s}?",
    ),
    "atomic_number": (
        "What is the atomic number of {s}?",
        "Which atomic number does {s} have?",
        "How many protons does an atom of {s} have?",
        "Name the atomic number of the element {s}.",
    ),
    "element_of_number": (
        "Which chemical element has atomic number {s}?",
        "What element has {s} protons?",
        "Name the element with atomic number {s}.",
        "Which element is number {s} in the periodic table?",
    ),
    "country_of_city": (
        "In which country is the city of {s}?",
        "Which country is {s} in?",
        "What country does the city {s} belong to?",
        "Name the country where the city of {s} lies.",
    ),
    "unit": ("How many {s}?", "Exactly how many {s}?", "Quick question: how many {s}?"),
}
"""Kind of fact -> templates."""

_SYLLABLES: Mapping[str, Sequence[str]] = {
    "first": [
        "Bul",
        "Kar",
        "Vel",
        "Tor",
        "Mor",
        "Zan",
        "Dra",
        "Lor",
        "Sel",
        "Pra",
        "Nov",
        "Ost",
        "Gar",
        "Fen",
        "Ral",
        "Quo",
    ],
    "middle": ["a", "e", "i", "o", "u", "ana", "ovi", "eri", "ula", "ima", "oro", "ade"],
    "country": ["stan", "nia", "land", "mia", "via", "dor", "ria", "mont"],
    "city": ["burg", "grad", "ville", "pur", "polis", "mouth", "sk", "ton", "abad"],
    "element": ["nium", "rium", "dium", "lium", "tium", "vium"],
}


_FOLLOW_UPS = ("And {s}?", "What about {s}?", "And for {s}?")
_ASKED_ON = ("capital", "continent", "currency", "symbol", "country_of_city")
"""Kinds of facts of which a follow-up names only the next subject."""
FOLLOW_UP = 0.2
"""Share of natural questions about such facts that follow up on an answered one of the same kind."""


def make(difficulty: int, rng: random.Random, wording: Wording = "terse") -> Task:
    """A question about one fact of this level; every kind of fact is equally frequent."""
    groups = facts()[difficulty]
    group = rng.choice(sorted(groups))
    fact = rng.choice(groups[group])
    question = rng.choice(_QUESTIONS[group]).format(s=fact.subject)
    before: tuple[tuple[str, str], ...] = ()
    if wording == "natural" and group in _ASKED_ON and rng.random() < FOLLOW_UP:
        first = rng.choice([other for other in facts()[1][group] if other.key != fact.key])
        before = ((rng.choice(_QUESTIONS[group]).format(s=first.subject), f"{first.answers[0]}."),)
        question = rng.choice(_FOLLOW_UPS).format(s=fact.subject)
    check = {"kind": "short_answer", "answers": list(fact.answers), "rivals": list(fact.rivals)}
    return Task(question, fact.answers[0], check, fact.key, group, before)


def _invent(kind: str, rng: random.Random) -> str:
    """A name that no package knows."""
    while True:
        name = "".join(rng.choice(_SYLLABLES[part]) for part in ("first", "middle", kind))
        if name.casefold() not in known_names():
            return name


def _invented(kind: str, groups: tuple[str, ...], rng: random.Random) -> Task:
    name, group = _invent(kind, rng), rng.choice(groups)
    subject = name.lower() if kind == "element" else name
    question = rng.choice(_QUESTIONS[group]).format(s=subject)
    return no_answer(question, key=f"{kind}/{name}", group=group)


def _country(rng: random.Random, wording: Wording = "terse") -> Task:
    """A question about a country that does not exist."""
    return _invented("country", ("capital", "continent", "currency", "language"), rng)


def _city(rng: random.Random, wording: Wording = "terse") -> Task:
    """A question about a city that does not exist."""
    return _invented("city", ("country_of_city", "country_of_capital"), rng)


def _element(rng: random.Random, wording: Wording = "terse") -> Task:
    """A question about an element that does not exist."""
    return _invented("element", ("symbol", "atomic_number"), rng)


UNANSWERABLE: Mapping[str, Maker] = {
    "invented_country": _country,
    "invented_city": _city,
    "invented_element": _element,
}
