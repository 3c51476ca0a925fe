"""The base's answers and readings: equal to asking it directly, and resumed where a run was killed."""

import numpy as np
import pytest

from cogumi.compress.gguf.export import export_model
from cogumi.core.errors import DataError
from cogumi.core.stage import CHECKPOINT, Context
from cogumi.core.types import Artifact, Example, Message, Request
from cogumi.data.examples import SPLITS, split_path, write_examples
from cogumi.data.responses import READINGS, read_readings, read_responses
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply
from cogumi.teach import respond
from support.pico import make_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("respond")
    (root / "base").mkdir()
    export_model(make_model(root / "model"), root / "base" / "model.gguf")
    examples = [Example(f"e{i}", "math", 0, (Message("user", f"What is {i} + {i % 7}?"),), "x") for i in range(25)]
    for name in SPLITS:
        write_examples(split_path(root / "data", name), examples if name == "train" else [])
    return {
        "examples": Artifact("examples", root / "data", "data"),
        "model": Artifact("gguf", root / "base", "base"),
    }, examples


def answered(inputs, out, monkeypatch, chunk=10, stop=None, **config):
    """Run the stage; with `stop`, fail at that progress report."""
    monkeypatch.setattr(respond, "CHUNK", chunk)
    monkeypatch.setattr(respond, "PER_REPORT", 1)
    seen = []

    def progress(done, total, figures):
        seen.append(done)
        if done == stop:
            raise KeyboardInterrupt

    out.mkdir(exist_ok=True)
    settings = respond.Config(max_tokens=8, slots=4, **config)
    metrics = respond.run(settings, inputs, out, Context(1, 1, out, progress))
    return metrics, seen


def test_answers_and_readings_are_those_of_the_engine(inputs, tmp_path, monkeypatch):
    artifacts, examples = inputs
    metrics, _ = answered(artifacts, tmp_path / "out", monkeypatch)
    responses, (readings, _) = read_responses(tmp_path / "out"), read_readings(tmp_path / "out" / READINGS)
    assert metrics["asked"] == {"math": 25}
    assert list(responses) == [e.id for e in examples]
    engine = LlamaEngine(artifacts["model"].path / "model.gguf", slots=1, context=128, threads=1, lookup=False)
    for i in (0, 7, 24):
        request = Request(messages=examples[i].messages, max_tokens=8, speculate=False)
        reading = engine.read(request)
        assert np.array_equal(readings.last[i], np.array(reading.last, np.float32))
        assert np.array_equal(readings.mean[i], np.array(reading.mean, np.float32))
        assert responses[examples[i].id].output == final_reply(engine.generate(request)).text
    engine.close()


def test_a_few_questions_come_from_all_parts_of_the_set(inputs, tmp_path, monkeypatch):
    artifacts, examples = inputs
    answered(artifacts, tmp_path / "out", monkeypatch, rows=5)
    assert list(read_responses(tmp_path / "out")) == [examples[i].id for i in (0, 5, 10, 15, 20)]


def test_a_killed_run_continues_with_the_next_chunk_and_ends_with_the_same_bytes(inputs, tmp_path, monkeypatch):
    artifacts, _ = inputs
    answered(artifacts, tmp_path / "whole", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        answered(artifacts, tmp_path / "killed", monkeypatch, stop=17)
    assert len(list((tmp_path / "killed" / CHECKPOINT).iterdir())) == 1
    _, seen = answered(artifacts, tmp_path / "killed", monkeypatch)
    assert seen[0] == 11
    assert seen[-1] == 25
    for name in ("responses.jsonl", READINGS):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_no_question_is_refused(inputs, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    write_examples(split_path(empty, "train"), [])
    artifacts = inputs[0] | {"examples": Artifact("examples", empty, "empty")}
    with pytest.raises(DataError, match="no training question"):
        answered(artifacts, tmp_path / "out", monkeypatch)
