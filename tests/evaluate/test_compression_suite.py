"""The suite `compression`: its loss and agreement measures, and no loss for an f32 file."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from cogumi.core.errors import CogumiError
from cogumi.data.examples import split_path, write_examples
from cogumi.engine.torch import TorchEngine
from cogumi.evaluate.suite import Task, suite
from cogumi.evaluate.suites import compression
from cogumi.evaluate.suites.compression import Reading, read_answers
from cogumi.models.tokenization import HFTokenizer
from cogumi.train.batches import make_rows
from support.pico import make_model
from support.train import example

QUESTIONS = [example(f"{a} plus {b}?", f"It is {a + b}.") for a in range(6) for b in range(6)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The parts of a finished run that the suite reads."""
    root = tmp_path_factory.mktemp("run")
    make_model(root / "base")
    for split in ("train", "heldout"):
        write_examples(split_path(root / "data", split), QUESTIONS)
    return root


def test_only_answer_tokens_count(finished):
    rows = make_rows(QUESTIONS[:5], HFTokenizer.load(finished / "base"), 512)
    with closing(TorchEngine(finished / "base")) as engine:
        found = read_answers(engine, rows)
    assert len(found.likeliest) == len(found.logprobs) == sum(row.weight for row in rows)
    model, best, nats = LlamaForCausalLM.from_pretrained(finished / "base"), [], 0.0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row.ids])).logits[0, row.start - 1 : -1]
        best += logits.argmax(1).tolist()
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[row.start :]), reduction="sum"))
    assert list(found.likeliest) == best
    assert found.perplexity == pytest.approx(math.exp(nats / len(best)), rel=1e-4)


def test_agreement_is_a_share():
    one, other = Reading((1, 2, 3, 4), (0.0,) * 4), Reading((1, 2, 9, 9), (math.log(0.5),) * 4)
    assert one.agreement(one) == 1
    assert one.agreement(other) == 0.5
    assert other.perplexity == pytest.approx(2)


def test_suite_reports_every_type(finished, monkeypatch):
    assert suite("compression") is compression
    monkeypatch.setattr(compression, "TYPES", ("f32", "q4_0"))
    found = compression.run(Task(data=finished))
    figures = {figure.name: figure for figure in found.figures}
    kinds = ["f32", "q4_0", "q4_0, importance"]
    assert list(figures) == [f"{what}, {k}" for k in kinds for what in ("token agreement", "perplexity over torch's")]
    assert figures["token agreement, f32"].value > 0.97  # random weights: near-ties flip with the order of summation
    assert figures["perplexity over torch's, f32"].value == pytest.approx(1, abs=2e-3)  # keys and values are f16
    assert figures["token agreement, q4_0"].value < figures["token agreement, f32"].value
    assert found.facts["answers"] == len(QUESTIONS)
    beside = compression.run(Task(bundle=finished / "bundle"))
    assert [figure.name for figure in beside.figures] == list(figures)
    for nowhere in (Task(), Task(data=finished / "data")):
        with pytest.raises(CogumiError, match="needs --data: the folder of a finished run"):
            compression.run(nowhere)
