"""The topics of synthetic dialogues: paraphrased questions, answers, and next questions.

A block of `topics.txt` starts with the set and the subject; then follow four lines, items separated by ` / `:
paraphrased questions, answers, next questions, and the claimed fact with a wrong alternative. `{a|b}` is a choice,
`$name` a value of `VALUES` that is fixed within one dialogue. The three sets share no topic.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib.resources import files

VALUES: dict[str, tuple[str, ...]] = {
    "name": ("Tom", "Anna", "Priya", "Chen", "Maria", "Omar", "Julia", "Ivan", "Fatima", "Ben"),
    "city": ("Paris", "Lisbon", "Oslo", "Nairobi", "Lima", "Kyoto", "Boston", "Dublin", "Vienna", "Leeds"),
    "town": ("Madrid", "Warsaw", "Chicago", "Cairo", "Toronto", "Seoul", "Bristol", "Naples"),
    "country": ("France", "Peru", "Kenya", "Norway", "Japan", "Canada", "Turkey", "Chile", "Ghana", "Poland"),
    "language": ("Python", "Java", "Rust", "Go", "JavaScript", "C++", "Ruby", "Kotlin"),
    "tongue": ("French", "Spanish", "German", "Italian", "Polish", "Turkish"),
    "dish": ("lasagne", "ramen", "pancakes", "a lentil soup", "banana bread", "risotto", "tacos", "a curry"),
    "animal": ("an owl", "a whale", "an octopus", "a honey bee", "a wolf", "a penguin", "an ant"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "date": ("March 4th", "the 12th", "June 20th", "tomorrow", "next weekend", "the 3rd of May"),
    "hour": ("9:15", "11:30", "14:00", "18:45", "7 pm", "noon", "5:30 in the evening"),
    "few": ("two", "three", "four", "five", "six"),
    "count": ("7", "12", "18", "25", "40", "64", "150"),
    "other": ("9", "13", "20", "31", "48", "72", "1200"),
    "price": ("£20", "$35", "80 euros", "$120", "15 pounds"),
    "book": ("Dune", "Emma", "The Hobbit", "Beloved", "Dracula", "1984", "Middlemarch"),
    "element": ("iron", "neon", "gold", "helium", "carbon", "zinc", "sodium"),
    "planet": ("Mars", "Venus", "Jupiter", "Saturn", "Neptune"),
    "person": ("Ada Lovelace", "Newton", "Frida Kahlo", "Mozart", "Marie Curie", "Napoleon"),
    "food": ("Italian", "Indian", "Thai", "Mexican", "Lebanese", "Chinese"),
    "area": ("north", "south", "east", "west", "centre"),
    "error": (
        "TypeError: unsupported operand type(s) for +: 'int' and 'str'",
        "fatal: not a git repository",
        "ModuleNotFoundError: No module named 'numpy'",
        "NullPointerException at Main.java:12",
        "segmentation fault (core dumped)",
        "error: expected ';' before 'return'",
        "404 Not Found",
        "IndexError: list index out of range",
        "Permission denied (publickey)",
        "invalid syntax on line 3",
    ),
}


@dataclass(frozen=True, slots=True)
class Topic:
    """`subject` is a noun phrase; `questions` are paraphrases; `fact` is the answer's claim, `other` an alternative."""

    subject: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    nexts: tuple[str, ...]
    fact: str
    other: str


def listed(name: str) -> tuple[Topic, ...]:
    """The topics of a set."""
    found = []
    for block in files(__package__).joinpath("topics.txt").read_text("utf-8").split("\n\n"):
        heading, *lines = block.strip().splitlines()
        if heading.startswith(f"[{name}] "):
            questions, answers, nexts, (fact, other) = (tuple(line.split(" / ")) for line in lines)
            found.append(Topic(heading.removeprefix(f"[{name}] "), questions, answers, nexts, fact, other))
    return tuple(found)


_ATTRIBUTES = """
price size age history weight colour meaning origin length owner population currency climate speed temperature recipe
height depth taste purpose shape name address symbol author density capital flag anthem distance value number rating
""".split()  # noqa: SIM905
_THINGS = (
    """
a_piano|Mount_Everest|the_Eiffel_Tower|my_street|a_sonnet|the_euro|$country|$city|$book|$animal|$planet|$dish|the_opera
a_violin|the_Nile|the_museum|a_marathon|a_laptop|the_moon|an_atom|a_battery|the_city_bus|a_haiku|the_library|chess|Java
tea|the_stock_market|a_passport|an_elephant|a_diamond|the_castle|a_kilowatt_hour|my_flight|the_concert|the_new_phone
""".replace("_", " ")
    .strip()
    .replace("\n", "|")
    .split("|")
)
_FRAMES = (
    "What is the ATTRIBUTE of THING?",
    "Tell me the ATTRIBUTE of THING.",
    "Can you give me the ATTRIBUTE of THING?",
    "THING, ATTRIBUTE?",
    "Which ATTRIBUTE does THING have?",
    "I'd like to know the ATTRIBUTE of THING.",
    "Do you know the ATTRIBUTE of THING?",
    "Find out the ATTRIBUTE of THING, please.",
    "Could you look up THING's ATTRIBUTE?",
)


def attribute(rng: random.Random) -> Topic:
    """A topic about one attribute of a thing; next questions change the thing or the attribute."""
    one, two = rng.sample(_ATTRIBUTES, 2)
    this, that = rng.sample(_THINGS, 2)

    def question(attribute: str, thing: str) -> str:
        return rng.choice(_FRAMES).replace("ATTRIBUTE", attribute).replace("THING", thing)

    questions = tuple(frame.replace("ATTRIBUTE", one).replace("THING", this) for frame in rng.sample(_FRAMES, 4))
    answers = (f"The {one} of {this} is $count.", "It is $count.", f"About $count, as far as I know, is the {one}.")
    nexts = (question(two, this), question(one, that), question(two, that), f"And the {two}?", f"And of {that}?")
    return Topic(f"the {one} of {this}", questions, answers, nexts, "$count", "$other")
