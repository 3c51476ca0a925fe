"""The template bank (SPEC F18), and requests with their own few-shot examples (SPEC C9)."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi.bundle.format import BASE, EXAMPLES, FEWSHOT, HEAD, INDEX, open_bundle, write_bundle
from cogumi.cascade.memory.answer_cache import AnswerCache
from cogumi.cascade.memory.turns import Memory
from cogumi.cascade.modes import Mode, Settings
from cogumi.cascade.opening import open_cascade
from cogumi.cascade.template_bank import Templates
from cogumi.confidence.gate import QuestionGate
from cogumi.confidence.nearest_examples import DEFAULT_COUNT, EXAMPLE_COUNTS, MIN_COSINE, example_count, nearest
from cogumi.core.errors import BundleError, CogumiError, ContextError, RequestError
from cogumi.core.types import Example, Message, Request
from cogumi.engine.few_shot import ADAPTER
from cogumi.engine.protocol import final_reply
from cogumi.evaluate.suite import Task
from cogumi.evaluate.suites import templates as suite
from support.bundle import calibrated, cascade_of, make_bundle, open_tiers
from support.encoder import Trigrams
from support.output_head import write_head

SHOTS = (("What is 3 plus 4?", "7"), ("What is 20 plus 1?", "21"))
EASY, HARD = QuestionGate(1e9, 0.5), QuestionGate(1e9, 0.99)
cosines = st.lists(st.floats(-1, 1, width=32), max_size=30).map(np.array)


@given(cosines, st.sampled_from(["code", "reasoning", "music"]))
def test_nearest_examples_are_used_best_last_within_the_distance(found, domain):
    picked = nearest(found, [domain] * len(found))
    assert len(picked) == min(example_count(domain), int((found >= MIN_COSINE).sum()))
    assert sorted(found[picked]) == list(found[picked])
    left = np.delete(found, picked)
    assert not picked or not len(left) or left.max() <= found[picked].min() or left.max() < MIN_COSINE


def test_domain_of_the_nearest_determines_the_number():
    counts = {name: example_count(name) for name in ("code", "math", "reasoning", "music")}
    assert counts == {"code": 3, "math": 3, "reasoning": 5, "music": DEFAULT_COUNT}
    assert set(EXAMPLE_COUNTS.values()) == {3, 5}
    values = np.linspace(0.99, 0.9, 10)
    assert nearest(values, ["reasoning", *["code"] * 9]) == [4, 3, 2, 1, 0]
    assert nearest(values, ["code", *["reasoning"] * 9]) == [2, 1, 0]
    assert nearest(np.zeros(0), []) == []


class LetterCounts:
    """Replaces the embedder: texts with common letters are near."""

    def __init__(self):
        self.seen = []

    def embed(self, texts):
        self.seen += texts
        rows = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


BANK = {
    "code": [(f"code a function {word}", word) for word in ("one", "two", "three", "four")],
    "math": [(f"sum xyz {word}", word) for word in ("five", "six")],
}


def test_bank_is_embedded_once_and_the_nearest_are_found():
    embedder = LetterCounts()
    bank = Templates(BANK, lambda: embedder)
    assert embedder.seen == []
    assert bank.similar("code a function three")[-1] == ("code a function three", "three")
    assert len(bank.select("code a function three", "math", 2)) == 2
    assert bank.select("code a function three", "math", 0) == ()
    assert bank.similar("qqqq") == ()
    assert embedder.seen.count("code a function one") == 1


def test_without_an_embedder_a_fixed_choice_of_the_domain_is_used():
    bank = Templates(BANK)
    assert bank.similar("code a function three") == ()
    shown = bank.select("anything", "code", 5)
    assert len(set(shown)) == EXAMPLE_COUNTS["code"]
    assert set(shown) <= set(BANK["code"])
    assert bank.select("anything", "code", 5) == shown
    assert {bank.select(f"q{i}", "code", 2) for i in range(9)} != {bank.select("q0", "code", 2)}
    assert bank.select("anything", "music", 5) == ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle with a head, its adapter and examples; and the same without head and adapter."""
    root = tmp_path_factory.mktemp("templates")
    bundle = make_bundle(root)
    index = json.loads((bundle / INDEX).read_bytes())
    files = {name: bundle / name for name in index["files"]}
    rows = [{"domain": domain, "question": q, "answer": a} for domain, pairs in BANK.items() for q, a in pairs]
    (root / EXAMPLES).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    write_head(root / HEAD, base="base")
    parts = index["parts"] | {FEWSHOT: index["parts"][BASE]}
    more = {EXAMPLES: root / EXAMPLES, HEAD: root / HEAD, FEWSHOT: root / "math.gguf"}
    write_bundle(root / "whole", files | more, {"parts": parts})
    return root


