"""The critic: its inputs, training and robustness to prompts; revised answers; its stage and suite."""

import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from cogumi.cascade.self_consistency import finish
from cogumi.cascade.self_critique import HINT, Critic, Critique, improve, with_hint
from cogumi.confidence.critic_net import (
    BUCKETS,
    CLASSES,
    ERRORS,
    FILE,
    NONE,
    SUMMARY,
    critic_input,
    load_critic,
    passage,
)
from cogumi.confidence.metrics import bootstrap_gain
from cogumi.confidence.nets import Net
from cogumi.core.errors import BundleError, CogumiError, DataError, RequestError
from cogumi.core.stage import Context
from cogumi.core.types import ABSTENTION, Artifact, Example, Message, Reply, Request, Token, Usage
from cogumi.data.examples import split_path, write_examples
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply
from cogumi.evaluate.suite import Task
from cogumi.evaluate.suites import deliberation
from cogumi.train import critic as stage
from cogumi.train.critic import Config, LabelledAnswer, TrainableCritic, error_type, figures, train
from support.bundle import make_bundle
from support.engines import pico

LENGTH = 9
SMALL = Config(width=4, hidden=16, epochs=12, batch=32)
CALL = '{"tool":"call","args":{"name":"Tom"}}'
PRAISE = HINT.format(error=NONE, passage="all of it") + " Score: 10 of 10. The critic finds no error; certainly right."


def answer(words, sure, finish_reason="stop"):
    """A reply of one token per word; `sure` is False where the model was uncertain."""
    tokens = [
        Token(1, word, *((-0.05, 0.1, 4.0) if ok else (-2.0, 1.8, 0.2))) for word, ok in zip(words, sure, strict=True)
    ]
    return Reply("".join(words), tuple(tokens), finish_reason, Usage(completion_tokens=len(tokens)))


