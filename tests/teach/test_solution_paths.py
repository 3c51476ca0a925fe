"""Stage `solution_paths`: several solutions of one question: correctness, equivalence, and the written rows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.core.errors import DataError
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example, Message
from cogumi.data.examples import example_id, split_path, write_examples
from cogumi.data.solutions import FILE, Solutions, write_solutions
from cogumi.grading.graders import grade_all
from cogumi.models.folders import Shape
from cogumi.teach import solution_paths
from cogumi.train import sft
from cogumi.train.loop import LoopConfig
from support import pico

CONTEXT = Context(3, 1, Path(), lambda done, total, figures: None)


def artifact(path):
    return Artifact("test", path, "0", {}, {})


def example(question, answer, check, domain="code", difficulty=4):
    messages = (Message("user", question),)
    return Example(example_id(domain, messages), domain, difficulty, messages, answer, "", {"check": check})


def adding(c, body="x + {c}"):
    tests = [f"assert f(0) == {c}", f"assert f(7) == {7 + c}"]
    answer = "def f(x):\n    return " + body.format(c=c)
    return example(f"adds {c}", answer, {"kind": "code", "tests": tests})


BELOW = example(
    "the numbers below 6",
    "def f(xs):\n    return [x for x in xs if x < 6]",
    {"kind": "code", "tests": ["assert f([1, 9, 4]) == [1, 4]", "assert f([8, 2]) == [2]"]},
)
NEVER = example(
    "the numbers both even and odd",
    "def f(xs):\n    return [x for x in xs if x % 2 == 0 and x % 2 == 1]",
    {"kind": "code", "tests": ["assert f([1, 9, 4]) == []"]},
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model that learned two programs for each of four questions, and one answer to another question."""
    root = tmp_path_factory.mktemp("paths")
    pico.make_tokenizer(root / "tokenizer")
    both = [adding(c, body) for c in (2, 3, 4, 5) for body in ("x + {c}", "{c} + x")]
    capital = example("capital of France", "Paris", {"kind": "exact"}, "facts")
    unknown = example("capital of Nowhere", "I don't know.", {"kind": "abstain"}, "facts")
    easy = example("capital of Spain", "Madrid", {"kind": "exact"}, "facts", difficulty=1)
    write_examples(split_path(root / "taught", "train"), [*both, capital])
    write_examples(split_path(root / "taught", "selection"), both)
    write_examples(split_path(root / "data", "train"), [*both[::2], capital, unknown, easy])
    (root / "model").mkdir()
    loop = LoopConfig(steps=150, batch=9, lr=0.01, muon_lr=0.02, evaluate_every=150, checkpoint_every=1000)
    inputs = {"examples": artifact(root / "taught"), "tokenizer": artifact(root / "tokenizer")}
    shape = Shape(hidden=32, layers=2, heads=1, feed_forward=64)
    sft.run(sft.Config(shape=shape, loop=loop), inputs, root / "model", CONTEXT)
    return root


def found(world, out, **config):
    out.mkdir(exist_ok=True)
    inputs = {"examples": artifact(world / "data"), "model": artifact(world / "model")}
    return solution_paths.run(solution_paths.Config(max_tokens=32, **config), inputs, out, CONTEXT)


def read_solutions(out):
    rows = [json.loads(line) for line in (out / FILE).read_text("utf-8").split("\n") if line]
    return [Solutions(row["id"], row["question"], tuple(row["paths"])) for row in rows]


def test_both_programs_of_a_question_are_found_once_and_are_correct(world, tmp_path):
    metrics = found(world, tmp_path, samples=40)
    rows = read_solutions(tmp_path)
    assert metrics["asked"] == 5  # neither the easy question nor the one without an answer
    code = metrics["by_domain"]["code"]
    assert code["with_2"] == 4 >= code["with_3"]
    assert metrics["by_domain"]["facts"]["paths"] == 1  # one correct text, however often it is sampled
    by_question = {e.question: e for e in rows}
    assert {"def f(x):\n    return x + 4", "def f(x):\n    return 4 + x"} <= set(by_question["adds 4"].answers)
    known = [*(adding(c) for c in (2, 3, 4, 5)), example("capital of France", "Paris", {"kind": "exact"}, "facts")]
    by_id = {e.id: e for e in known}
    taught = [replace(by_id[row.id], answer=answer) for row in rows for answer in row.answers]
    assert len(taught) == metrics["paths"] == len({(e.id, e.answer) for e in taught})
    assert all(verdict.correct for verdict in grade_all([(e, e.answer) for e in taught]))
    assert {e.domain for e in taught} == {"code", "facts"}


def test_stage_is_reproducible_and_stops_at_enough_solutions(world, tmp_path):
    for name in ("a", "b"):
        found(world, tmp_path / name, domains=("code",))
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    once = found(world, tmp_path / "c", paths=1, per_round=1, domains=("facts",))
    assert once["samples"] < solution_paths.Config().samples
    assert once["with_1"] == 1


