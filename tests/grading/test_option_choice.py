"""Which option an answer selects, in every usual wording."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi.core.types import Example, Message
from cogumi.grading.graders import grade, problem_of
from cogumi.grading.option_choice import chosen, gold
from support.public_data import public_data

LETTERS = [
    "B", "(B)", "b", "b)", "(b)", "B.", "**B**", "Answer: B", "ANSWER: B", "answer: B", "**Answer: B**",
    "Answer: **B**",
    "Answer: (B)", "The answer is B.", "The answer is (B).", "The answer is: B", "The answer is **B**.",
    "The answer is b.", "The answer is option B.", "The correct answer is (B).", "The correct option is B.", "Option B",
    "I choose B.", "I would go with option B.", "My choice: B", "Final Answer: B", "Final answer: **(B)**",
    r"\boxed{B}", r"\boxed{\text{B}}", r"The answer is $\boxed{B}$.", "So the answer is B because it fits.",
    "Let's see. A is too small.\nSo the answer is B", "A is wrong because it is small.\n\nB",
    "Step 1: look.\nStep 2: think.\nAnswer: B", "The answer is B. Note that A is a common mistake.",
    "<think>A?</think>B", "Answer: A\n\nWait. Answer: B", "A: no. B: yes. The answer is B.", "B: it fits", "B) it fits",
]  # fmt: skip


@pytest.mark.parametrize("output", LETTERS)
def test_wordings_of_a_letter(output):
    assert chosen(output, ()) == chosen(output, ["first one", "second one"]) == 1


@pytest.mark.parametrize(
    ("output", "options", "expected"),
    [
        ("blue", "red blue", 1),
        ("B. blue", "red blue", 1),
        ("The sky is blue.", "red blue", 1),
        ("It is not red, it is blue.", "red blue", 1),
        ("Answer: blue", "red blue", 1),
        ("The answer is A or B", "red blue", None),
        ("The answer is A and B.", "red blue", None),
        ("A) red\nB) blue", "red blue", None),
        ("I don't know.", "red blue", None),
        ("I don't know.", "a b c d e f g h i j", None),
        ("The answer is I think o3", "o0 o1 o2 o3 o4 o5 o6 o7 o8 o9", 3),
        ("The answer is C because I computed the integral.", "w x y z", 2),
        ("I think the answer is a mystery", "red blue", None),
        ("Option A is wrong. Option B is right.", "red blue", 1),
        ("C", "red blue", None),
        ("car park", "car|car park", 1),
        ("The answer is car park.", "car|car park", 1),
        ("The answer is car.", "car|car park", 0),
        ("The answer is a car", "a car|x", 0),
        ("The answer is A dog", "a cat|a dog", 1),
        ("a cat or a dog", "a cat|a dog", None),
        ("dogma", "a cat|dog", None),
        ("The answer is 5", "3 5", 1),
        ("Step 3: the answer is 5", "3 5", 1),
        ("5 apples", "3 5", 1),
        ("15 apples", "3 5", None),
        ("1.5", "1 5", None),
        ("-5", "5 -5", 1),
        ("The result is -5 degrees", "5 -5", 1),
        ("The result is x-1", "x+1 x-1", 1),
        ("I would use C++", "C C++", 1),
        ("The answer is C", "C C++", 0),
        ("C#", "C C#", 1),
        ("True", "True False", 0),
        ("None of the above", "red|blue|None of the above", 2),
        ("The answer is (i) and (iii) only.", "(i) only|(i) and (iii) only|(i) and (iii) only, or none", 1),
        ("B", "C B A D", 1),
        ("E", "A E I O", 1),
    ],
)
def test_texts_of_options(output, options, expected):
    assert chosen(output, options.split("|") if "|" in options else options.split()) == expected


@pytest.mark.parametrize(
    ("answer", "options", "expected"),
    [
        ("b", "red blue", 1),
        ("(B)", "red blue", 1),
        ("1", "red blue", 1),
        ("blue", "red blue", 1),
        ("1", "0 1 2", 1),
        ("2", "1 2 3", 1),
        ("Z", "red blue", None),
        ("zebra", "red blue", None),
        ("7", "red blue", None),
        ("C", "L R 1/C C", 2),
        ("B", "", 1),
    ],
)
def test_right_option_by_letter_text_or_index(answer, options, expected):
    assert gold(answer, options.split()) == expected
    check = {"kind": "choice", **({"options": options.split()} if options else {})}
    question = Example("id", "d", 1, (), answer, meta={"check": check})
    assert (problem_of(question) is None) == (expected is not None)


@given(st.text(), st.lists(st.text(), max_size=5))
def test_any_text_is_accepted(text, options):
    found = chosen(text, options)
    assert found is None or not options or 0 <= found < len(options)


WORDINGS = ["{}", "({})", "Answer: {}", "The answer is {}.", "{}. {text}", "The correct option is {}.", "Hm.\n\n{}"]


def test_answers_of_a_public_set_are_right_and_others_wrong():
    wrong = right = asked = 0
    for path in sorted(public_data("mmlu").glob("*_test.csv"))[::3]:
        with open(path, encoding="utf-8") as file:
            for *_, a, b, c, d, answer in csv.reader(file):
                if answer not in "ABCD0123":
                    continue  # the names of the columns
                letter = answer if answer in "ABCD" else "ABCD"["0123".index(answer)]
                check = {"kind": "choice", "options": [a, b, c, d]}
                question = Example("id", "d", 1, (Message("user", "q"),), letter, meta={"check": check})
                at = "ABCD".index(letter)
                for wording in WORDINGS:
                    asked += 1
                    right += grade(question, wording.format(letter, text=(a, b, c, d)[at])).correct
                    other = (at + 1) % 4
                    wrong += grade(question, wording.format("ABCD"[other], text=(a, b, c, d)[other])).correct
    assert right >= 0.999 * asked
    assert wrong <= 0.001 * asked
