"""Grader `short_answer`: real wordings of right and wrong answers, and properties of the whole kind."""

import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cogumi.core.errors import DataError
from cogumi.core.types import ABSTENTION, Example, Message
from cogumi.grading.graders import grade

CAPITAL = ("What is the capital of France?", ["Paris"], ["London", "Lyon", "Marseille"])
MACAO = ("What is the capital of Macao?", ["Macao", "Macau"], ["Santiago", "Beijing"])
CONTINENT = ("On which continent is Vietnam?", ["Asia"], ["Africa", "Europe", "Oceania", "North America"])
OCEANIA = ("Which country has the capital Canberra?", ["Australia"], ["Austria", "New Zealand"])
IRON = ("What is the atomic number of iron (Fe)?", ["26", "twenty-six"], [])
YEN = ("What is the currency of Japan?", ["yen", "Japanese yen", "JPY"], ["won", "South Korean won", "yuan"])
PESO = ("What is the currency of Mexico?", ["peso", "Mexican peso"], ["Philippine peso", "dollar", "US dollar"])
SWISS = ("Name an official language of Switzerland.", ["German", "French", "Italian"], ["English", "Spanish"])
GUINEA = ("Which country has the capital Port Moresby?", ["Papua New Guinea"], ["Guinea", "Guinea-Bissau"])
BIGGER = ("Which is bigger, a cat or a horse?", ["horse"], ["cat"])
ODD = ("Which one is of another kind: pea, grape, hammer?", ["hammer"], ["pea", "grape"])
LOUDEST = ("Ann is louder than Bob. Eve is louder than Ann. Who is the loudest?", ["Eve"], ["Ann", "Bob"])
LOUDER = ("Ann is louder than Bob. Who is louder?", ["Ann"], ["Bob"])
QUIETER = ("Ann is louder than Bob. Who is the quieter one?", ["Bob"], ["Ann"])
LIVES = ("Tom lives in Paris. Where does Tom live?", ["Paris"], ["Rome", "Oslo"])
UNITED = ("Which country has the capital Washington?", ["United States", "the United States", "US", "America"], [])
BAY = ("What is the capital of Côte d’Ivoire?", ["Yamoussoukro"], [])
REUNION = ("What is the capital of Réunion?", ["Saint-Denis"], [])
MEXICO = ("In which country is Puebla?", ["Mexico"], ["Spain"])

