"""The domain router: scope, domain history, pre-loading of modifiers, and its suite."""

import csv
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.confidence.domain_router import HISTORY_WEIGHT, confidences, in_scope, preload, scope_for, with_history
from cogumi.confidence.nets import Net, load_net, load_scope
from cogumi.core.errors import BundleError, CogumiError, DataError
from cogumi.evaluate.suite import Task
from cogumi.evaluate.suites import domains as suite
from cogumi.evaluate.suites.public_datasets import READERS, read_dataset
from cogumi.train import router

NAMES = ("code", "math", "reading")


@st.composite
def probabilities(draw):
    values = np.array(draw(st.lists(st.floats(1e-6, 1), min_size=3, max_size=3)))
    return dict(zip(NAMES, (values / values.sum()).tolist(), strict=True))


def test_router_with_scope_trains_on_any_vectors(tmp_path):
    random = np.random.default_rng(0)
    centres = np.eye(3, 8) * 6
    y = random.integers(3, size=600)
    x = centres[y] + random.normal(size=(600, 8))
    net = router.train(x[:400], [NAMES[k] for k in y[:400]], 20, 0)
    scope = scope_for(confidences(net, x[400:500]), 0.05)
    net.save(tmp_path / "router.safetensors", scope=scope)
    again, cut = load_net(tmp_path / "router.safetensors"), load_scope(tmp_path / "router.safetensors")
    assert cut == pytest.approx(scope)
    known = [in_scope(again.probabilities(row), cut) for row in x[500:]]
    middle = [in_scope(again.probabilities(row), cut) for row in random.normal(2, 0.3, size=(100, 8))]
    assert np.mean(known) >= 0.85
    assert np.mean(middle) <= 0.5


def test_networks_without_a_scope_accept_everything(tmp_path):
    from safetensors.numpy import save_file

    old = {"mean": np.zeros(1), "scale": np.ones(1), "weight_0": np.zeros((1, 2)), "bias_0": np.zeros(2)}
    old = {name: value.astype(np.float32) for name, value in old.items()}
    save_file(old, tmp_path / "old", metadata={"classes": json.dumps(["a", "b"])})
    assert load_net(tmp_path / "old").classes == ("a", "b")
    assert load_scope(tmp_path / "old") == 0.0
    assert in_scope({"a": 0.5, "b": 0.5}, 0.0)
    with pytest.raises(BundleError, match="cannot read"):
        load_scope(tmp_path / "none")


def test_network_file_is_reproducible(tmp_path):
    net = Net.of([0.0], [1.0], [[[1.0, 2.0]]], [[0.0, 0.0]], ["a", "b"])
    for name in ("one", "two"):
        net.save(tmp_path / name, scope=0.7)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=200), st.floats(0, 0.5))
def test_false_alarm_rate_stays_below_its_limit(known, rate):
    scope = scope_for(known, rate)
    assert sum(not in_scope({"a": p}, scope) for p in known) <= rate * len(known)
    assert scope_for([], rate) == 0.0


@settings(deadline=None)
@given(probabilities(), st.dictionaries(st.sampled_from([*NAMES, "unknown"]), st.integers(-5, 10**9)))
def test_history_shifts_but_never_overrides_the_question(domains, history):
    bent = with_history(domains, history)
    assert list(bent) == list(domains)
    assert sum(bent.values()) == pytest.approx(1)
    bound = 1 + HISTORY_WEIGHT * len(NAMES) / (1 - HISTORY_WEIGHT)
    for a in NAMES:
        for b in NAMES:
            odds = (bent[a] / bent[b]) / (domains[a] / domains[b])
            assert odds <= bound * (1 + 1e-9)
            if history.get(a, 0) > max(history.get(b, 0), 0):
                assert odds >= 1 - 1e-9


def test_history_on_a_hand_computed_example():
    even = dict.fromkeys(NAMES, 1 / 3)
    assert with_history(even, {}) == with_history(even, {"other": 9}) == even
    assert with_history({}, {"math": 3}) == {}
    assert with_history(even, {"math": 6})["math"] == pytest.approx(0.5 / 3 + 0.5 * 7 / 9)


def test_a_modifier_is_loaded_ahead_from_the_bar_on():
    for p, expected in ((0.99, "math"), (0.65, "math"), (0.64, None)):
        domains = {"math": p, "reading": 1 - p}
        assert preload(domains, ["math"]) == expected
        assert preload(domains, []) is None


