"""The stages `router`, `answers` and `calibrate` on pico models, and the cascade that uses their output."""

import json
import math
import random
import shutil
from contextlib import ExitStack

import pytest

from cogumi.cascade.modes import MODES
from cogumi.confidence.gate import Calibration
from cogumi.confidence.nets import load_net
from cogumi.confidence.policy import Policy
from cogumi.confidence.signals import abstains
from cogumi.core.errors import ArtifactError, DataError
from cogumi.core.stage import CHECKPOINT, Context
from cogumi.core.types import ABSTENTION, Artifact, Example, Message, Request
from cogumi.data.examples import SPLITS, read_examples, split_path, write_examples
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import replies
from cogumi.grading.graders import grade_all
from cogumi.teach import tier_answers
from cogumi.teach.answer_rows import read_rows
from cogumi.train import calibrate, router
from support.bundle import cascade_of, make_bundle

ROWS = 60
SIZE = {"slots": 4, "context": 96}


def question(draw, domain):
    a, b = draw.randint(0, 99), draw.randint(0, 99)
    return f"What is {a} + {b}?" if domain == "math" else f"def add_{a}(x): return x + {b}"


def write_splits(folder, base):
    """Synthetic questions; the random model is correct where its own answer is the reference."""
    draw = random.Random(0)
    for split in SPLITS:
        domains = [draw.choice(["math", "code"]) for _ in range(ROWS)]
        messages_of_rows = [(Message("user", question(draw, domain)),) for domain in domains]
        answers = [r.text for r in replies(base, [Request(messages=m, max_tokens=6) for m in messages_of_rows])]
        examples = []
        for i, (domain, messages, answer) in enumerate(zip(domains, messages_of_rows, answers, strict=True)):
            kind = "abstain" if i % 10 == 9 else "exact"
            right = kind == "exact" and draw.random() < (0.9 if domain == "code" else 0.4)
            reference = answer if right else "no model says this"
            meta = {"check": {"kind": kind}}
            wanted = ABSTENTION if kind == "abstain" else reference
            examples.append(Example(f"{split}-{i}", domain, 1 + i % 5, messages, wanted, "test", meta))
        write_examples(split_path(folder, split), examples)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Inputs of both stages over pico models (a modifier for math only), without the router."""
    root = tmp_path_factory.mktemp("calibrate")
    make_bundle(root / "made")
    found = {}
    for role, source, name in (
        ("base", "base.gguf", "model.gguf"),
        ("draft", "draft.gguf", "model.gguf"),
        ("modifier_math", "math.gguf", "adapter.gguf"),
        ("difficulty", "difficulty.safetensors", "difficulty.safetensors"),
    ):
        (root / role).mkdir()
        shutil.copy(root / "made" / source, root / role / name)
        found[role] = Artifact(role, root / role, role)
    (root / "data").mkdir()
    base = LlamaEngine(root / "base" / "model.gguf", threads=1, **SIZE)
    write_splits(root / "data", base)
    base.close()
    return {**found, "data": Artifact("examples", root / "data", "data")}


def context(root, seen=None):
    return Context(3, 1, root, lambda done, total, figures: seen.append((done, total)) if seen is not None else None)


@pytest.fixture(scope="module")
def routed(artifacts, tmp_path_factory):
    """All inputs with the trained router, and the metrics of the router stage."""
    out, seen = tmp_path_factory.mktemp("router"), []
    inputs = {"draft_gguf": artifacts["draft"], "data": artifacts["data"]}
    figures = router.run(router.Config(context=SIZE["context"]), inputs, out, context(out, seen))
    assert seen[-1] == (2 * ROWS, 2 * ROWS)
    return {**artifacts, "router": Artifact("router", out, "router")}, figures


def test_router_stage_learns_domains_from_draft_states(routed):
    inputs, figures = routed
    assert figures["classes"] == ["code", "math"]
    assert figures["accuracy"] >= 0.95  # sums and functions differ even in the states of a random model
    assert set(figures["by_domain"]) == {"code", "math"}
    assert load_net(inputs["router"].path / "router.safetensors").classes == ("code", "math")


def test_router_needs_two_domains(artifacts, tmp_path):
    with pytest.raises(DataError, match="two domains"):
        router.train([[0.0], [1.0]], ["math", "math"], 1, 0)


@pytest.fixture(scope="module")
def answered(routed, tmp_path_factory):
    """The inputs of `calibrate`."""
    inputs, _ = routed
    out, seen = tmp_path_factory.mktemp("answers"), []
    (out / CHECKPOINT).mkdir()
    metrics = tier_answers.run(tier_answers.Config(max_tokens=6, **SIZE), inputs, out, context(out, seen))
    assert seen[-1] == (3 * ROWS, 3 * ROWS)
    assert metrics["rows"] == {"fit": ROWS, "selection": ROWS, "threshold": ROWS}
    return {"data": inputs["data"], "answers": Artifact("answers", out, "answers", {}, metrics)}


def test_cascade_answers_match_the_calibrated_policy(routed, answered, tmp_path):
    """The guarantee is for a policy, so the running cascade must follow that policy for every answer."""
    inputs, _ = routed
    config = calibrate.Config(e=0.6, unanswerable=0.99)
    figures = calibrate.run(config, answered, tmp_path, context(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {
        "calibration.json",
        "reliability.png",
        "histogram.png",
        "frontier.png",
    }
    assert figures["rows"] == {"fit": ROWS, "selection": ROWS, "threshold": ROWS}
    calibration = Calibration.from_json(json.loads((tmp_path / "calibration.json").read_text()))
    examples = read_examples(split_path(inputs["data"].path, "threshold"))
    with ExitStack() as opened:
        asked = tier_answers.Config(max_tokens=6, **SIZE)
        tiers = tier_answers.open_tiers(inputs, examples, asked, context(tmp_path), opened)
        cascade = cascade_of(tiers, calibration, workers=4)
        for mode in ("fast", "balanced", "straight", "turbo", "mobile"):
            promise = figures["guarantee"][MODES[mode].policy.name]
            assert math.isfinite(promise["threshold"])
            requests = [Request(messages=e.messages, max_tokens=6, mode=mode) for e in examples]
            answers = list(replies(cascade, requests))
            confident = [r for r in answers if r.accepted]
            assert {r.route for r in confident} <= {"draft", "base", "base+draft", "modifier"}
            assert len(confident) == promise["accepted"] > 0
            verdicts = grade_all([(e, r.text) for e, r in zip(examples, answers, strict=True) if r in confident])
            assert sum(not v.correct for v in verdicts) == promise["wrong"]
            assert not any(abstains(r.text) for r in confident)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_equal_inputs_give_equal_bytes(answered, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        calibrate.run(calibrate.Config(), answered, tmp_path / name, context(tmp_path))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_killed_answers_continue_with_the_same_bytes(routed, answered, tmp_path, monkeypatch):
    """A run that ends after the first stored chunks asks only the rest, and the chunks change no byte."""
    inputs, _ = routed
    config = tier_answers.Config(max_tokens=6, **SIZE)
    monkeypatch.setattr(tier_answers, "CHUNK", 25)
    asked = []

    def stop_after_four(tiers, examples, options):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(len(examples))
        return ask(tiers, examples, options)

    ask = tier_answers.ask
    (tmp_path / CHECKPOINT).mkdir()
    monkeypatch.setattr(tier_answers, "ask", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        tier_answers.run(config, inputs, tmp_path, context(tmp_path))
    assert asked == [25, 25, 10, 25]
    monkeypatch.setattr(tier_answers, "ask", lambda *args: asked.append(len(args[1])) or ask(*args))
    tier_answers.run(config, inputs, tmp_path, context(tmp_path))
    assert asked[4:] == [25, 10, 25, 25, 10]
    assert files(tmp_path) == files(answered["answers"].path)


def test_damaged_answers_are_refused(answered, tmp_path):
    source = answered["answers"].path
    for name in ("fit", "selection", "threshold"):
        shutil.copy(source / f"{name}.jsonl", tmp_path)
        shutil.copy(source / f"{name}.safetensors", tmp_path)
    lines = (tmp_path / "fit.jsonl").read_text().splitlines(keepends=True)
    examples = read_examples(split_path(answered["data"].path, "fit"))
    assert len(read_rows(tmp_path, "fit", examples)) == ROWS
    for text in ("".join(lines[1:]), "".join([lines[1], lines[0], *lines[2:]]), "no JSON"):
        (tmp_path / "fit.jsonl").write_text(text)
        with pytest.raises(ArtifactError, match="build the `answers` step again"):
            read_rows(tmp_path, "fit", examples)


def test_missing_guarantee_is_reported(answered, tmp_path):
    figures = calibrate.run(calibrate.Config(), answered, tmp_path, context(tmp_path))
    promise = figures["guarantee"]["base"]
    assert (promise["threshold"], promise["coverage"], promise["accepted_error"]) == (None, 0.0, None)
    calibration = Calibration.from_json(json.loads((tmp_path / "calibration.json").read_text()))
    assert calibration.threshold("calibrated", Policy()) == math.inf


def test_empty_split_is_refused_by_name(routed, tmp_path):
    inputs, _ = routed
    (tmp_path / "data").mkdir()
    for split in SPLITS:
        source = split_path(inputs["data"].path, split)
        target = split_path(tmp_path / "data", split)
        target.write_text("" if split == "selection" else source.read_text())
    empty = {**inputs, "data": Artifact("examples", tmp_path / "data", "data")}
    with pytest.raises(DataError, match="'selection' is empty"):
        tier_answers.run(tier_answers.Config(**SIZE), empty, tmp_path, context(tmp_path))
