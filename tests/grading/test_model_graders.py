"""Graders that ask a model: similarity of embeddings, and a judge."""

import json
from contextlib import closing

import pytest
from typer.testing import CliRunner

from cogumi.cli.main import app
from cogumi.core.errors import CogumiError, DataError
from cogumi.core.stage import Context
from cogumi.core.types import Example, Message, Request
from cogumi.data.load import Config, run
from cogumi.data.sources.survey import survey
from cogumi.evaluate.accuracy import ask
from cogumi.evaluate.grading_models import grading_models
from cogumi.evaluate.second_opinion import audit
from cogumi.grading.checks import check_problem
from cogumi.grading.graders import grade, grade_all
from cogumi.grading.model_graders import Models, judged, score_of
from support.encoder import Trigrams
from support.engines import opened
from support.scripted_server import begin, chunk, engine_at, scripted, send

ENCODER = Models(embed=Trigrams().embed)


def example(answer="The cat sat on the mat", **check):
    return Example("id", "d", 1, (Message("user", "What did {it} do?"),), answer, meta={"check": check})


def test_similarity_takes_the_most_similar_answer():
    one = example(kind="similarity", at_least=0.8)
    same, near, far = grade_all(
        [(one, "the cat sat on the mat"), (one, "<think>dog</think>The cat sat on a mat"), (one, "Quixotic zebu!")],
        ENCODER,
    )
    assert (same.correct, near.correct, far.correct) == (True, True, False)
    assert same.score == pytest.approx(1, abs=1e-6)
    assert same.score > near.score > 0.8 > far.score
    assert far.reason.startswith(f"similarity {far.score:.2f}, below 0.8: The cat")
    several = example(kind="similarity", at_least=0.99, answers=["nothing", "Quixotic zebu!"])
    assert grade(several, "quixotic zebu!", ENCODER).correct


def test_mixed_checks_keep_their_order():
    pairs = [
        (example("4", kind="numeric"), "It is 4"),
        (example(kind="similarity", at_least=0.9), "no"),
        (example(kind="exact"), "the cat sat on the mat"),
    ]
    assert [(v.grader, v.correct) for v in grade_all(pairs, ENCODER)] == [
        ("numeric", True),
        ("similarity", False),
        ("exact", True),
    ]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("7", 7),
        ("10", 10),
        ("7/10", 7),
        ("**8** / 10", 8),
        ("Score: 9", 9),
        ("The answer names 3 cities.\n**Score:** 6/10", 6),
        ("Rating = 4 out of 10, for 2 reasons", 4),
        ("I give it a 5 of 10.", 5),
        ("On the scale of 1-10 it is a 4 / 10", None),
        ("On a scale from 1 to 10: Score: 2", 2),
        ("<think>maybe 9</think>3", 3),
        ("It has 2 errors and 3 gaps", None),
        ("7.5", None),
        ("0", None),
        ("11", None),
        ("100", None),
        ("", None),
        ("good", None),
    ],
)
def test_scores_in_the_words_of_a_judge(text, score):
    assert score_of(text) == score


def answering(*texts):
    """A server that says these texts in turn."""
    left = list(texts)

    def behave(handler):
        begin(handler)
        send(handler, chunk(left.pop(0), "stop"))
        send(handler, "[DONE]")

    return scripted(behave)


def test_a_judge_on_a_server():
    with answering("Score: 9", "6/10", "who knows") as (url, bodies), engine_at(url, workers=1) as judge:
        one = example(kind="judge")
        verdicts = [
            grade(one, output, Models(judge=judge)) for output in ("It sat.", "It ran.", "<think>a</think>It {slept}.")
        ]
    assert [(v.correct, v.score) for v in verdicts] == [(True, 0.9), (False, 0.6), (False, 0.0)]
    assert [v.reason for v in verdicts] == ["", "the judge's score is 6, below 7", "the judge gave no score"]
    prompt = bodies[2]["messages"][0]["content"]
    assert all(part in prompt for part in ("What did {it} do?", "The cat sat on the mat", "\nIt {slept}.\n"))
    assert "think>" not in prompt
    with answering("5") as (url, _), engine_at(url) as judge:
        assert grade(example(kind="judge", least=5), "It ran.", Models(judge=judge)).correct


def test_a_local_judge_always_gives_a_score_unless_the_texts_exceed_its_context():
    with closing(opened(context=1024)) as judge:
        scores = judged([(example(), "It sat."), (example(), "x " * 3000), (example(), "It ran.")], judge)
        again = judged([(example(), "It ran.")], judge)
    assert [score in range(1, 11) for score in scores] == [True, False, True]
    assert scores[1] is None
    assert again == scores[2:]


def test_without_its_model_a_check_cannot_be_graded():
    with pytest.raises(DataError, match=r"'judge' asks a model: name one, .*--judge MODEL"):
        grade(example(kind="judge"), "x", ENCODER)
    with pytest.raises(DataError, match="'similarity' asks a sentence encoder: grade with `cogumi eval"):
        grade(example(kind="similarity", at_least=0.5), "x")
    with closing(opened()) as engine:
        questions = [Request(prompt=(7, 8), max_tokens=2)] * 2
        asked, failed = ask(engine, questions, [example(kind="judge"), example(kind="exact")])
    assert [one.verdict.grader for one in asked] == ["exact"]
    assert "name one" in failed[0]
    assert "lacks at_least" in check_problem({"kind": "similarity"})
    for least in (0, 11, 6.5, "7", []):
        assert "least of a check must be a whole number from 1 to 10" in check_problem(
            {"kind": "judge", "least": least}
        )


def test_a_build_refuses_rows_that_only_a_model_could_grade(tmp_path):
    rows = [{"question": f"q{i}?", "answer": "a", "check": {"kind": "judge"}} for i in range(3)]
    rows.append({"question": "q?", "answer": "a", "check": {"kind": "exact"}})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = survey([tmp_path / "a.jsonl"]).domains
    assert found.grader is None
    out = tmp_path / "out"
    out.mkdir()
    metrics = run(Config(files={"d": ["a.jsonl"]}), {}, out, Context(1, 1, tmp_path, lambda done, total, figures: None))
    assert (metrics["rows"], metrics["rejected"]) == (1, 3)
    reason = json.loads((out / "rejected.jsonl").read_text().splitlines()[0])
    assert reason["line"] == 1
    assert reason["reason"] == "a check of kind 'judge' asks a model, which no step of a build has"


def test_second_opinions_by_models(tmp_path):
    row = {"question": "What?", "answer": "The cat sat on the mat", "correct": False, "grader": "exact"}
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row | {"output": text}) + "\n" for text in ("a cat sat on the mat", "zebu")))
    found = audit(file, "similarity", 9, models=ENCODER).to_json()
    assert (found["compared"], [one["line"] for one in found["rows"]]) == (2, [1])
    words = ["data", "audit", str(file), "--by", "judge", "--json", "--judge"]
    with answering("9", "2") as (url, _):
        done = CliRunner().invoke(app, [*words, url, "--judge-model", "m"])
        assert json.loads(done.stdout)["only_second_right"] == 1
        for wrong in ([url], ["smollm2", "--judge-model", "m"]):
            assert "give both" in str(CliRunner().invoke(app, [*words, *wrong]).exception)
    with pytest.raises(CogumiError, match="give both"), grading_models(None, "m"):
        pass