RIGHT = [
    (CAPITAL, "Paris"),
    (CAPITAL, "paris."),
    (CAPITAL, "PARIS IS THE CAPITAL"),
    (CAPITAL, "**Paris**"),
    (CAPITAL, "The capital of France is Paris."),
    (CAPITAL, "The capital of France is __Paris__!"),
    (CAPITAL, "The Capital Of France Is Paris"),
    (CAPITAL, "Paris is the capital of France."),
    (CAPITAL, "Paris, France"),
    (CAPITAL, "Answer: Paris"),
    (CAPITAL, "It's Paris."),
    (CAPITAL, "It is not London, but Paris."),
    (CAPITAL, "Paris, not London."),
    (CAPITAL, "No, it is Paris."),
    (CAPITAL, "Is it London? No, it is Paris."),
    (CAPITAL, "<think>London or Lyon?</think>Paris"),
    (CAPITAL, "<think>" + "It is London. " * 200 + "</think>Paris"),
    (CAPITAL, "“Paris”"),
    (CAPITAL, "\\boxed{Paris}"),
    (CAPITAL, "Answer\nParis\nThe city lies on a river."),
    (MACAO, "Macao"),
    (MACAO, "The capital of Macao is Macao."),
    (MACAO, "The capital of Macao is Macau."),
    (CONTINENT, "Vietnam is in Asia."),
    (CONTINENT, "Asia"),
    (CONTINENT, "Vietnam is located on the continent of Asia."),
    (OCEANIA, "Canberra is Australia's capital, so the country is Australia."),
    (IRON, "26"),
    (IRON, "The atomic number of iron (Fe) is 26."),
    (IRON, "Twenty-six."),
    (YEN, "The Japanese Yen."),
    (YEN, "The currency of Japan is the yen (JPY)."),
    (YEN, "Japan uses the yen"),
    (PESO, "The Mexican peso"),
    (PESO, "It is the peso."),
    (SWISS, "German"),
    (SWISS, "German, French and Italian."),
    (SWISS, "German or French"),
    (GUINEA, "Papua New Guinea"),
    (GUINEA, "Port Moresby is the capital of Papua New Guinea."),
    (BIGGER, "A horse."),
    (BIGGER, "The horse is bigger."),
    (BIGGER, "A horse is bigger than a cat."),
    (BIGGER, "The bigger one is the horse."),
    (ODD, "hammer"),
    (ODD, "The hammer is of another kind."),
    (ODD, "The one of another kind is the hammer."),
    (LOUDEST, "The loudest is Eve."),
    (LOUDEST, "Eve is the loudest."),
    (LOUDEST, "Eve"),
    (LOUDER, "Ann is louder than Bob."),
    (LIVES, "Tom lives in Paris."),
    (LIVES, "In Paris."),
    (LIVES, "He lives in Paris"),
    (UNITED, "The United States of America"),
    (UNITED, "the U.S."),
    (UNITED, "US"),
    (REUNION, "Saint Denis"),
    (REUNION, "Saint-Denis."),
    (REUNION, "The capital of Reunion is Saint-Denis."),
    (("Who wrote it?", ["Gödel"], []), "Godel"),
    (MEXICO, "Puebla is in Mexico."),
    (("Who?", ["St. Pierre and Miquelon"], []), "It is St. Pierre and Miquelon."),
    (("Which city?", ["Washington", "Washington, D.C."], ["New York"]), "Washington, D.C."),
    (("Which city?", ["Washington", "Washington, D.C."], ["New York"]), "It is Washington D.C."),
]
WRONG = [
    (CAPITAL, ""),
    (CAPITAL, "London"),
    (CAPITAL, "Paris or London"),
    (CAPITAL, "either Paris or Rome"),
    (CAPITAL, "Paris or Rome"),
    (CAPITAL, "Rome or Paris"),
    (CAPITAL, "Paris/Rome"),
    (CAPITAL, "Paris / Rome"),
    (CAPITAL, "Paris and Rome"),
    (CAPITAL, "Paris, London"),
    (CAPITAL, "Paris. London."),
    (CAPITAL, "It is not Paris."),
    (CAPITAL, "It isn't Paris."),
    (CAPITAL, "Paris is not the capital of France."),
    (CAPITAL, "Paris isn't the capital."),
    (CAPITAL, "Paris is wrong."),
    (CAPITAL, "Is it Paris?"),
    (CAPITAL, "Paris?"),
    (CAPITAL, "London, not Paris."),
    (CAPITAL, "I don't know."),
    (CAPITAL, "I'm not sure, maybe Paris."),
    (CAPITAL, "Paris Hilton"),
    (CAPITAL, "Paris-Nord"),
    (CAPITAL, "parish"),
    (CAPITAL, "Paris's mayor"),
    (CAPITAL, "Paris.com"),
    (MACAO, "The capital of Macao is Santiago, capital of Macao"),
    (MACAO, "The capital of Macao"),
    (MACAO, "The capital of Macao is Lisbon, the capital of Macao."),
    (MACAO, "Macao has a capital city."),
    (MACAO, "What is the capital of Macao?"),
    (CONTINENT, "Southeast Asia"),
    (CONTINENT, "Vietnam is in Southeast Asia."),
    (CONTINENT, "Eurasia"),
    (CONTINENT, "Asia-Pacific"),
    (CONTINENT, "Asia Pacific"),
    (CONTINENT, "Asia or Africa"),
    (OCEANIA, "Southeast Asia is Australia's"),
    (OCEANIA, "Austria"),
    (OCEANIA, "South Australia"),
    (IRON, "312"),
    (IRON, "260"),
    (IRON, "2.26"),
    (IRON, "26.5"),
    (IRON, "-26"),
    (IRON, "26%"),
    (IRON, "26 million"),
    (IRON, "126"),
    (IRON, "1,26"),
    (IRON, "26 or 27"),
    (IRON, "The atomic number is 55, not 26"),
    (IRON, "The atomic number is 25. Iron has 26 electrons."),
    (IRON, "one hundred twenty-six"),
    (("How many?", ["12"], []), "312"),
    (("How many?", ["six"], []), "twenty-six"),
    (("How many?", ["six"], []), "twenty six"),
    (("Where was he born?", ["York"], []), "New York"),
    (YEN, "South Korean won"),
    (YEN, "Yen or won"),
    (PESO, "Philippine peso"),
    (PESO, "The Philippine peso."),
    (PESO, "the philippine peso"),
    (SWISS, "English"),
    (SWISS, "German, French, Italian, English"),
    (GUINEA, "Guinea"),
    (GUINEA, "New Guinea"),
    (BIGGER, "Which is bigger, a cat or a horse?"),
    (BIGGER, "a cat or a horse"),
    (BIGGER, "The cat is bigger than the horse."),
    (BIGGER, "cat"),
    (BIGGER, "The horse is not bigger."),
    (ODD, "pea, grape, hammer"),
    (LOUDEST, "Eve is louder than Ann."),
    (LOUDER, "Ann is louder than Bob. The answer is not possible to determine."),
    (LOUDEST, "Ann"),
    (LOUDEST, "Ann is louder than Eve."),
    (LOUDER, "Bob is quieter than Ann."),
    (QUIETER, "Ann is louder than Bob."),
    (QUIETER, "Bob is louder than Ann."),
    (LIVES, "Where does Tom live?"),
    (LIVES, "Tom"),
    (LIVES, "Tom lives in Rome, not in Paris."),
    (MEXICO, "The Gulf of Mexico."),
    (MEXICO, "New Mexico"),
    (("Name the sign.", ["x2"], []), "x²"),
    (CAPITAL, "Paris. " + "It is large. " * 200),
]


