"""Common behaviour of all suites, and the honesty suite on a pico bundle with questions of a user."""

import json

import numpy as np
import pytest

from cogumi.cli.console import findings
from cogumi.core.errors import CogumiError
from cogumi.core.types import ABSTENTION
from cogumi.evaluate.suite import SUITES, Figure, Task, suite
from cogumi.evaluate.suites import honesty
from support.bundle import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("honesty"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Forty questions; every fifth is unanswerable."""
    rows = []
    for i in range(40):
        check = {"kind": "abstain"} if i % 5 == 0 else {"kind": "exact"}
        answer = ABSTENTION if i % 5 == 0 else str(i)
        asked = [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": asked, "domain": "math", "difficulty": 1 + i % 5, "check": check})
    path = tmp_path_factory.mktemp("questions") / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_is_registered_and_names_its_missing_inputs(name):
    assert callable(suite(name).run)
    if name not in ("learning", "training"):  # these need no input
        with pytest.raises(CogumiError, match=r"name|give|build|needs"):
            suite(name).run(Task())


def test_goals_are_compared_with_their_bounds():
    assert Figure("x", 0.85, ">= 0.85").met
    assert not Figure("x", 0.84, ">= 0.85").met
    assert not Figure("x", 0.02, "< 0.02").met
    assert Figure("x", None, "< 0.02").met is None
    assert Figure("x", 1.0).met is None


def test_honesty_on_questions_of_a_user(bundle, questions, tmp_path):
    found = honesty.run(Task(bundle, questions, tmp_path / "out", seed=1))
    figures = {figure.name: figure for figure in found.figures}
    assert {"auroc", "ece", "brier", "aurc", "unanswerable_accepted", "hard_called_easy"} <= set(figures)
    assert found.facts["questions"] == found.facts["judged"] == 40
    assert 0 <= figures["ece"].value <= 1
    assert all(path.stat().st_size > 5_000 for path in found.pictures)
    assert len(found.pictures) == 3
    json.dumps(findings("honesty", found), allow_nan=False)


def test_bundle_without_a_world_needs_a_question_file(bundle):
    with pytest.raises(CogumiError, match="--data"):
        honesty.run(Task(bundle))


def test_bounds_contain_the_estimates():
    draw = np.random.default_rng(0)
    values = draw.normal(3.0, 1.0, 400)
    low, high = honesty.resampled(lambda index: float(values[index].mean()), 400, draw)
    assert low < values.mean() < high
    assert high - low == pytest.approx(4 / np.sqrt(400), rel=0.2)
