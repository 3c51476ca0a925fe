"""Stage `synthesize` with a scripted writer and judge: what is kept, written again, refused, and resumed."""

import json
import re
from types import SimpleNamespace

import pytest

from cogumi.core.errors import DataError
from cogumi.core.types import Reply, Usage
from cogumi.data.examples import POOL, read_examples
from cogumi.teach import synthesize
from support.bundle import make_bundle
from support.pools import finished, run

GOOD = '{"correctness": 9, "clarity": 9, "difficulty": 8, "usefulness": 10}'


class Scripted:
    """An engine that answers by a function of prompt and seed; counts its requests."""

    def __init__(self, say):
        self.say, self.prompts, self.closed = say, [], False

    def generate(self, request):
        prompt = request.messages[-1].content
        self.prompts.append(prompt)
        return [SimpleNamespace(reply=Reply(self.say(prompt, request.seed), (), "stop", Usage(1, 1)))]

    def close(self):
        self.closed = True


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A function that makes `run` use scripted engines; returns them."""
    monkeypatch.setattr(synthesize, "final_reply", lambda events: events[-1].reply)

    def use(*says):
        engines = [Scripted(say) for say in says]
        waiting = list(engines)
        monkeypatch.setattr(synthesize, "LlamaEngine", lambda path, **options: waiting.pop(0))
        (tmp_path / "gguf").mkdir(exist_ok=True)
        gguf = finished(tmp_path / "gguf", "gguf", {})
        return engines, {"writer": gguf} | ({"judge": gguf} if len(says) > 1 else {})

    return use


def writer(prompt, seed):
    """Questions numbered by the seed, answers, and good scores."""
    if prompt.startswith("Write one question"):
        domain = re.search(r"about (\w+)", prompt)[1]
        return f"What is number {seed} of {domain}?"
    if prompt.startswith("Solve this"):
        return "A draft."
    if "Draft of an answer: A draft." in prompt:
        return "It lacks a reason. ANSWER: Because of that."
    return GOOD if "Score this pair" in prompt else "It is that."


CONFIG = {"domains": {"birds": "owls and others", "law": "contracts"}, "difficulties": (1, 5), "per_cell": 3}


def test_pairs_are_written_answered_and_scored(models, tmp_path):
    (engine,), inputs = models(writer)
    made = run("synthesize", inputs, tmp_path / "out", **CONFIG)
    found = read_examples(made.path / POOL)
    assert len(found) == made.metrics["rows"] == made.metrics["wanted"] == 12
    assert {(e.domain, e.difficulty) for e in found} == {("birds", 1), ("birds", 5), ("law", 1), ("law", 5)}
    assert {e.answer for e in found if e.difficulty == 1} == {"It is that."}
    assert {e.answer for e in found if e.difficulty == 5} == {"Because of that."}
    assert found[0].meta["scores"]["usefulness"] == 10
    assert "warnings" not in made.metrics
    assert engine.closed


def test_what_is_not_good_enough_is_written_again(models, tmp_path):
    def judge(prompt, seed):
        return GOOD if seed % 3 == 0 else GOOD.replace('"clarity": 9', '"clarity": 3') if seed % 3 == 1 else "Fine."

    _, inputs = models(writer, judge)
    made = run("synthesize", inputs, tmp_path / "out", **CONFIG, attempts=2)
    assert made.metrics["rows"] < made.metrics["wanted"]
    assert made.metrics["rejected"].keys() == {"clarity", "the judge gave no scores"}
    assert "pairs are missing after 2 attempts each" in made.metrics["warnings"][0]
    rejected = [json.loads(line) for line in (made.path / synthesize.REJECTED).read_text().splitlines()]
    assert len(rejected) == made.metrics["attempts"] - made.metrics["rows"]
    assert {one["reason"] for one in rejected} == {"clarity is 3, below 8", "the judge gave no scores"}


def test_repeated_questions_and_refusals_are_not_kept(models, tmp_path):
    def repeating(prompt, seed):
        if prompt.startswith("Write one question"):
            return "What is an owl?" if seed % 2 else "Who knows it all?"
        return "I don't know." if prompt == "Who knows it all?" else writer(prompt, seed)

    _, inputs = models(repeating)
    made = run("synthesize", inputs, tmp_path / "out", domains={"birds": "x"}, difficulties=(1,), per_cell=4)
    assert made.metrics["rows"] == 1
    assert made.metrics["rejected"].keys() == {"the question was written before", "no answer was written"}


def test_finished_cells_are_not_written_again(models, tmp_path):
    calls = []

    def stops(prompt, seed):
        calls.append(prompt)
        if len(calls) > 14:
            raise KeyboardInterrupt
        return writer(prompt, seed)

    _, inputs = models(stops)
    with pytest.raises(KeyboardInterrupt):
        run("synthesize", inputs, tmp_path / "out", **CONFIG, slots=1)
    (engine,), inputs = models(writer)
    made = run("synthesize", inputs, tmp_path / "out", **CONFIG, slots=1)
    assert made.metrics["rows"] == 12
    assert not any("birds" in prompt and "of 5: a child" in prompt for prompt in engine.prompts)
    _, inputs = models(writer)
    whole = run("synthesize", inputs, tmp_path / "whole", **CONFIG, slots=1)
    assert (whole.path / POOL).read_bytes() == (made.path / POOL).read_bytes()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, [9, 9, 8, 10]),
        (f"```json\n{GOOD}\n```", [9, 9, 8, 10]),
        (f"Here: {GOOD} Well done.", [9, 9, 8, 10]),
        (GOOD.replace("10", "11"), None),
        ('{"correctness": 9}', None),
        ("9, 9, 9, 9", None),
        ("", None),
    ],
)
def test_scores_in_a_judges_words(text, expected):
    found = synthesize.parsed_scores(text)
    assert (found and list(found.values())) == expected


def test_nothing_good_enough_and_bad_levels_are_errors(models, tmp_path):
    _, inputs = models(writer, lambda prompt, seed: "No.")
    with pytest.raises(DataError, match="no pair is good enough: the judge gave no scores"):
        run("synthesize", inputs, tmp_path / "out", **CONFIG)
    with pytest.raises(DataError, match="difficulty 6 is not a level"):
        run("synthesize", inputs, tmp_path / "bad", domains={"a": "b"}, difficulties=(6,))


def test_a_real_model_writes(tmp_path):
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").symlink_to(make_bundle(tmp_path) / "base.gguf")
    inputs = {"writer": finished(tmp_path / "gguf", "gguf", {})}
    with pytest.raises(DataError, match="no pair is good enough"):
        run(
            "synthesize",
            inputs,
            tmp_path / "out",
            domains={"a": "b"},
            difficulties=(1,),
            per_cell=2,
            attempts=1,
            max_tokens=16,
        )
    assert len((tmp_path / "out" / synthesize.REJECTED).read_text().splitlines()) == 2
