"""The suite `cloze` on a pico bundle: accuracy from scores that the test computes itself, and the work it takes."""

import json
import math
from contextlib import closing

import pytest

from cogumi.bundle.format import open_bundle
from cogumi.core.errors import DataError
from cogumi.core.types import Request
from cogumi.data.sources.multiple_choice import ChoiceQuestion
from cogumi.engine.llama.binding.context import Context
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.evaluate.suite import Task
from cogumi.evaluate.suites import cloze
from support.bundle import make_bundle
from support.cli import cogumi
from support.public_data import public_data

WORDS = (
    "fox",
    "dog",
    "Tom",
    "Ann",
    "Bob",
    "tallest",
    "quick",
    "brown",
    "lazy",
    "jumps",
    "over",
    "watch",
    "Paris",
    "day",
)
ROWS = 12


def line(i, count):
    """A question about three words with `count` choices of different lengths; the first is right."""
    choices = [" ".join(WORDS[(i + 3 * k + j) % len(WORDS)] for j in range(1 + (i + k) % 3)) for k in range(count)]
    question = f"Who of {WORDS[i]}, {WORDS[-i]} and {WORDS[2 * i % 7]} is the tallest of all?"
    return {"question": question, "answer": "A", "check": {"kind": "choice", "options": choices}}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("cloze"))


@pytest.fixture(scope="module")
def rows():
    return [line(i, 2 + 2 * (i % 2)) for i in range(ROWS)]


@pytest.fixture
def data(rows, tmp_path):
    """A folder with two files: the rows, and one row that has no choices before the first three of them."""
    (tmp_path / "mine").mkdir()
    for name, lines in (("a", rows), ("b", [{"question": "1 + 1?", "answer": "2"}, *rows[:3]])):
        (tmp_path / "mine" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "mine"


def expected(bundle, rows):
    """The outcomes of both measures for every row, from scores of single texts."""
    found = []
    with closing(LlamaEngine(open_bundle(bundle).base, threads=1, context=256)) as engine:
        for row in rows:
            request, choices = Request(prompt=f"Question: {row['question']}\nAnswer:"), row["check"]["options"]
            nats = [engine.score(request, f" {choice}").nats for choice in choices]
            shares = [x / len(choice) for x, choice in zip(nats, choices, strict=True)]
            found.append((nats[0] == min(nats), shares[0] == min(shares)))
    return found


def test_accuracy_follows_from_the_likelihood_of_each_choice(bundle, rows, data):
    shares = []
    found = cloze.run(Task(bundle, data, threads=1, progress=lambda done, total, _: shares.append((done, total))))
    outcomes = expected(bundle, rows)
    by_name = {figure.name: figure for figure in found.figures}
    assert list(by_name) == ["mine/a acc", "mine/a acc_norm", "mine/b acc", "mine/b acc_norm"]
    for name, of in (("mine/a", outcomes), ("mine/b", outcomes[:3])):
        for at, measure in enumerate(("acc", "acc_norm")):
            assert by_name[f"{name} {measure}"].value == pytest.approx(sum(o[at] for o in of) / len(of))
    assert len({figure.value for figure in found.figures}) > 1, "the rows do not tell the measures apart"
    assert by_name["mine/a acc"].low < by_name["mine/a acc"].value < by_name["mine/a acc"].high
    assert by_name["mine/a acc"].note.endswith(f"n {ROWS}, guessing 0.375")  # half of the rows have two choices
    assert found.facts["mine/b"] == "1 rows without choices, or without a right one, are left out"
    assert "mine/a" not in found.facts
    assert shares[-1] == (ROWS + 3, ROWS + 3)


def test_standard_error_on_hand_computed_examples():
    assert cloze.standard_error(0.5, 5) == 0.25
    assert cloze.standard_error(1.0, 10) == 0
    assert math.isnan(cloze.standard_error(1.0, 1))


def test_a_question_is_read_once_for_all_its_choices(bundle, rows, data, monkeypatch):
    decode, lengths = Context.decode, []

    def counted(context, batch, **options):
        lengths.append(sum(len(row.tokens) for row in batch))
        return decode(context, batch, **options)

    with closing(LlamaEngine(open_bundle(bundle).base, threads=1, context=256)) as engine:
        question, encode = rows[1], engine.tokenizer.encode
        prompt = len(encode(f"Question: {question['question']}\nAnswer:"))
        answers = [len(encode(f" {choice}")) for choice in question["check"]["options"]]
        monkeypatch.setattr(Context, "decode", counted)
        cloze.picks(engine, ChoiceQuestion(question["question"], tuple(question["check"]["options"]), 0))
    assert sum(lengths) <= prompt + sum(answers) + len(answers)  # the last token of the prompt predicts each answer


def test_limit_counts_rows_of_each_file(data):
    found = cloze.read_rows(data, 2)
    assert [(rows.name, len(rows.questions), rows.others) for rows in found] == [("mine/a", 2, 0), ("mine/b", 1, 1)]


def test_file_without_choices_is_refused(bundle, tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text(json.dumps({"question": "1 + 1?", "answer": "2"}))
    with pytest.raises(DataError, match=r"plain.jsonl has no row with choices; docs/your-data.md"):
        cloze.run(Task(bundle, path))
    with pytest.raises(DataError, match="cannot be read"):
        cloze.run(Task(bundle, tmp_path / "missing.jsonl"))


def test_command_prints_a_table_or_json_and_stores_the_figures(bundle, data, tmp_path):
    words = ("eval", bundle, "--suite", "cloze", "--data", data / "a.jsonl", "--limit", 5)
    shown = cogumi(*words).stdout
    assert "mine/a acc_norm" in shown
    assert "no chat template" in shown
    found = json.loads(cogumi(*words, "--json", "--out", tmp_path / "out").stdout)
    assert found["figures"][0]["note"].endswith("n 5, guessing 0.400")
    assert json.loads((tmp_path / "out" / "cloze.json").read_text()) == found


def test_public_file_is_measured(bundle):
    path = public_data("llm_adapters_eval/dataset/piqa/test.json")
    found = cloze.run(Task(bundle, path, limit=4, threads=1))
    assert [figure.name for figure in found.figures] == ["piqa/test acc", "piqa/test acc_norm"]
    assert found.figures[0].note.endswith("n 4, guessing 0.500")
