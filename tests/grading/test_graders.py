"""Graders on equivalent, wrong and arbitrary outputs, and on reference answers of public benchmarks."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.core.errors import DataError
from cogumi.core.text import normalise, strip_fences
from cogumi.core.types import ABSTENTION, Example, Message
from cogumi.grading.graders import grade, grade_all
from cogumi.grading.overlap import rouge_l
from support.public_data import public_data

OPTIONS = ["a cat", "a dog", "none of these"]
CALL = '{"tool": "add", "args": {"a": 1, "b": [true, "x"]}}'


def example(answer, **check):
    return Example("id", "d", 1, (Message("user", "q"),), answer, meta={"check": check} if check else {})


def right(question, output):
    verdict = grade(question, output)
    assert verdict.score == float(verdict.correct) or verdict.grader in ("constraints", "f1", "rouge_l")
    assert verdict.correct != bool(verdict.reason)
    return verdict.correct


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("Paris", True),
        ("paris.", True),
        (' "Paris" \n', True),
        ("\u201cParis\u201d", True),
        ("Paris\u2026", True),
        ("<think>hm</think>\nParis", True),
        ("Paris, France", False),
        ("", False),
    ],
)
def test_exact_match(output, expected):
    assert right(example("Paris"), output) is expected


@pytest.mark.parametrize(
    ("answer", "output", "expected"),
    [
        ("x2", "x\u00b2", False),
        ("x\u00b2", "X\u00b2", True),
        ("H\u2082O", "H2O", False),
        ("!", "", False),
        (".", "!", False),
        ("!", "!", True),
        ('"', "", False),
        ("New York", "New\u00a0York", True),
        ("Stra\u00dfe", "STRASSE", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("it's", "It\u2019s", True),
        ("\ufb01ve", "five", True),
    ],
)
def test_exact_match_of_unusual_texts(answer, output, expected):
    assert right(example(answer), output) is expected


@pytest.mark.parametrize(
    ("kind", "output", "score"),
    [
        ("f1", "The cat sat.", 1.0),
        ("f1", "cat", 2 / 3),
        ("f1", "dog", 0.0),
        ("f1", "", 0.0),
        ("rouge_l", "the cat sat", 1.0),
        ("rouge_l", "sat cat the", 1 / 3),
        ("rouge_l", "the big cat sat", 6 / 7),
    ],
)
def test_scores_by_shared_words(kind, output, score):
    verdict = grade(example("the cat sat", kind=kind, at_least=0.8), output)
    assert verdict.score == pytest.approx(score)
    assert verdict.correct == (score >= 0.8)


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_longest_common_subsequence(one, other):
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    wanted = 2 * table[-1][-1] / (len(one) + len(other)) if one and other else float(one == other)
    assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(wanted)


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


@pytest.mark.parametrize(
    ("answer", "output", "expected"),
    [
        (r"$\frac{\sqrt{3}}{2}$", r"So the result is $\frac{\sqrt 3}{2}$.", True),
        (r"$\frac{\sqrt{3}}{2}$", r"\boxed{\frac{\sqrt{2}}{2}}", False),
        (r"$x^2 + 2x + 1$", r"$(x+1)^2$", True),
        (r"$(1, 2]$", r"\boxed{(1,2]}", True),
        (r"$(1, 2]$", r"\boxed{[1,2]}", False),
        (r"$3\pi$", "none", False),
        (r"$3\pi$", r"$10^{10^{10^{10}}}$", False),
    ],
)
def test_formulas(answer, output, expected):
    pytest.importorskip("math_verify")
    assert right(example(answer, kind="math"), output) is expected


RULES = {
    "words": ({"least": 2, "most": 3}, ["Hello there", "It's well-known now"], ["Hello", "one two three four"]),
    "sentences": ({"least": 2, "most": 2}, ["One. Two!", "One?\nTwo"], ["One.", "1. 2. 3."]),
    "lines": ({"least": 2, "most": 2}, ["a\nb"], ["a", "a\nb\nc"]),
    "bullets": ({"least": 2, "most": 9}, ["- a\n* b", "1. a\n2) b"], ["- a", "a - b - c"]),
    "contains": ({"word": "cat"}, ["A Cat."], ["catalogue"]),
    "excludes": ({"word": "cat"}, ["catalogue"], ["A cat"]),
    "times": ({"word": "a", "count": 2}, ["a b A"], ["a", "a a a"]),
    "without": ({"letters": "ez"}, ["Fish"], ["Eel"]),
    "lower": ({}, ["all small"], ["Not", "123"]),
    "upper": ({}, ["ALL BIG"], ["Not", "123"]),
    "begins": ({"text": "Dear"}, ["dear Ann"], ["My dear"]),
    "ends": ({"text": "Bye!"}, ["So, bye."], ["Bye, Ann"]),
    "json": ({}, ['{"a": 1}', "```json\n[1]\n```"], ["{a: 1}", "[" * 9999]),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_of_a_text(name):
    arguments, kept, not_kept = RULES[name]
    question = example("any", kind="constraints", rules=[{"rule": name, **arguments}])
    assert all(right(question, output) for output in kept)
    assert not any(right(question, output) for output in [*not_kept, "", " "])
    for bad in ([], [{"rule": "rhyme"}], [{"rule": name, **dict.fromkeys(arguments, None)}] if arguments else "x"):
        with pytest.raises(DataError, match="rule"):
            grade(example("any", kind="constraints", rules=bad), "x")


def test_the_share_of_rules_kept_is_the_score():
    rules = [{"rule": "lower"}, {"rule": "contains", "word": "cat"}]
    assert grade(example("any", kind="constraints", rules=rules), "A cat").score == 0.5


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


@given(st.text())
def test_normalisation_is_idempotent(text):
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(alphabet=st.characters(exclude_characters="`", codec="utf-8")))
def test_only_code_fences_are_stripped(code):
    assert strip_fences(code) == code
    assert strip_fences(f"text\n```python\n{code}\n```\nmore") == code


def test_reference_solutions_of_mbpp_pass_and_swapped_ones_fail():
    rows = json.loads(public_data("mbpp/sanitized-mbpp.json").read_text())[:120]
    rows = [row for row in rows if row["task_id"] != 123]  # needs seconds of CPU time
    questions = [example("", kind="code", tests=[*row["test_imports"], *row["test_list"]]) for row in rows]
    own = grade_all([(q, row["code"]) for q, row in zip(questions, rows, strict=True)])
    wrong = [(v.reason, row["task_id"]) for v, row in zip(own, rows, strict=True) if not v.correct]
    assert not wrong
    swapped = grade_all([(q, row["code"]) for q, row in zip(questions, rows[1:] + rows[:1], strict=True)])
    assert not any(v.correct for v in swapped)
