"""`cogumi data look`: what it prints for good, bad and foreign files."""

import json

import pytest
from typer.testing import CliRunner

from cogumi.cli.main import app
from cogumi.core.errors import DataError
from support.encoder import Trigrams


def look(*words):
    return CliRunner().invoke(app, ["data", "look", *map(str, words)], env={"COLUMNS": "100"})


@pytest.fixture
def files(tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}", "colour": "red"} for i in range(40)]
    bad = [{"question": "x"}, {"size": 3}, {"question": "1 + 1?", "answer": "#### 2"}]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *bad]) + "broken\n")
    (tmp_path / "exam.csv").write_text("Aufgabe,Antwort\nCapital of Chad?,N'Djamena\nCapital of Peru?,Lima\n")
    return tmp_path


def test_table_and_details(files):
    done = look(files / "sums.jsonl")
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines()[:6])) <= 100
    assert "question" in done.stdout
    assert "numeric" in done.stdout
    assert "first: 0 + 1? -> #### 1" in done.stdout
    assert "rejected 1: there is no answer" in done.stdout
    assert "there is no answer: give one of answer" in done.stdout
    assert "the row has 'question' (sums.jsonl:41)" in done.stdout
    assert "(sums.jsonl:44)" in done.stdout
    assert "not used: colour (40)" in done.stdout


def test_json_has_every_figure(files):
    (found,) = json.loads(look(files / "sums.jsonl", "--json").stdout)
    assert (found["rows"], found["rejected"], found["repeated_questions"]) == (41, 3, 1)
    assert found["forms"] == {"question": 41}
    assert found["own_checks"] == {"numeric": 41}
    assert {reason["rows"] for reason in found["reasons"]} == {1}
    assert found["unused_columns"] == {"colour": 40}
    assert found["question_words"]["0.5"] == 3


def test_other_columns_are_named(files):
    (unread,) = json.loads(look(files / "exam.csv", "--json").stdout)
    assert unread["rows"] == 0
    assert "no form fits a row with 'Aufgabe', 'Antwort'" in unread["reasons"][0]["first"]
    words = ["--column", "question=Aufgabe", "--column", "answer=Antwort", "--json"]
    (found,) = json.loads(look(files / "exam.csv", *words).stdout)
    assert (found["rows"], found["grader"]) == (2, "short_answer")


def test_languages_near_duplicates_and_a_picture(tmp_path):
    english = "The old river flows from the mountains to the sea and passes three towns on its long way"
    german = "Der alte Fluss kommt aus den Bergen und zieht an drei kleinen Orten vorbei, bevor er das Meer erreicht"
    texts = [english, english + "!", german, "12 + 34"]
    rows = [{"question": text, "answer": "yes"} for text in [*texts, english]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = look(tmp_path / "a.jsonl", "--picture", tmp_path / "a.png")
    assert "languages of the first 5: en 60%, de 20%, unknown 20%" in done.stdout
    assert "near-duplicates among the first 5: 2" in done.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (found,) = json.loads(look(tmp_path / "a.jsonl", "--json").stdout)
    assert (found["languages"], found["near_duplicates"]) == ({"en": 3, "de": 1, "unknown": 1}, 2)
    assert (found["repeated_questions"], found["looked_at"]) == (1, 5)
    (tmp_path / "empty.jsonl").write_text("")
    done = look(tmp_path / "empty.jsonl", tmp_path / "a.jsonl", "--picture", tmp_path / "two.png", "--json")
    assert [one["near_duplicates"] for one in json.loads(done.stdout)] == [0, 2]
    assert (tmp_path / "two.png").is_file()


def test_groups_of_questions(tmp_path, monkeypatch):
    monkeypatch.setattr("cogumi.evaluate.suites.minilm.cached_embedder", Trigrams)
    asked = [f"Calculate the product of {i} and {i + 1}" for i in range(40)]
    asked += [f"Translate this French sentence please: {'oui ' * (1 + i % 3)}" for i in range(20)]
    rows = [{"question": text, "answer": "yes"} for text in asked]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "few.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "none.jsonl").write_text("")
    done = look(*(tmp_path / name for name in ("a.jsonl", "few.jsonl", "none.jsonl")), "--groups", "--json")
    found, few, none = (one["groups"] for one in json.loads(done.stdout))
    assert sum(group["share"] for group in found) == pytest.approx(1)
    about = {"calculate" in group["words"] for group in found}
    assert about == {True, False}
    assert all(("calculate" in group["words"]) == ("calculate" in group["example"]) for group in found)
    assert [group["share"] for group in found] == sorted((group["share"] for group in found), reverse=True)
    assert few == none == []
    assert "calculate" in look(tmp_path / "a.jsonl", "--groups").stdout.split("group of ")[1]


def test_bad_options_and_files(files):
    assert "is not of the form question=Problem" in look(files / "exam.csv", "--column", "question").output
    for words in (["--form", "alpca"], ["--layout", "xls"], ["--column", "question=Problem"], []):
        path = files / ("exam.csv" if words else "missing.jsonl")
        assert isinstance(look(path, *words).exception, DataError)
