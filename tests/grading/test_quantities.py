"""Numbers in every usual spelling, the number that an answer commits to, and the grader `numeric`."""

import json
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi.core.types import Example, Message
from cogumi.grading.graders import grade, problem_of
from cogumi.grading.quantities import committed, quantities
from support.public_data import public_data


def example(answer, **check):
    return Example("id", "d", 1, (Message("user", "q"),), answer, meta={"check": {"kind": "numeric", **check}})


SPELLINGS = {
    "-5": [
        "-5", "-$5", "$-5", "\u2013$5", "\u22125", "\u20135", "x = - 5", "x=-5", "It is minus 5", "- 5 = \uff0d5",
        "(-5)", "-5.00 \u20ac",
    ],
    "5": [
        "5", "10-5", "10 - 5", "10\u20135", "- 5 apples", "5 km/h", "5 m2", "5 cm^2", "5 m\u00b2", "5th", "USD 5", "5%",
        "\uff15", "\u0665", "v2: 5",
    ],
    "0.5": [".5", "0.50", "1/2", "\u00bd", r"\frac{1}{2}", r"\dfrac12", r"\frac 1 2", "2/4", "50e-2"],
    "-1/3": ["-1/3", r"-\frac{1}{3}", "\u22121/3", "-2/6"],
    "1.5": ["1 1/2", "1\u00bd", r"1\frac{1}{2}", "3/2", "1.5"],
    "1234567": [
        "1,234,567", "1 234 567", "1\u00a0234\u00a0567", "1'234'567", "12,34,567", "1{,}234{,}567", r"1\,234\,567",
        r"1,\!234,\!567", "1.234567 million",
    ],
    "1234.56": ["1,234.56", "1.234,56", "$1,234.56", "1 234.56"],
    "150000": [
        "1.5e5", "1.5 x 10^5", "1.5\u00d710^5", r"1.5 \times 10^{5}", "1.5\u00d710\u2075", "150k", "150 thousand",
        "0.15M",
    ],
    "1024": ["2^10", "2\u00b9\u2070"],
    "3:30": ["3:30", "at 3:30 pm", "03:30"],
    "2": ["1,2", "1, 2", "It has H2O: 2", "1;2"],
    "none": ["", "seven", "3.1.2", "H2O", "2/0", "1e999999999999", "9" * 100_000, "x^2", "m2"],
}  # fmt: skip


@pytest.mark.parametrize(("value", "text"), [(value, text) for value, texts in SPELLINGS.items() for text in texts])
def test_spellings_of_a_number(value, text):
    found = committed(text)
    assert found == (None if value == "none" else committed(value) and found)
    if value != "none":
        assert found.parts == committed(value).parts
        assert grade(example(value), text).correct


COMMITMENTS = {
    "#### 72\nCheck: 72 - 24 = 48": 72,
    "<<48/2=24>>24 clips.\n#### 72": 72,
    "The answer is 72, because there were 2 days.": 72,
    "The answer is 16 - 3 + 5 = 18.": 18,
    "**Answer:** $72 for 3 people": 72,
    r"So \boxed{72}. There were 3.": 72,
    r"$\boxed{\frac{3}{4}}$": Fraction(3, 4),
    "Answer: 5. No, wait. Answer: 7": 7,
    "Answer: she has 3 boxes of 4, so 12": 12,
    "16 - 3 + 5 = 18": 18,
    "<think>maybe 7</think>42": 42,
    "The answer is 19. Let me know if you need 2 more examples.": 19,
    "The final answer is approximately 2.5 for 3 cases.": Fraction(5, 2),
}


@pytest.mark.parametrize("text", COMMITMENTS)
def test_an_answer_commits_to_one_number(text):
    assert committed(text).parts == (COMMITMENTS[text],)


@pytest.mark.parametrize(
    ("answer", "check", "output", "expected"),
    [
        ("3/4", {}, "1/4", False),
        ("3/4", {}, "3/5", False),
        ("3/4", {}, "0.75", True),
        ("3:30", {}, "9:30", False),
        ("3:30", {}, "30", False),
        ("30", {}, "3:30", False),
        ("12", {}, "The area is 12 cm^2", True),
        ("2", {}, "The area is 12 cm^2", False),
        ("0.3", {}, "0.30000000000000004", False),
        ("0.3", {"tolerance": 1e-9}, "0.30000000000000004", True),
        ("100", {"relative_tolerance": 0.01}, "101", True),
        ("100", {"relative_tolerance": 0.01}, "101.1", False),
        ("50%", {}, "50", True),
        ("50%", {}, "0.5", False),
        ("50%", {"percent": "share"}, "0.5", True),
        ("50", {"percent": "share"}, "50%", False),
        ("x", {"value": 1e21}, "1e21", True),
        ("x", {"value": -3}, "3", False),
        ("x", {"value": "1,234"}, "1234", True),
        ("7", {}, "1e999", False),
    ],
)
def test_numeric_answers(answer, check, output, expected):
    assert grade(example(answer, **check), output).correct is expected


def test_bad_numeric_checks_are_named():
    for check in ({"tolerance": -1}, {"tolerance": "1"}, {"relative_tolerance": float("nan")}, {"percent": "yes"}):
        assert next(iter(check)) in problem_of(example("1", **check))
    assert "without a number" in problem_of(example("seven"))
    assert problem_of(example("7")) is None


@given(
    st.decimals(-(10**9), 10**9, allow_nan=False, places=3),
    st.sampled_from(["{}", "${}", "It is {}.", "**{}**", "= {} kg"]),
)
def test_every_decimal_is_read_as_it_is_written(value, wording):
    assert committed(wording.format(f"{value:,}")).parts == (Fraction(value),)


@given(st.text())
def test_any_text_is_accepted(text):
    for quantity in quantities(text):
        assert str(quantity)


def wrong(number):
    """Wrong variants of a number: another sign, off by one, another digit."""
    return {str(-float(number)) if float(number) else "1", str(float(number) + 1), str(float(number) * 10 + 1)}


def test_answers_of_public_sets_are_right_and_wrong_ones_wrong():
    lines = public_data("gsm8k/test.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        gold = row["answer"].split("####")[1].strip().replace(",", "")
        question = example(gold)
        assert grade(question, row["answer"]).correct
        assert grade(question, f"It costs ${float(gold):,} in 3 days. The answer is ${gold}.").correct
        assert not any(grade(question, f"The answer is {other}.").correct for other in wrong(gold))


def test_signs_and_currencies_of_a_financial_set():
    documents = json.loads(public_data("tatqa/tatqa_dataset_dev.json").read_text())
    rows = [q for d in documents for q in d["questions"] if q["answer_type"] in ("arithmetic", "count")]
    values = [float(q["answer"]) for q in rows if re.fullmatch(r"-?[\d.]+", str(q["answer"]))]
    assert sum(value < 0 for value in values) > 100
    for value in values:
        money, other = (f"{'-' if v < 0 else ''}${abs(v):,}" for v in (value, -value))
        assert grade(example(str(value)), f"The change was {money}.").correct
        assert not value or not grade(example(str(value)), f"The change was {other}.").correct
