"""Tool calls in every usual shape, and BFCL's possible answers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi.core.types import Example, Message
from cogumi.grading.graders import grade, problem_of
from cogumi.grading.tool_calls import same_json
from support.public_data import public_data

CALL = '{"tool": "f", "args": {"a": 1}}'
OTHER = '{"tool": "g", "args": {}}'


def example(answer, **check):
    return Example("id", "d", 1, (Message("user", "q"),), answer, meta={"check": {"kind": "tool_call", **check}})


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (CALL, True),
        (f"[{CALL}]", True),
        ('{"args": {"a": 1.0}, "tool": "f"}', True),
        ('{"name": "f", "arguments": {"a": 1}}', True),
        ('{"name": "f", "parameters": {"a": 1}}', True),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', True),
        ('{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', True),
        ('{"tool_calls": [{"function": {"name": "f", "arguments": "{\\"a\\": 1}"}}]}', True),
        (f"<tool_call>\n{CALL}\n</tool_call>", True),
        (f"```json\n{CALL}\n```", True),
        (f"Sure! [One moment] {CALL} Done.", True),
        (f"<think>{OTHER}</think>{CALL}", True),
        (f"{CALL} and {CALL}", False),
        (f"[{CALL}, {OTHER}]", False),
        (CALL[:-1], False),
        ('{"tool": "f", "args": {"a": "1"}}', False),
        ('{"tool": "f", "args": {"a": true}}', False),
        ('{"tool": "f", "args": {"a": 1, "b": 2}}', False),
        ('{"tool": "f", "args": {"a": 2, "a": 1}}', False),
        ('{"tool": "f", "args": {"a": NaN}}', False),
        ('{"tool": "f", "args": [1]}', False),
        ("I would call f with a=1.", False),
        ("[" * 100_000, False),
        ("[ " * 50_000 + "x", False),
        ("", False),
    ],
)
def test_shapes_of_a_call(output, expected):
    assert grade(example(CALL), output).correct is expected
    assert grade(example("", call=json.loads(CALL)), output).correct is expected


def test_parallel_calls_may_have_any_order_where_the_check_says_so():
    both, reverse = f"[{CALL}, {OTHER}]", f"{OTHER}\n{CALL}"
    assert not grade(example(both), reverse).correct
    assert grade(example(both, ordered=False), reverse).correct
    assert not grade(example(both, ordered=False), f"{CALL}{CALL}").correct


def test_no_call_can_be_the_right_answer():
    assert grade(example("[]"), "None of the tools fits.").correct
    assert not grade(example("[]"), CALL).correct


POSSIBLE = [
    {"play": {"artist": ["Maroon 5", "maroon five"], "minutes": [15], "loud": [True, ""]}},
    {"play": {"artist": ["ABBA"], "minutes": [20, "20"]}},
]


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([("maroon-5", 15, None), ("abba", 20, None)], True),
        ([("ABBA", "20", None), ("Maroon 5", 15.0, True)], True),
        ([("ABBA", 20, None), ("Maroon 5", 15, False)], False),
        ([("ABBA", 20, None), ("ABBA", 20, None)], False),
        ([("ABBA", 20, None)], False),
        ([("ABBA", 20, True), ("Maroon 5", 15, None)], False),
    ],
)
def test_possible_answers_as_bfcl_writes_them(calls, expected):
    names = ("artist", "minutes", "loud")
    made = [
        {"name": "play", "arguments": {k: v for k, v in zip(names, c, strict=True) if v is not None}} for c in calls
    ]
    assert grade(example("", possible=POSSIBLE), json.dumps(made)).correct is expected


def test_bad_checks_are_named():
    assert "possible" in problem_of(example("", possible=[{"f": {"a": 1}}]))
    assert "ordered" in problem_of(example(CALL, ordered="yes"))
    for answer in ("none", '{"a": 1}', "3"):
        assert "tool call" in problem_of(example(answer))


def first(values):
    """A value that BFCL allows: the first of a list, in objects and lists too."""
    value = values[0] if isinstance(values, list) and values else values
    if isinstance(value, dict):
        found = {name: first(inner) for name, inner in value.items()}
        return {name: inner for name, inner in found.items() if inner != ""}
    return [first([inner]) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["simple_python", "multiple", "parallel", "parallel_multiple", "live_multiple"])
def test_possible_answers_of_the_public_set(name):
    lines = public_data(f"bfcl/possible_answer/BFCL_v4_{name}.json").read_text().splitlines()
    for row in map(json.loads, lines):
        question = example("", possible=row["ground_truth"])
        calls = [
            {"name": tool, "arguments": first([arguments])}
            for call in row["ground_truth"]
            for tool, arguments in call.items()
        ]
        assert grade(question, json.dumps(calls)).correct, row["id"]
        assert not grade(question, json.dumps(calls[:-1])).correct
        calls[-1]["name"] += "_"
        assert not grade(question, json.dumps(calls)).correct


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(VALUES)
def test_a_value_equals_itself_after_json(value):
    assert same_json(value, json.loads(json.dumps(value)))


@given(st.text())
def test_any_text_is_accepted(text):
    grade(example(CALL), text)