def verdict(case, output):
    question, answers, rivals = case
    check = {"kind": "short_answer", "answers": answers, "rivals": rivals}
    return grade(Example("id", "d", 1, (Message("user", question),), answers[0], meta={"check": check}), output)


@pytest.mark.parametrize(("case", "output"), RIGHT)
def test_a_sentence_that_names_the_answer_is_right(case, output):
    assert verdict(case, output).correct, verdict(case, output).reason


@pytest.mark.parametrize(("case", "output"), WRONG)
def test_hedges_echoes_longer_names_and_negations_are_wrong(case, output):
    assert not verdict(case, output).correct
    assert verdict(case, output).reason


def test_system_messages_are_not_part_of_the_question():
    check = {"kind": "short_answer", "answers": ["Paris"]}
    messages = (Message("system", "Name the city Paris."), Message("user", "Where?"))
    assert grade(Example("id", "d", 1, messages, "Paris", meta={"check": check}), "Paris, of course").correct


@pytest.mark.parametrize("check", [{}, {"answers": []}, {"answers": "Paris"}, {"answers": ["?"]}, {"answers": [3]}])
def test_invalid_checks_are_refused(check):
    with pytest.raises(DataError, match="example id"):
        grade(
            Example("id", "d", 1, (Message("user", "q"),), "a", meta={"check": {"kind": "short_answer", **check}}), "a"
        )


SYLLABLES = st.sampled_from(["zor", "mek", "dal", "tib", "quen", "ruv", "ösk", "lam", "éna", "pho"])
NAME = st.lists(SYLLABLES, min_size=2, max_size=4).map(lambda parts: "".join(parts).capitalize())
NAMES = st.lists(NAME, min_size=1, max_size=3).map(" ".join)
FRAMES = st.sampled_from(
    ["{}", "{}.", "It is {}.", "The capital of Bulmont is {}.", "Answer: {}", "**{}**", "{} is the capital of Bulmont.",
     "The answer is “{}”!", "It is called {}, I think.", "Sure!\n\n{}"]
)  # fmt: skip
QUESTION = "What is the capital of Bulmont?"


def accepts(output, answer, rivals=()):
    return verdict((QUESTION, [answer], list(rivals)), output).correct


@settings(deadline=None)
@given(NAMES, FRAMES)
def test_every_frame_states_every_name(name, frame):
    assert accepts(frame.format(name), name)
    assert accepts(frame.format(unicodedata.normalize("NFD", name)), name)


@settings(deadline=None)
@given(NAMES, NAMES, FRAMES, st.sampled_from([" or ", ", ", ". ", " and ", "/", "\n", " and not ", " nor "]))
def test_two_candidates_are_never_right(name, rival, frame, joint):
    a, b = name.split(), rival.split()
    assume(not set(a) & set(b))
    for output in (frame.format(name) + joint + rival, rival + joint + frame.format(name)):
        negated_rival = joint in (" and not ", " nor ") and output.endswith(rival)
        assert not accepts(output, name, [rival]) or negated_rival


@settings(deadline=None)
@given(NAMES, FRAMES, NAME, st.sampled_from(["{1} {0}", "{0} {1}", "{0}-{1}", "{1}-{0}", "{0}s", "x{0}", "{0}'s hat"]))
def test_a_name_inside_another_name_is_wrong(name, frame, more, longer):
    assume(more not in name.split())
    assert not accepts(frame.format(longer.format(name, more)), name)


@settings(deadline=None)
@given(NAMES)
def test_negations_questions_and_abstentions_are_wrong(name):
    for frame in ("It is not {}.", "It isn't {}", "{} is not the capital.", "Is it {}?", "I don't know, perhaps {}."):
        assert not accepts(frame.format(name), name)
    assert not accepts(ABSTENTION, name)


@settings(deadline=None)
@given(NAMES, FRAMES)
def test_an_answer_that_occurs_in_the_question_must_be_stated(name, frame):
    case = (f"What is the capital of {name}?", [name], [])
    assert not verdict(case, f"The capital of {name}").correct
    assert not verdict(case, f"The capital of {name} is Borlax, capital of {name}.").correct
    assert not verdict(case, case[0]).correct
    assert verdict(case, f"The capital of {name} is {name}.").correct


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_one_number_only(one, other):
    assert accepts(f"The answer is {one}.", str(one))
    assert accepts(f"{one:,}", str(one))
    assert one == other or not accepts(f"{one} or {other}", str(one))
    assert accepts(f"It is {other}.", str(one)) is (one == other)


PIECES = st.sampled_from(
    [
        "Paris",
        " or ",
        "?",
        "\n",
        "-",
        "'",
        "not ",
        "is ",
        ". ",
        "I don't know",
        "<think>",
        "**",
        "capital of ",
        "\0",
        "²",
    ]
)


@given(st.one_of(st.text(), st.lists(PIECES, max_size=12).map("".join)))
@settings(max_examples=300, deadline=None)
def test_any_output_is_graded_and_a_right_one_holds_the_answer(output):
    if verdict(CAPITAL, output).correct:
        plain = "".join(c for c in unicodedata.normalize("NFD", output) if not unicodedata.combining(c))
        assert "paris" in plain.casefold()