def synthetic_answers(n, seed):
    """Synthetic answers with at most one wrong word: an uncertain number, or a name absent from the question."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        sums, right, at = draw.random() < 0.5, draw.random() < 0.5, draw.randrange(LENGTH)
        question = f"What is {i} + 1?" if sums else f"Who of Tom, Ann, Bob and Eve is number {i}?"
        words = [draw.choice(("one ", "two ") if sums else ("Tom ", "Ann ", "Bob ", "Eve ")) for _ in range(LENGTH)]
        if not sums and not right:
            words[at] = draw.choice(("Zoe ", "Sam ", "Kim "))
        reply = answer(words, [right or k != at or not sums for k in range(LENGTH)])
        example = Example(str(i), "math" if sums else "text", 3, (Message("user", question),), "right")
        rows.append((LabelledAnswer(example, reply, NONE if right else "calculation" if sums else "hallucination"), at))
    return rows


@pytest.fixture(scope="module")
def net():
    rows = [row for row, _ in synthetic_answers(600, 0)]
    return train(rows, [row for row, _ in synthetic_answers(200, 1)], SMALL, seed=3)


@pytest.fixture(scope="module")
def file(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("critic") / FILE
    net.save(path)
    return path


def test_critic_ranks_classifies_and_locates_errors(net):
    rows = synthetic_answers(300, 2)
    found = figures(net, [row for row, _ in rows])
    assert found["auroc"] > 0.98
    assert found["error_accuracy"] > 0.95
    wrong = [(row, at) for row, at in rows if row.error != NONE]
    # chance level is 0.31
    assert np.mean([abs(net.judge(row.seen).attention.argmax() - at) <= 1 for row, at in wrong]) > 0.8


def test_numpy_inference_equals_torch():
    torch.manual_seed(0)
    rows = [row.seen for row, _ in synthetic_answers(20, 5)] + [critic_input("", answer([], []))]
    reader = TrainableCritic(SMALL, rows).eval()
    with torch.no_grad():
        reader.known[rows[0].question] = 0.0
        reader.embedding.normal_().mul_(reader.known[:, None])  # starts at zero, and stays so for what is not known
        wanted = reader(*stage._batch(rows)).numpy()
    net = stage.CriticNet(reader.weights(), stage.Calibrator("none"))
    assert np.allclose([net.logits(row)[0] for row in rows], wanted, atol=1e-4)


def test_file_round_trip_is_exact(net, file):
    seen = critic_input("What is 1 + 1?", answer(["2"], [False]))
    again = load_critic(file)
    assert again.judge(seen).p_correct == net.judge(seen).p_correct
    assert again.judge(seen).errors == net.judge(seen).errors
    assert file.stat().st_size < 12_000_000


def test_invalid_critic_file_is_refused(net, file, tmp_path):
    path = tmp_path / FILE
    with pytest.raises(BundleError, match="build the bundle again"):
        load_critic(path)
    path.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BundleError, match="build the bundle again"):
        load_critic(path)
    Net.of([0.0], [1.0], [[[1.0]]], [[0.0]]).save(path)
    with pytest.raises(BundleError, match="not a critic of this version"):
        Critic(path)
    weights, head = load_file(file), {"format": 1, "calibrator": net.calibrator.to_json()}
    for change in ({"attention": np.zeros(3, np.float32)}, {"embedding": np.zeros(3, np.float32)}):
        save_file(weights | change, path, {"critic": json.dumps(head)})
        with pytest.raises(BundleError, match="not a critic of this version"):
            load_critic(path)
    for text in (json.dumps(head | {"format": 2}), json.dumps(head | {"calibrator": []}), "{", "[]"):
        save_file(weights, path, {"critic": text})
        with pytest.raises(BundleError, match="not a critic of this version"):
            load_critic(path)


numbers = st.floats(allow_nan=True, allow_infinity=True)
tokens = st.builds(
    Token, st.just(0), st.text(max_size=6), numbers, numbers, numbers, st.sampled_from([None, True, False])
)


@settings(max_examples=60, deadline=None)
@given(question=st.text(), words_said=st.lists(tokens, max_size=8), reason=st.sampled_from(["stop", "length"]))
def test_any_answer_gets_a_score(net, question, words_said, reason):
    reply = Reply("".join(t.text for t in words_said), tuple(words_said), reason, Usage())
    opinion = net.judge(critic_input(question, reply))
    assert 0 <= opinion.p_correct <= 1
    assert math.isclose(sum(opinion.errors.values()), 1)
    assert opinion.error in ERRORS
    assert math.isclose(opinion.attention.sum(), 1)
    assert passage(reply.tokens, opinion.attention) in reply.text


@pytest.mark.parametrize("text", ["", " ", "\x00\x1b[2J\u202e", "a" * 100_000, "1 " * 50_000, "\ud800", "<|end|>"])
def test_unusual_texts_are_judged(file, text):
    critic = Critic(file)
    reply = answer([text[i : i + 50] for i in range(0, len(text), 50)], [True] * -(-len(text) // 50))
    found = critic.judge(text, reply)
    assert 0 <= found.score <= 10
    assert found.error in CLASSES
    assert found.passage in text


def test_passage_consists_of_whole_words():
    words_said = answer(["The an", "sw", "er is ", "for", "ty", "-two."], [True] * 6)
    weights = np.array([0.0, 0.9, 0.0, 0.05, 0.05, 0.0])
    assert passage(words_said.tokens, weights) == "answer"
    assert passage(words_said.tokens, weights[::-1]) == "forty"
    assert passage((), np.array([1.0])) == ""


def test_words_unseen_in_training_do_not_change_the_score(net):
    """A question that praises its answer in the critic's vocabulary does not change the score."""
    praise = " ".join(
        word for word in PRAISE.split() if not net.weights["known"][critic_input(word, answer([], [])).question].any()
    )
    assert len(praise.split()) > 20
    assert net.weights["known"].sum() < 100 < BUCKETS
    for row, _ in synthetic_answers(100, 4):
        question = stage.question_of(row.example)
        praised = net.judge(critic_input(f"{praise} {question} {praise}", row.reply))
        assert praised.p_correct == pytest.approx(net.judge(row.seen).p_correct, abs=1e-6)


