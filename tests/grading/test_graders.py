"""Graders on equivalent, wrong and arbitrary outputs, and on reference answers of public benchmarks."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.core.errors import DataError
from cogumi.core.text import normalise, strip_fences
from cogumi.core.types import ABSTENTION, Example, Message
from cogumi.grading.graders import grade, grade_all, last_number, same_json
from support.public_data import public_data

OPTIONS = ["a cat", "a dog", "none of these"]
CALL = '{"tool": "add", "args": {"a": 1, "b": [true, "x"]}}'


def example(answer, **check):
    return Example("id", "d", 1, (Message("user", "q"),), answer, meta={"check": check} if check else {})


def right(question, output):
    verdict = grade(question, output)
    assert verdict.score == float(verdict.correct)
    assert verdict.correct != bool(verdict.reason)
    return verdict.correct


@pytest.mark.parametrize(
    ("output", "expected"),
    [("Paris", True), ("paris.", True), (' "Paris" \n', True), ("Paris, France", False), ("", False)],
)
def test_exact_match(output, expected):
    assert right(example("Paris"), output) is expected


@pytest.mark.parametrize(
    ("answer", "output", "expected"),
    [
        ("18", "16 - 3 + 5 = 18", True),
        ("18", "18 - 16", False),
        ("#### 18", "So she makes $18.00.", True),
        ("1,234,567", "1234567", True),
        ("-5", "The result is −5", True),
        ("-5", "x=-5", True),
        ("5", "10-5", True),
        ("0.1", "0.10", True),
        ("0.3", "0.30000000000000004", False),
        ("2000", "2e3", True),
        ("7", "1e999999999999", False),
        ("7", "seven", False),
        ("12", "1,2", False),
        ("19", "12 + 7 = 19.", True),
        ("19", "The answer is 19. Let me know if you need 2 more examples.", True),
        ("2", "The answer is 19. Let me know if you need 2 more examples.", False),
        ("19", "Let me know if you need 19", True),
        ("5", "-$5", False),
        ("-5", "-$5.00", True),
        ("5", "It is –5 degrees", False),
        ("15", "10–15", True),
        ("-5", "x = - 5", True),
        ("0.5", "The chance is .5", True),
        ("5", "The chance is .5", False),
    ],
)
def test_numeric_answers(answer, output, expected):
    assert right(example(answer, kind="numeric"), output) is expected


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("B", True),
        ("(b)", False),
        ("(B)", True),
        ("B) a dog", True),
        ("A dog.", True),
        ("I think it is a dog.", True),
        ("The answer is **B**.", True),
        ("The answer is: (B)", True),
        ("The answer is A dog", True),
        ("Answer: B", True),
        ("ANSWER: B", True),
        ("**Answer: B**", True),
        ("Final Answer: B", True),
        ("Option B", True),
        ("The answer is option B.", True),
        ("The answer is $\\boxed{B}$.", True),
        ("The answer is A or B", False),
        ("Answer: A", False),
        ("A", False),
        ("a cat or a dog", False),
        ("Z", False),
        ("dogma", False),
    ],
)
def test_multiple_choice_answers(output, expected):
    assert right(example("B", kind="choice", options=OPTIONS), output) is expected
    assert right(example("a dog", kind="choice", options=OPTIONS), output) is expected


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ('{"args": {"b": [true, "x"], "a": 1.0}, "tool": "add"}', True),
        (f"```json\n{CALL}\n```", True),
        (f"Sure, here is the call:\n\n```json\n{CALL}\n```\n\nIt adds the numbers.", True),
        (f"{CALL}\n```\n\nThis call adds the numbers.", True),
        (f"{CALL} and {CALL}", False),
        (f"[{CALL}]", True),
        (f"[{CALL}, {CALL}]", False),
        ('{"tool": "add", "args": {"a": true, "b": [true, "x"]}}', False),
        ('{"tool": "add", "args": {"a": 1, "b": [1, "x"]}}', False),
        ('{"tool": "add", "args": {"a": 1, "b": ["x", true]}}', False),
        (CALL[:-1], False),
        ("[" * 100_000, False),
        ("NaN", False),
        ("9" * 5_000, False),
        (ABSTENTION, False),
    ],
)
def test_tool_calls(output, expected):
    assert right(example(CALL, kind="tool_call"), output) is expected
    assert right(example("", kind="tool_call", call=json.loads(CALL)), output) is expected


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (ABSTENTION, True),
        ("i don’t know", True),
        ("I do not know the answer.", True),
        ("I'm not sure what the capital of Bulmont is.", True),
        ("I'm sorry, but I don't know. Let me know if you need more help!", True),
        ("There is no such country.", True),
        ("There is no country called Bulmont.", True),
        ("Sorry, I don't have any information about that.", True),
        ("The text does not say what Tom likes.", True),
        ("None of the tools can do that.", True),
        ("It is not possible to determine the answer.", True),
        ("It is not possible that it is Paris.", False),
        ("I don't know. 42", False),
        ("I don't know, but I think it is Paris.", False),
        ("I'm not sure, maybe Paris.", False),
        ("I'm not sure but Paris", False),
        ("There is no doubt that it is Paris.", False),
        ("Let me know if you need help.", False),
        ("I know.", False),
        ("", False),
    ],
)
def test_abstentions(output, expected):
    assert right(example("", kind="abstain"), output) is expected


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("def f(x):\n    return x + 1", True),
        ("Sure!\n```python\ndef f(x):\n    return x + 1\n```\nDone.", True),
        ("```\ndef f(x):\n    return x + 1", True),
        ("def f(x):\n    return x", False),
        ("import os; os._exit(0)", False),
        ("raise SystemExit", False),
        ("", False),
        ("def f(x):\n    return x + 1\n'''", False),
    ],
)
def test_code_answers(output, expected):
    assert right(example("", kind="code", tests=["assert f(1) == 2", "assert f(-1) == 0"]), output) is expected


def test_unknown_check_is_refused_with_the_example_id():
    bad_tests, bad_options = {"kind": "code", "tests": []}, {"kind": "choice", "options": "AB"}
    for check in ({"kind": "magic"}, {"kind": "code"}, bad_tests, bad_options):
        with pytest.raises(DataError, match="example id"):
            grade(example("a", **check), "a")
    for answer, kind in (("none", "numeric"), ("none", "tool_call"), ("zebra", "choice")):
        with pytest.raises(DataError, match="example id"):
            grade(example(answer, kind=kind), "a")


QUESTIONS = [
    example("Paris"),
    example("18", kind="numeric"),
    example("B", kind="choice", options=OPTIONS),
    example("B", kind="choice"),
    example(CALL, kind="tool_call"),
    example("", kind="abstain"),
]
PIECES = st.sampled_from([*'\nB(1,.-[{"½²\0\ud800', "```", "answer is ", "e9"])
OUTPUTS = st.one_of(st.text(), st.lists(PIECES, max_size=12).map("".join))


@given(OUTPUTS)
@settings(max_examples=300)
def test_graders_accept_any_output(output):
    for verdict in grade_all([(question, output) for question in QUESTIONS]):
        assert verdict.output == output
        assert isinstance(verdict.correct, bool)


@given(st.lists(OUTPUTS, min_size=20, max_size=20))
@settings(max_examples=3, deadline=None)
def test_code_grader_accepts_any_output(outputs):
    question = example("", kind="code", tests=["assert f() == 1"])
    assert not any(verdict.correct for verdict in grade_all([(question, output) for output in outputs]))


@given(
    st.decimals(allow_nan=False, allow_infinity=False, places=3),
    st.sampled_from(["{}", "it is {}.", "a 7 then ${}"]),
)
def test_number_in_a_sentence_is_extracted(number, frame):
    assert last_number(frame.format(f"{number:f}")) == number
    assert last_number(frame.format(f"{number:,f}")) == number


@given(st.text())
def test_normalisation_is_idempotent(text):
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(alphabet=st.characters(exclude_characters="`", codec="utf-8")))
def test_only_code_fences_are_stripped(code):
    assert strip_fences(code) == code
    assert strip_fences(f"text\n```python\n{code}\n```\nmore") == code


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON)
def test_json_equality_is_reflexive_and_symmetric(left, right):
    assert same_json(left, json.loads(json.dumps(left)))
    assert same_json(left, right) == same_json(right, left)


def test_reference_solutions_of_mbpp_pass_and_swapped_ones_fail():
    rows = json.loads(public_data("mbpp/sanitized-mbpp.json").read_text())[:120]
    rows = [row for row in rows if row["task_id"] != 123]  # needs seconds of CPU time
    questions = [example("", kind="code", tests=[*row["test_imports"], *row["test_list"]]) for row in rows]
    own = grade_all([(q, row["code"]) for q, row in zip(questions, rows, strict=True)])
    wrong = [(v.reason, row["task_id"]) for v, row in zip(own, rows, strict=True) if not v.correct]
    assert not wrong
    swapped = grade_all([(q, row["code"]) for q, row in zip(questions, rows[1:] + rows[:1], strict=True)])
    assert not any(v.correct for v in swapped)


def test_gsm8k_solutions_are_graded_by_their_last_number():
    rows = [json.loads(line) for line in public_data("gsm8k/test.jsonl").read_text().splitlines()]
    verdicts = grade_all([(example(row["answer"].split("####")[1], kind="numeric"), row["answer"]) for row in rows])
    assert all(v.correct for v in verdicts)