def write_public(data):
    """A synthetic folder in the published formats, with words that distinguish the four kinds."""
    random = np.random.default_rng(0)

    def made(words, n):
        return [" ".join(random.permutation(words)[:4]) + f" {i}" for i in range(n)]

    def lines(path, rows):
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    sums = ["apples", "dollars", "buys", "each", "sells", "many"]
    code = ["write", "python", "function", "list", "tuple", "string"]
    exam = ["enzyme", "treaty", "theorem", "virus", "doctrine", "orbit"]
    call = ["please", "book", "weather", "calendar", "fetch", "tonight"]
    odd = ["zeus", "quiz", "jazz", "kayak", "xylophone", "waltz"]
    for name in ("train", "test"):
        lines(data / "gsm8k" / f"{name}.jsonl", [{"question": q} for q in made(sums, 60)])
    tasks = [{"task_id": i, "text": q, "prompt": q} for i, q in enumerate(made(code, 100))]
    lines(data / "mbpp" / "mbpp.jsonl", tasks)
    (data / "mbpp" / "sanitized-mbpp.json").write_text(json.dumps(tasks[60:]))
    for k in range(5):
        lines(
            data / "bfcl" / f"BFCL_v4_{k}.json",
            [{"question": [[{"role": "user", "content": q}]]} for q in made(call, 20)],
        )
        (data / "mmlu").mkdir(exist_ok=True)
        with open(data / "mmlu" / f"s{k}_test.csv", "w", newline="", encoding="utf-8") as file:
            rows = csv.DictWriter(file, ["question", "choice0", "choice1", "choice2", "choice3", "answer"])
            rows.writeheader()
            rows.writerows({"question": q, **{f"choice{i}": i for i in range(4)}, "answer": 0} for q in made(exam, 20))
    for kind, row in (("ifeval", "prompt"), ("mt_bench", "turns")):
        name = "input_data.jsonl" if kind == "ifeval" else "question.jsonl"
        lines(data / kind / name, [{row: [q] if row == "turns" else q} for q in made(odd, 10)])
    lines(
        data / "alpaca_seed" / "seed_tasks.jsonl",
        [{"instruction": q, "instances": [{"input": ""}]} for q in made(odd, 10)],
    )
    for kind, name, key in (
        ("strategyqa", "dev.json", None),
        ("selfaware", "SelfAware.json", "example"),
        ("bbh", "a.json", "examples"),
    ):
        (data / kind).mkdir()
        rows = [{"question": q, "input": q, "answerable": False} for q in made(odd, 10)]
        (data / kind / name).write_text(json.dumps({key: rows} if key else rows))
    (data / "alpaca_subset").mkdir()
    dolly = [{"instruction": q, "input": "given"} for q in made(odd, 10)]
    (data / "alpaca_subset" / "dolly_3k.json").write_text(json.dumps(dolly))
    (data / "truthfulqa").mkdir()
    (data / "truthfulqa" / "TruthfulQA.csv").write_text("Type,Question\n" + "".join(f"x,{q}\n" for q in made(odd, 10)))


class LetterCounts:
    """Replaces the sentence encoder by letter counts; the real one is tested in test_embedder.py."""

    width = 26

    def embed(self, texts):
        rows = np.array([[t.lower().count(chr(97 + k)) for k in range(26)] for t in texts], dtype=np.float32) + 1e-3
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_suite_on_a_synthetic_folder(tmp_path, monkeypatch):
    write_public(tmp_path)
    monkeypatch.setattr(suite, "cached_embedder", LetterCounts)
    learned, judged, foreign = suite.gather(tmp_path, 0)
    assert not set(learned.texts) & set(judged.texts)
    assert set(learned.datasets) == {*suite.KNOWN, suite.NO_DOMAIN}
    assert set(judged.datasets) == set(suite.KNOWN)
    assert set(foreign.datasets) == set(suite.FOREIGN)
    assert set(READERS) == {*suite.KNOWN, *suite.OTHER, *suite.FOREIGN}
    rows = {f.name: f for f in suite.run(Task(data=tmp_path)).figures}
    assert rows["real questions: accuracy on unseen files"].value >= 0.95
    assert rows["real questions: out-of-scope recall on unseen kinds"].value > 0.5
    assert rows["real questions: false alarms on unseen files"].value < 0.3
    assert rows["milliseconds per question without the embedding"].value > 0


def test_unusable_suite_input_is_refused_with_a_reason(tmp_path):
    with pytest.raises(CogumiError, match="needs --data"):
        suite.run(Task())
    with pytest.raises(DataError, match="is not gsm8k as published"):
        read_dataset(tmp_path, "gsm8k")
    (tmp_path / "gsm8k").mkdir()
    for name in ("train", "test"):
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(DataError, match="is not gsm8k as published"):
        read_dataset(tmp_path, "gsm8k")


def test_confidence_bounds_of_a_share():
    found = suite._figure("x", [True] * 10, ">= 0.5")
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / 10))
    assert suite._figure("x", []).value is None
    assert math.isclose(suite._figure("x", [False] * 10).high, 1 - 0.025 ** (1 / 10))
