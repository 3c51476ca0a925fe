"""Multiple-choice questions in a user's rows."""

import json

import pytest

from cogumi.core.types import Example, Message
from cogumi.data.sources.multiple_choice import ChoiceQuestion, choice_question
from cogumi.data.sources.question_files import iterate, load
from support.public_data import public_data

ASKED = "Please choose the correct answer to the question: "
FORM = "\n\nAnswer format: answer1/answer2"


def row(question, answer, **meta):
    return Example("1", "general", 0, (Message("user", question),), answer, "", meta)


def test_choices_in_the_question_are_separated_from_it():
    found = choice_question(row(f"{ASKED}Which of these: is wet?\n\nAnswer1: sand Answer2: the sea.{FORM}", "answer2"))
    assert found == ChoiceQuestion("Which of these: is wet?", ("sand", "the sea."), 1)


def test_headings_may_have_another_name_and_stand_on_lines_of_their_own():
    asked = (
        "Please choose the correct solution to the question: Dry it\n\nSolution1: with a towel \n\nSolution2: use\nair"
    )
    found = choice_question(row(f"{asked}\n\nAnswer format: solution1/solution2", "solution1"))
    assert found == ChoiceQuestion("Dry it", ("with a towel", "use\nair"), 0)


@pytest.mark.parametrize("answer", ["B", "blue", "Blue."])
def test_options_of_a_check_are_the_choices(answer):
    check = {"kind": "choice", "options": ["red", "blue"]}
    assert choice_question(row("Colour?", answer, check=check)) == ChoiceQuestion("Colour?", ("red", "blue"), 1)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 2 + 2?", "4"),
        (f"{ASKED}Which?\n\nAnswer1: a Answer2: b{FORM}", "answer3"),
        (f"{ASKED}Which?\n\nAnswer1: a{FORM}", "answer1"),
        (f"{ASKED}Which?\n\nAnswer1: Answer2: b{FORM}", "answer2"),
        (f"{ASKED}Answer1: a Answer2: b{FORM}", "answer2"),
        ("Please choose the correct answer to the question: true or false?\n\nAnswer format: true/false", "true"),
        ("", "answer1"),
    ],
)
def test_row_without_usable_choices_has_no_choice_question(question, answer):
    assert choice_question(row(question, answer)) is None


def test_option_that_is_not_the_answer():
    assert choice_question(row("Colour?", "green", check={"kind": "choice", "options": ["red", "blue"]})) is None


@pytest.mark.parametrize(
    ("name", "rows", "choices"),
    [("ARC-Easy", 2376, {3, 4, 5}), ("ARC-Challenge", 1172, {3, 4, 5}), ("piqa", 1838, {2})],
)
def test_every_row_of_public_files_has_choices(name, rows, choices):
    """And the parts give the row back."""
    path = public_data(f"llm_adapters_eval/dataset/{name}/test.json")
    examples, _ = load(path)
    found = [choice_question(example) for example in examples]
    assert len(found) == rows
    assert {len(question.choices) for question in found} == choices
    for raw, question in zip(json.loads(path.read_text("utf-8")), found, strict=True):
        for text in (question.question, *question.choices):
            assert text in raw["instruction"]
        assert raw["answer"] == raw["answer"].rstrip("0123456789") + str(question.right + 1)


def test_table_of_choices_gives_the_bare_question(tmp_path):
    row = {
        "question": "Which is a colour?",
        "choices": {"text": ["red", "loud"], "label": ["A", "B"]},
        "answerKey": "A",
    }
    (tmp_path / "arc.jsonl").write_text(json.dumps(row))
    (read,) = iterate(tmp_path / "arc.jsonl")
    assert "A. red" in read.messages[-1].content
    assert choice_question(read) == ChoiceQuestion("Which is a colour?", ("red", "loud"), 0)
