"""The graders that `cogumi eval` chooses for rows without a check."""

import pytest

from cogumi.core.types import Example, Message
from cogumi.evaluate.accuracy import with_checks
from cogumi.grading.graders import grade


def example(answer, domain="math", **meta):
    return Example(answer, domain, 0, (Message("user", "?"),), answer, "test", meta)


@pytest.mark.parametrize(
    ("answers", "kind", "right", "wrong"),
    [
        (["11", "13"], "numeric", "13 - 2 = 11.", "13 - 2 = 12."),
        (["Oslo", "Lima"], "short_answer", "The capital is Oslo.", "It is Bergen."),
        (["a long text of many words that no grader can judge by itself"] * 2, "exact", "", "something"),
    ],
)
def test_rows_without_a_check_are_graded_by_what_fits_their_answers(answers, kind, right, wrong):
    found, kinds = with_checks([example(answer) for answer in answers])
    assert kinds == {"math": kind}
    assert grade(found[0], right or answers[0]).correct
    assert not grade(found[0], wrong).correct


def test_own_checks_are_kept_and_do_not_decide_for_others():
    rows = [example("11", check={"kind": "exact"}), example("a free text that is long enough to be no short answer")]
    found, kinds = with_checks(rows)
    assert (found[0], kinds) == (rows[0], {"math": "exact"})
    assert with_checks(rows[:1]) == (rows[:1], {})
