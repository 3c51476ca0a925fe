"""A second opinion on verdicts: differences are found, listed and shown."""

import json

import pytest
from typer.testing import CliRunner

from cogumi.cli.main import app
from cogumi.core.errors import DataError
from cogumi.evaluate.second_opinion import METHODS, audit
from cogumi.grading.model_graders import MODEL_CHECKS


def row(answer, output, correct, grader="exact"):
    return {"question": "What?", "answer": answer, "output": output, "correct": correct, "grader": grader}


ROWS = [
    row("Paris", "Paris", True),
    row("Paris", "It is Paris.", False),
    row("Paris", "Rome", False),
    row("Paris", "Rome", True),
    row("!", "!", True),
]


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    return path


def test_differences_are_found(answers):
    found = audit(answers, "short_answer", 100).to_json()
    assert [one["line"] for one in found["rows"]] == [2, 4]
    figures = ("compared", "skipped", "differences", "only_first_right", "only_second_right")
    assert [found[name] for name in figures] == [4, 1, 2, 1, 1]
    low, high = found["interval"]
    assert low < found["share"] == 0.5 < high
    assert audit(answers, "short_answer", 2, seed=1).compared <= 2


@pytest.mark.parametrize("method", [name for name in METHODS if name not in MODEL_CHECKS])
def test_every_method_agrees_with_itself(method, tmp_path):
    texts = {"numeric": "12", "choice": "B", "tool_call": '{"tool": "f", "args": {}}'}
    text = texts.get(method, "Paris")
    (tmp_path / "a.jsonl").write_text(json.dumps(row(text, text, True, method)) + "\n")
    assert audit(tmp_path / "a.jsonl", method, 9).differences == []


def test_table_and_bad_input(answers, tmp_path):
    done = CliRunner().invoke(app, ["data", "audit", str(answers), "--by", "short_answer"], env={"COLUMNS": "100"})
    assert done.exit_code == 0
    assert "2 (50.0%" in done.stdout
    assert "It is Paris." in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    with pytest.raises(DataError, match="is not a method of a second opinion"):
        audit(answers, "feeling", 9)
    with pytest.raises(DataError, match="can be graded by 'numeric'"):
        audit(answers, "numeric", 9)
    (tmp_path / "plain.jsonl").write_text('{"question": "x"}\n')
    for path in (tmp_path / "plain.jsonl", tmp_path / "missing.jsonl"):
        with pytest.raises(DataError, match=r"holds no graded answers|cannot be read"):
            audit(path, "f1", 9)
