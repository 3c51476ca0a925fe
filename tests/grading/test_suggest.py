"""The grader of rows without one follows from their answers."""

import pytest

from cogumi.core.types import Example, Message
from cogumi.grading.checks import CHECKS, check_problem
from cogumi.grading.graders import grade
from cogumi.grading.suggest import SUGGESTED, check_of, suggested_grader

FREE = "It depends on many things, among them the weather, the season and the mood of the people who were asked."


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        (["7", "12", "-3.5"], "numeric"),
        (["$7", "12 %", "5 km"], "numeric"),
        (["He has 3 and 4. #### 7", "So 2 are left.\n#### 2"], "numeric"),
        (["A", "B", "(C)", "D."], "choice"),
        (["true", "false"] * 20, "choice"),
        (["Paris", "Oslo", "Lima"], "short_answer"),
        (['{"tool": "map", "args": {}}', '[{"tool": "map"}]'], "tool_call"),
        ([FREE, FREE + " Perhaps.", "yes"], None),
        ([], None),
    ],
)
def test_kind_of_answers(answers, kind):
    assert suggested_grader(answers) == kind


def test_every_suggested_kind_is_a_grader_that_accepts_its_own_answer():
    rows = {
        "exact": "blue",
        "short_answer": "Paris",
        "numeric": "so it is\n#### 7",
        "choice": "true",
        "tool_call": '{"tool": "x"}',
    }
    assert set(rows) == set(SUGGESTED) <= set(CHECKS)
    for kind, answer in rows.items():
        check = check_of(kind, answer, {"true", "false"})
        assert check_problem(dict(check)) is None
        example = Example("1", "d", 0, (Message("user", "q?"),), answer, meta={"check": check})
        assert grade(example, answer).correct
        assert not grade(example, "something else, 99").correct
