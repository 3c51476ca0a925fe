"""The report on a pico bundle: which answers count as accepted, and under which guarantee."""

import json
from dataclasses import replace

import pytest

from cogumi.bundle.format import CALIBRATION, DRAFT, INDEX, write_bundle
from cogumi.core.files import write_json
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Decision, Example, Message, Reply, Usage
from cogumi.data.examples import SPLITS, split_path, write_examples
from cogumi.evaluate import report
from support.bundle import make_bundle

ROWS = 6


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    meta = {"check": {"kind": "exact"}}
    examples = [
        Example(str(i), "code", 1 + i % 5, (Message("user", f"What is {i} + 3?"),), "x", "test", meta)
        for i in range(ROWS)
    ]
    write_examples(split_path(folder, SPLITS[-1]), examples)
    return Artifact("examples", folder, "data")


def reported(bundle, data, out):
    inputs = {"bundle": Artifact("bundle", bundle, "b", {}, {"bytes": {"base.gguf": 1}}), "data": data}
    config = report.Config(max_tokens=6, slots=2, context=128, speculation_prompts=1)
    return report.run(config, inputs, out, Context(0, 1, out, lambda done, total, figures: None))


def test_default_mode_is_judged_by_its_own_guarantee(bundle, data, tmp_path):
    found = reported(bundle, data, tmp_path)
    gate = found["gate"]
    assert (gate["n"], gate["threshold"], gate["accepted"], gate["coverage"]) == (ROWS, 0.9, 0, 0.0)
    assert list(found["accuracy"]) == ["draft", "base", "modifier", "cascade"]


def test_mobile_package_that_never_asks_its_base_is_reported(bundle, data, tmp_path):
    """Every question is unfamiliar to the base, so the modifier answers first; the base is judged all the same."""
    index = json.loads((bundle / INDEX).read_text())
    calibration = json.loads((bundle / CALIBRATION).read_text())
    calibration["question"]["base_perplexity"] = 0.5
    calibration["guarantees"]["base+modifier+straight"]["threshold"] = 0.6
    write_json(tmp_path / CALIBRATION, calibration)
    files = {name: bundle / name for name in index["files"] if name != DRAFT} | {CALIBRATION: tmp_path / CALIBRATION}
    parts = {n: p for n, p in index["parts"].items() if n != DRAFT}
    write_bundle(tmp_path / "mobile", files, {"parts": parts, "mode": "mobile"})
    (tmp_path / "out").mkdir()
    found = reported(tmp_path / "mobile", data, tmp_path / "out")
    gate = found["gate"]
    assert found["routes"] == {"modifier": 1.0}
    assert (gate["n"], gate["threshold"], gate["accepted"], gate["coverage"]) == (ROWS, 0.6, ROWS, 1.0)
    assert gate["accepted_error"] == 1.0  # a random model is never correct
    assert list(found["accuracy"]) == ["base", "modifier", "cascade"]
    assert (tmp_path / "out" / "report.md").exists()


def test_confident_draft_answers_count_as_accepted():
    example = Example("1", "code", 1, (), "x", "test", {"check": {"kind": "exact"}, "unanswerable": "fiction"})
    sure = Decision("draft", "p_correct", 0.9, 0.8, True, "")
    reply = Reply("x", (), "stop", Usage(), decisions=(sure,), tier="draft", route="draft", accepted=True)
    unsure = replace(reply, route="low_confidence", accepted=False)
    asked = report.GradedAnswers([example, example], [reply, unsure], [True, False])
    assert report.unanswerable_figures(asked, ())["kinds"] == {"fiction": [1, 2]}
    promise = report.Guarantee(0.8, 0.05, 0.95, 100, 50, 0, 0.05)
    gate = report.gate_figures(asked, asked, promise)
    assert (gate["accepted"], gate["coverage"], gate["accepted_error"], gate["n"]) == (1, 0.5, 0.0, 0)
    assert gate["given"]["n"] == 0
    assert gate["domains"] == {"code": {"n": 2, "auroc": None, "accepted": 1, "wrong": 0}}
    ranked = report.GradedAnswers(
        [example] * 3, [replace(reply, p_correct=p) for p in (0.9, 0.5, 0.7)], [True, False, False]
    )
    assert report.confidence_by_domain(ranked) == {"code": {"n": 3, "auroc": 1.0, "accepted": 3, "wrong": 2}}


def test_showcase_has_a_question_of_every_kind_that_the_answers_offer():
    def answered(domain, p, tier, accepted, history=()):
        text = f"{domain} {p}"
        meta = {"check": {"kind": "exact"}}
        example = Example(text, domain, 1, (*history, Message("user", text)), "x", "test", meta)
        return example, Reply("x", (), "stop", Usage(), tier=tier, p_correct=p, accepted=accepted)

    def collected(rows):
        return report.GradedAnswers([e for e, _ in rows], [r for _, r in rows], [True] * len(rows))

    turn = (Message("user", "?"), Message("assistant", "x"))
    given = [
        answered("facts", 0.97, "base", True),
        answered("facts", 0.6, "base", False),
        answered("facts", 0.7, "base", False, turn),
        answered("reading", 0.1, "base", False),
        answered("reading", 0.2, "base", False),
        answered("math", 0.99, "modifier:math", True),
        answered("math", 0.98, "modifier:math", True),
        answered("tools", 0.96, "modifier:tools", True),
    ]
    refused = collected([answered("facts", 0.3, "base", False), answered("facts", 0.02, "base", False)])
    shown = report.showcase(collected(given), refused)
    assert [row["question"] for row in shown] == [
        "facts 0.97",
        "math 0.99",
        "tools 0.96",
        "reading 0.2",  # "facts 0.6" is of a domain that was shown, "facts 0.7" makes no sense alone
        "reading 0.1",
        "facts 0.02",
    ]
    nothing_sure = collected([answered("facts", 0.6, "base", False), answered("math", 0.5, "modifier:math", False)])
    assert [row["question"] for row in report.showcase(nothing_sure, refused)] == ["facts 0.6", "facts 0.02"]