@pytest.fixture(scope="module")
def whole(folder):
    opened = open_cascade(folder / "whole", slots=4, context=256, threads=1)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def tiers(folder):
    opened = open_tiers(folder / "bundle", slots=8, context=192)
    yield opened
    opened.close()


def cascade(tiers, question=EASY, p=0.95, **parts):
    gates = dict.fromkeys(("draft", "base", "modifier", "direct"), p)
    return cascade_of(tiers, calibrated(gates, 0.8, question), **parts)


def ask(text="What is 2 + 3?", **values):
    return Request(messages=(Message("user", text),), **{"max_tokens": 10, **values})


def test_bundle_can_contain_a_head_and_its_adapter(folder, whole):
    found = open_bundle(folder / "whole")
    assert (found.head, found.fewshot) == (folder / "whole" / HEAD, folder / "whole" / FEWSHOT)
    assert found.base_fingerprint == "base"
    assert open_bundle(folder / "bundle").head is None
    assert ADAPTER not in whole.adapters
    assert not any("fewshot" in model for model in whole.models)


def test_head_or_adapter_of_another_base_is_refused(folder, tmp_path):
    shutil.copytree(folder / "whole", tmp_path / "b")
    index = json.loads((tmp_path / "b" / INDEX).read_bytes())
    files = {name: tmp_path / "b" / name for name in index["files"]}
    other = index["parts"][FEWSHOT] | {"base_fingerprint": "other"}
    with pytest.raises(BundleError, match=r"fewshot\.gguf was trained on another base"):
        write_bundle(tmp_path / "b", files, {"parts": index["parts"] | {FEWSHOT: other}})
    write_head(tmp_path / "b" / HEAD, base="other")
    write_bundle(tmp_path / "b", files, {"parts": index["parts"]})
    with pytest.raises(BundleError, match="trained on another base"):
        open_cascade(tmp_path / "b", threads=1)


def test_request_with_examples_uses_the_adapted_head_and_is_never_accepted(whole):
    base = whole.tiers.base
    wanted = ask(examples=SHOTS, mode="fast")
    reply = final_reply(whole.generate(wanted))
    answer = final_reply(base.generate(replace(wanted, mode=None)))
    assert reply.text == answer.text
    assert (reply.tier, reply.p_correct) == ("base+examples", None)
    assert reply.route in ("low_confidence", "abstained")
    why = next(d for d in reply.decisions if d.signal == "examples")
    assert (why.value, why.accepted) == (2, False)
    assert "not calibrated for" in why.reason
    shown = final_reply(whole.generate(replace(wanted, adapt=False)))
    assert shown.text != reply.text != final_reply(whole.generate(ask(mode="fast"))).text
    assert final_reply(whole.generate(replace(wanted, adapt=True, progressive=True))).text == reply.text
    withheld = final_reply(whole.generate(replace(wanted, abstain=True)))
    assert withheld.route == "abstained"
    with pytest.raises(RequestError, match="neither speculates"):
        whole.generate(replace(wanted, speculate=True))


def test_requests_with_examples_do_not_affect_accepted_or_cached_answers(tiers, tmp_path):
    memory, cache = Memory(tmp_path / "memory.sqlite"), AnswerCache(None, None)
    asked = cascade(tiers, memory=memory, cache=cache)
    said = [final_reply(tiers.base.generate(ask(examples=examples))).text for examples in (SHOTS, ())]
    values = {"user": "ann", "stop": tuple(text[3:5] for text in said)}  # a truncated answer would not be cached
    given = final_reply(asked.generate(ask(examples=SHOTS, id="one", **values)))
    assert (given.p_correct, given.route, given.finish_reason) == (None, "low_confidence", "stop")
    sure = final_reply(asked.generate(ask(id="two", **values)))
    assert (sure.p_correct, sure.route.startswith("base")) == (pytest.approx(0.95), True)
    assert final_reply(asked.generate(ask(id="three", **values))).route == "cache"
    again = final_reply(asked.generate(ask(examples=SHOTS, id="four", **values)))
    assert (again.text, again.route) == (given.text, "low_confidence")
    turns = {turn.id: turn for turn in memory.recent("ann")}
    assert set(turns) == {"one", "two", "three", "four"}
    one = turns["one"]
    assert (one.p_correct, one.question, one.tier) == (None, "What is 2 + 3?", "base+examples")
    with pytest.raises(RequestError, match="no adaptable head"):
        asked.generate(ask(examples=SHOTS, adapt=True))
    with pytest.raises(ContextError):
        asked.generate(ask(examples=(("long " * 400, "a"),)))
    memory.close()