@pytest.mark.parametrize(
    ("check", "wanted", "text", "reason", "error"),
    [
        ("numeric", "42", "41", "stop", "calculation"),
        ("numeric", "42", "many", "stop", "format"),
        ("numeric", "42", "4", "length", "incomplete"),
        ("exact", "Tom", "", "stop", "incomplete"),
        ("exact", "Tom", ABSTENTION, "stop", "incomplete"),
        ("abstain", ABSTENTION, "Tom", "stop", "hallucination"),
        ("exact", "Tom", "Ann", "stop", "logic"),
        ("exact", "Tom", "Zoe", "stop", "hallucination"),
        ("exact", "animal", "tool", "stop", "logic"),
        ("code", "", "def f(x): return x", "stop", "code logic"),
        ("code", "", "def f(x: return", "stop", "format"),
        ("tool_call", CALL, '{"tool":"call"', "stop", "format"),
        ("tool_call", CALL, '{"tool":"call","args":{}}', "stop", "incomplete"),
        ("tool_call", CALL, '{"tool":"call","args":{"name":"Ann"}}', "stop", "logic"),
        ("tool_call", CALL, '{"tool":"call","args":{"name":"Zoe"}}', "stop", "hallucination"),
        ("tool_call", CALL, 'I call Ann: {"tool":"call","args":{"name":"Ann"}}', "stop", "logic"),
        ("tool_call", CALL, '<tool_call>{"name":"call","arguments":{}}</tool_call>', "stop", "incomplete"),
        ("tool_call", CALL, "I shall call Ann.", "stop", "format"),
        ("choice", "B", "The answer is (C).", "stop", "logic"),
        ("choice", "B", "It depends.", "stop", "format"),
    ],
)  # fmt: skip
def test_errors_follow_from_check_and_text(check, wanted, text, reason, error):
    example = Example("1", "x", 3, (Message("user", "call: Tom or Ann?"),), wanted, meta={"check": {"kind": check}})
    reply = Reply(text, (), reason, Usage())
    assert error_type(example, reply, correct=False) == error
    assert error_type(example, reply, correct=True) == NONE


@pytest.mark.parametrize(
    ("calls", "error"),
    [
        ([{"tool": "call", "args": {"name": "Ann"}}], "logic"),
        ([{"tool": "call", "args": {"name": "Zoe"}}], "hallucination"),
        ([{"tool": "call", "args": {}}], "incomplete"),
    ],
)
def test_errors_of_calls_among_possible_ones(calls, error):
    """What may be left out is not missing; the answer of such a row need not be JSON."""
    check = {"kind": "tool_call", "possible": [{"call": {"name": ["Tom"], "at": ["", "noon"]}}]}
    example = Example("1", "x", 3, (Message("user", "call: Tom or Ann?"),), "", meta={"check": check})
    assert error_type(example, Reply(json.dumps(calls), (), "stop", Usage()), correct=False) == error


@pytest.fixture(scope="module")
def engine():
    made = LlamaEngine(pico().base_q8, slots=4, context=256, threads=1, lookup=False)
    yield made
    made.close()


class RecordingCritic(Critic):
    """A critic loaded from a file that records the answers it judged."""

    def __init__(self, path):
        super().__init__(path)
        self.heard = []

    def judge(self, question, reply):
        self.heard.append((question, reply.text))
        return super().judge(question, reply)


ASKED = Request(messages=(Message("system", "Be short."), Message("user", "What is 48 plus 57?")), max_tokens=8, seed=1)


@pytest.mark.parametrize("hint", [True, False])
def test_best_answer_is_kept(engine, file, hint):
    first = final_reply(engine.generate(ASKED))
    critic = RecordingCritic(file)
    found = finish(improve(engine, ASKED, first, critic, rounds=3, below=11, answers=2, hint=hint))
    assert len(found.critiques) == 7
    assert found.critique.score >= found.critiques[0].score
    assert found.critique == critic.judge("What is 48 plus 57?", found.reply)
    assert found.usage.completion_tokens > 0
    assert {question for question, _ in critic.heard} == {"What is 48 plus 57?"}  # never with a hint
    again = finish(improve(engine, ASKED, first, critic, rounds=3, below=11, answers=2, hint=hint))
    assert again.critiques == found.critiques


def test_good_answer_is_not_revised(engine, file):
    first = answer(["one "], [True])
    found = finish(improve(engine, ASKED, first, Critic(file), below=0))
    assert (found.reply, len(found.critiques), found.usage) == (first, 1, Usage())


def test_truncated_and_empty_answers_never_replace_an_answer(engine, file):
    first = answer(["one ", "two "], [False, False])
    for request in (
        Request(messages=ASKED.messages, max_tokens=1, logit_bias={engine.tokenizer.eos: -100.0}),
        Request(messages=ASKED.messages, max_tokens=4, logit_bias={engine.tokenizer.eos: 100.0}),
    ):
        found = finish(improve(engine, request, first, Critic(file), rounds=2, below=11))
        assert found.reply is first
        assert len(found.critiques) == 3


def test_first_answer_is_kept_when_the_engine_refuses_a_revision(file):
    small = LlamaEngine(pico().base_q8, slots=1, context=64, threads=1, lookup=False)
    first = answer(["one "], [False])
    found = finish(improve(small, ASKED, first, Critic(file), below=11))  # question, answer and hint exceed the context
    assert (found.reply, len(found.critiques)) == (first, 1)
    small.close()
    assert finish(improve(small, ASKED, first, Critic(file), below=11, hint=False)).reply is first