def test_adapter_is_used_where_there_is_one(world, tmp_path):
    pico.make_adapter(tmp_path / "noise", world / "model", rank=2, scale=1.0)
    inputs = {"examples": artifact(world / "data"), "model": artifact(world / "model")}
    inputs["adapter_noise"] = artifact(tmp_path / "noise")
    metrics = solution_paths.run(solution_paths.Config(max_tokens=32, samples=4), inputs, tmp_path, CONTEXT)
    assert metrics["acceptance"] < found(world, tmp_path, samples=4)["acceptance"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("def f(x):\n    return x + 1", "def f(y):  # plus one\n  return (y+1)", True),
        ("def f(x):\n    return x + 1", 'def f(x):\n    """One more."""\n    return x + 1', True),
        ("def f(x):\n    return x + 1", "def f(x):\n    return 1 + x", False),
        ("def f(x, y):\n    return x - y", "def f(y, x):\n    return x - y", False),
        ("def f(x):\n    return sum(x)", "def f(x):\n    return max(x)", False),
        ("[x for x in xs]", "[y for y in xs]", True),
        ("[x for x in xs]", "[x for x in ys]", False),
        ("no program at all", "No program at  all.", True),
    ],
)
def test_programs_that_differ_in_layout_comments_or_names_are_equal(one, other, same):
    by_question = adding(1)
    assert (solution_paths.form(by_question, one) == solution_paths.form(by_question, other)) == same


@given(st.permutations(["a", "b", "c", "d"]))
@settings(max_examples=24, deadline=None)
def test_renamed_variables_do_not_make_another_solution(names):
    a, b, c, d = names
    code = f"def f({a}, {b}):\n    {c} = {a} * 2\n    return [{d} + {c} for {d} in {b}]"
    plain = "def f(a, b):\n    c = a * 2\n    return [d + c for d in b]"
    assert solution_paths.program_form(code) == solution_paths.program_form(plain)


def test_tool_calls_and_texts_are_compared_like_their_graders_do():
    call = example("?", '{"tool": "t", "args": {"a": 1, "b": 2}}', {"kind": "tool_call"}, "tools")
    assert solution_paths.form(call, '{"args": {"b": 2, "a": 1}, "tool": "t"}') == solution_paths.form(
        call, call.answer
    )
    text = example("?", "Paris", {"kind": "exact"})
    assert (
        solution_paths.form(text, " paris.")
        == solution_paths.form(text, "Paris")
        != solution_paths.form(text, "It is Paris")
    )


def test_programs_that_pass_their_tests_by_luck_are_rejected():
    outputs = {
        "def f(xs):\n    return [x for x in xs if x < 6]": True,
        "def f(xs):\n    return [x for x in xs if not x >= 6]": True,
        "def f(xs):\n    return [x for x in xs if x < 7]": False,
        "def f(xs):\n    return [x for x in xs if x < 5]": False,
    }
    pairs = [(BELOW, output) for output in outputs]
    assert all(verdict.correct for verdict in grade_all(pairs))  # the tests do not distinguish them
    assert solution_paths.agreeing(pairs, [True] * 4, probes=40) == list(outputs.values())
    assert solution_paths.agreeing(pairs, [True] * 4, probes=0) == [True] * 4


def test_constant_reference_outputs_do_not_confirm_a_program():
    wrong = "def f(xs):\n    return [x for x in xs if x > 3 and x < 2]"
    assert grade_all([(NEVER, wrong)])[0].correct
    assert solution_paths.agreeing([(NEVER, wrong), (NEVER, NEVER.answer)], [True, True], probes=40) == [False, False]


def test_without_a_program_to_compare_with_the_tests_decide():
    vague = replace(BELOW, answer="Filter the list.")
    assert solution_paths.agreeing([(vague, BELOW.answer)], [True], probes=40) == [True]
    no_numbers = example("?", "def f(s):\n    return s", {"kind": "code", "tests": ["assert f('a') == 'a'"]})
    assert solution_paths.agreeing([(no_numbers, no_numbers.answer)], [True], probes=40) == [True]


def test_unusable_inputs_are_refused(world, tmp_path):
    with pytest.raises(DataError, match=r"no training question of domain 'cod'; did you mean 'code'\?"):
        found(world, tmp_path, domains=("cod",))
    with pytest.raises(DataError, match=r"difficulty below 5; lower hard_from"):
        found(world, tmp_path, hard_from=5)


@given(st.lists(st.tuples(st.text(max_size=8), st.lists(st.text(max_size=9), max_size=4)), max_size=5))
@settings(max_examples=30, deadline=None)
def test_solutions_round_trip_through_a_file(tmp_path_factory, rows):
    out = tmp_path_factory.mktemp("rows")
    written = [Solutions(str(i), question, tuple(texts)) for i, (question, texts) in enumerate(rows)]
    write_solutions(out, written)
    assert read_solutions(out) == written