def test_near_examples_are_added_to_given_ones_where_they_fit(tiers):
    base, near = tiers.base, Templates(BANK, LetterCounts)
    wanted = ask("code a function five", examples=(("q", "a"),))
    reply = final_reply(cascade(tiers, templates=near).generate(wanted))
    filled = replace(wanted, examples=(*near.similar("code a function five")[1:], ("q", "a")))
    assert len(filled.examples) == EXAMPLE_COUNTS["code"]
    assert reply.text == final_reply(base.generate(filled)).text
    assert next(d for d in reply.decisions if d.signal == "examples").value == 3
    long = Templates({"code": [("code a function " * 30, "a")] * 3}, LetterCounts)
    alone = final_reply(cascade(tiers, templates=long).generate(wanted))
    assert alone.text == final_reply(base.generate(wanted)).text


def test_hard_and_novel_questions_get_near_examples_if_the_mode_allows(tiers):
    near, settings = Templates(BANK, LetterCounts), Settings(modes={"shown": Mode(examples=5, votes=3)})
    novel = QuestionGate(1e9, 0.99, novelty=1.0)

    def tried(question, text, mode="shown"):
        parts = {"templates": near, "settings": settings, "p": 0.3}
        reply = final_reply(cascade(tiers, question, **parts).generate(ask(text, mode=mode, speculate=False)))
        return [(d.signal, d.reason.partition(", P(correct)")[0]) for d in reply.decisions if "+" in d.tier][:2], reply

    seen, _ = tried(HARD, "code a function five")
    assert seen[0] == ("p_correct", "with 3 examples")
    assert seen[1][0] == "agreement"
    seen, reply = tried(novel, "code a function five")
    assert [signal for signal, _ in seen] == ["p_correct"]
    assert reply.p_correct is None
    assert not any(signal == "p_correct" for signal, _ in tried(HARD, "qqqq")[0])
    assert tried(HARD, "code a function five", "balanced")[0] == []


def test_suite_counts_correct_answers_of_each_selection_method(folder, whole):
    """The model is random, so the references are made from the answers of one selection method."""
    bank, base = Templates(BANK, Trigrams), whole.tiers.base
    texts = ["code a function three now", "sum xyz six now", "qqqq"]
    messages = [(Message("user", text),) for text in texts]
    shown = [bank.similar(text) for text in texts]
    assert [len(pairs) for pairs in shown] == [3, 2, 0]
    blank = [Example(str(i), "code", 3, m, "", "test", {"check": {"kind": "exact"}}) for i, m in enumerate(messages)]
    said = suite.answers(base, blank, shown, adapt=True)
    assert said[2] == suite.answers(base, blank, [(), (), ()], adapt=False)[2]
    examples = [replace(example, answer=text) for example, text in zip(blank, said, strict=True)]
    found = {f.name: f.value for f in suite.measure(base, bank, examples, Task()).figures}
    assert found["accuracy: alone"] == pytest.approx(1 / 3)
    assert found["accuracy gained: nearest examples, head adapted"] == pytest.approx(2 / 3)
    assert found["accuracy gained: nearest examples"] == pytest.approx(0)
    assert found["questions with a near example"] == pytest.approx(2 / 3)
    with pytest.raises(CogumiError, match="lacks examples or an embedder"):
        suite.run(Task(folder / "whole"))


def test_search_of_ten_thousand_examples():
    """The largest size of the bank; the suite `templates` measures the time."""
    vectors = np.random.default_rng(0).normal(size=(10_000, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert nearest(vectors @ vectors[77], ["code"] * len(vectors)) == [77]