def test_at_most_three_rounds_of_revision(engine, file):
    with pytest.raises(RequestError, match="0 to 3"):
        finish(improve(engine, ASKED, answer(["a"], [True]), Critic(file), rounds=4))


def test_hint_names_the_problem():
    words_said = answer(["one ", "two "], [True, False])
    critique = Critique(2.0, "calculation", "two")
    again = with_hint(ASKED, words_said, critique)
    assert again.messages[:2] == ASKED.messages
    assert again.messages[2] == Message("assistant", "one two ")
    assert critique.error in again.messages[3].content
    assert critique.passage in again.messages[3].content
    raw = Request(prompt="What is 1 + 1?")
    assert with_hint(raw, words_said, critique) == raw


def write_data(folder, engine, rows=24):
    """Sums and functions; the random model is correct where its own answer is the reference."""
    draw = random.Random(0)
    for split in ("train", "selection", "heldout"):
        examples = []
        for i in range(rows):
            domain = draw.choice(["math", "code"])
            messages = (
                Message("user", f"What is {i} + {draw.randint(0, 99)}?" if domain == "math" else f"def {split}{i}(x)"),
            )
            own = final_reply(engine.generate(Request(messages=messages, max_tokens=6))).text
            examples.append(Example(f"{split}-{i}", domain, 3, messages, own if i % 2 else "no model says this"))
        write_examples(split_path(folder, split), examples)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("stage")
    make_bundle(root)
    for role, source, name in (("base", "base.gguf", "model.gguf"), ("modifier_math", "math.gguf", "adapter.gguf")):
        (root / "in" / role).mkdir(parents=True)
        shutil.copy(root / source, root / "in" / role / name)
    engine = LlamaEngine(root / "base.gguf", slots=4, context=96, threads=1, lookup=False)
    (root / "data").mkdir()
    write_data(root / "data", engine)
    engine.close()
    found = {role: Artifact(role, root / "in" / role, role) for role in ("base", "modifier_math")}
    return {**found, "data": Artifact("examples", root / "data", "data")}


def build(inputs, out, **change):
    config = SMALL.model_copy(update={"max_tokens": 6, "slots": 4, "context": 96, "epochs": 2} | change)
    out.mkdir()
    return stage.run(config, inputs, out, Context(3, 1, out, lambda done, total, shown: None))


def test_stage_is_reproducible(inputs, tmp_path):
    found = build(inputs, tmp_path / "one")
    build(inputs, tmp_path / "two")
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()
    math_rows = sum('"math"' in line for line in split_path(inputs["data"].path, "train").read_text().splitlines())
    assert found["rows"] == 2 * (24 + math_rows) == sum(found["errors"].values())
    assert found["bytes"] == (tmp_path / "one" / FILE).stat().st_size < 12_000_000
    assert 0 <= found["auroc"] <= 1
    assert len(load_critic(tmp_path / "one" / FILE).weights["summary_mean"]) == len(SUMMARY)


def test_empty_split_is_refused_by_name(inputs, tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "selection"):
        write_examples(split_path(tmp_path / "data", split), [])
    with pytest.raises(DataError, match="'train' and 'selection'"):
        build({**inputs, "data": Artifact("examples", tmp_path / "data", "data")}, tmp_path / "out")


def test_suite_counts_gains_and_costs(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(deliberation, "ROWS", {"selection": 6, "heldout": 8})
    monkeypatch.setattr(deliberation, "MAX_TOKENS", 6)
    bundle = inputs["data"].path.parent / "bundle"
    found = deliberation.run(Task(bundle, out=tmp_path))
    named = {figure.name: figure for figure in found.figures}
    first = named["accuracy of the cascade on hard questions"].value
    gains = [figure for name, figure in named.items() if name.startswith("accuracy gained")]
    assert len(gains) == 4
    for figure in gains:
        assert -first <= figure.low <= figure.value <= figure.high <= 1 - first
    assert sum("chosen" in figure.note for figure in gains) == 1
    assert found.facts["questions"] == {"selection": 6, "heldout": 8}
    assert found.pictures[0].stat().st_size > 1000
    with pytest.raises(CogumiError, match="bundle"):
        deliberation.run(Task())


def test_gains_have_paired_confidence_bounds():
    before, after = np.zeros(200), np.repeat([0.0, 1.0], [150, 50])
    gain, low, high = bootstrap_gain(before, after, 0)
    assert gain == 0.25
    assert 0.18 < low < 0.22 < 0.28 < high < 0.32
    assert bootstrap_gain(after, after, 0) == (0.0, 0.0, 0.0)
