"""The question router: its features, its training, and how the suite counts the saved cost."""

import csv
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.confidence.metrics import auroc
from cogumi.confidence.nets import load_net
from cogumi.core.errors import CogumiError, DataError
from cogumi.evaluate.suite import Task
from cogumi.evaluate.suites import routing
from cogumi.evaluate.suites.fit_question_router import fit_question, subject_folds
from cogumi.evaluate.suites.question_router import (
    FEATURES,
    LIKENESS,
    OUTCOMES,
    SURFACE,
    Forecast,
    forecast,
    likeness,
    parts,
    question_features,
    question_input,
)

MMLU = "Which of the following is NOT a prime?\nA. 2\nB. 3\nC. 4\nD. All of the above\nAnswer:"


def test_question_is_split_into_stem_and_options():
    assert parts(MMLU) == ["Which of the following is NOT a prime?", "2", "3", "4", "All of the above"]
    assert parts("What is 2 + 2?") == ["What is 2 + 2?"]
    assert parts("Is it so?\nA. only one line looks like an option") == [
        "Is it so?\nA. only one line looks like an option"
    ]
    roman = "True?\nI. DNA\nII. RNA\nA. I only\nB. II only\nAnswer:"
    assert parts(roman) == ["True?\nI. DNA\nII. RNA", "I only", "II only"]


def test_features_have_their_documented_meaning():
    found = dict(zip(FEATURES, question_features(MMLU), strict=True))
    assert found["options"] == pytest.approx(math.log(5))
    assert found["numeric_options"] == 0.75
    assert found["all_or_none"] == 1.0
    assert found["excepted"] == found["choice"] == pytest.approx(math.log(2))
    plain = dict(zip(FEATURES, question_features("Compute 12 + 30 = ?"), strict=True))
    assert plain["log_digits"] == pytest.approx(math.log(5))
    assert plain["formula"] > 0
    assert plain["operator"] > 0
    assert plain["options"] == plain["option_likeness"] == 0


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=400))
def test_features_of_any_text_are_finite_and_of_fixed_size(text):
    vectors = np.eye(12)[: len(parts(text))]
    seen = question_input(text, vectors)
    assert seen.shape == (SURFACE + 24,)
    assert np.isfinite(seen).all()


@pytest.mark.parametrize("text", ["", "\x00\x07", "x" * 100_000, "A. " * 30_000, "\nA. 1" * 25_000, "_" * 100_000])
def test_unusual_texts_are_accepted(text):
    assert np.isfinite(question_features(text)).all()
    assert len(parts(text)) <= 11


def test_similarity_on_a_hand_computed_example():
    vectors = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = dict(zip(LIKENESS, likeness(vectors), strict=True))
    assert found["nearest_option"] == found["nearest_gap"] == found["closest_pair"] == 1.0
    assert found["mean_to_stem"] == pytest.approx(1 / 3)
    assert found["farthest_pair"] == 0.0
    assert not likeness(vectors[:1]).any()


def test_forecast_probabilities_sum_to_one():
    said = Forecast(np.array([[0.1, 0.4, 0.2, 0.3]]))
    assert OUTCOMES == ("neither", "strong", "weak", "both")
    assert said.weak_right[0] == pytest.approx(0.5)
    assert said.repaired[0] == pytest.approx(0.4)
    assert said.gain[0] == pytest.approx(0.2)


def make_world(n=900, seed=0):
    """Difficulty depends on one feature in every subject; the embedding only identifies the subject."""
    random = np.random.default_rng(seed)
    subject = np.arange(n) % 15
    x = np.zeros((n, SURFACE + 15))
    x[:, 0] = random.normal(size=n)
    x[np.arange(n), SURFACE + subject] = 1
    weak = random.random(n) < 1 / (1 + np.exp(2 * x[:, 0]))
    strong = random.random(n) < 0.8
    return x, weak, strong, [f"s{k}" for k in subject]


def test_training_generalises_to_unseen_subjects(tmp_path):
    x, weak, strong, subjects = make_world()
    unseen = subject_folds(subjects, 3, 0)[0]
    assert not set(np.array(subjects)[unseen]) & set(np.array(subjects)[~unseen])
    own = [s for s, out in zip(subjects, unseen, strict=True) if not out]
    net, strength = fit_question(x[~unseen], weak[~unseen], strong[~unseen], own, 0)
    said = forecast(net, x[unseen])
    assert auroc(said.weak_right, weak[unseen]) > 0.8
    assert auroc(said.gain, strong[unseen].astype(float) - weak[unseen] > 0) > 0.75
    assert np.allclose(said.outcomes.sum(axis=1), 1)
    again, same = fit_question(x[~unseen], weak[~unseen], strong[~unseen], own, 0)
    assert same == strength
    assert np.array_equal(again.logits(x), net.logits(x))
    net.save(tmp_path / "question.safetensors")
    assert np.array_equal(load_net(tmp_path / "question.safetensors").logits(x), net.logits(x))


def test_unseen_outcome_keeps_a_positive_probability():
    x, weak, _, subjects = make_world(300)
    net, _ = fit_question(x, weak, np.ones(300, dtype=bool), subjects, 0)
    said = forecast(net, x).outcomes
    assert 0 < said[:, OUTCOMES.index("neither")].max() < 0.2


def test_cost_figures_on_a_hand_computed_example():
    weak, strong = np.array([1, 0, 0, 1], dtype=bool), np.array([1, 1, 1, 0], dtype=bool)
    best = routing.curve(np.array([0.0, 2.0, 1.0, -1.0]), weak, strong)
    assert list(best) == [0, 1, 2, 2, 1]  # the gap is one answer: two are corrected and one is made wrong
    assert routing.cpt(best, 0.5) == 0.25
    assert routing.apgr(best) == pytest.approx((0.5 + 1.5 + 2 + 1.5) / 4)
    late = routing.curve(np.array([2.0, 0.0, 1.0, 3.0]), weak, strong)
    assert list(late) == [0, -1, -1, 0, 1]
    assert routing.cpt(late, 0.8) == 1.0
    equal = routing.curve(np.zeros(4), weak, strong)
    assert np.allclose(equal, [0, 0.25, 0.5, 0.75, 1])
    assert np.isnan(routing.curve(np.zeros(2), np.array([True, False]), np.array([False, True]))).all()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), min_size=2, max_size=30).filter(
        lambda rows: sum(s for _, s, _ in rows) > sum(w for w, _, _ in rows)
    )
)
def test_no_order_beats_the_oracle_and_all_end_at_the_gap(rows):
    weak, strong, ask = (np.array(column) for column in zip(*rows, strict=True))
    mine = routing.curve(ask.astype(float), weak, strong)
    best = routing.curve(strong.astype(float) - weak, weak, strong)
    assert mine[0] == 0
    assert mine[-1] == pytest.approx(1)
    assert (mine <= best + 1e-9).all()
    assert routing.cpt(best, 0.5) <= routing.cpt(mine, 0.5)
    assert 0 <= routing.cpt(mine, 0.8) <= 1


class LetterCounts:
    """Replaces the sentence encoder by letter counts; the real one is tested in test_embedder.py."""

    width = 26

    def embed(self, texts):
        rows = np.array([[t.lower().count(chr(97 + k)) for k in range(26)] for t in texts], dtype=np.float32) + 1e-3
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_subjects(folder, subjects=12, rows=40):
    random = np.random.default_rng(1)
    for k in range(subjects):
        with open(folder / f"mmlu_s{k}.csv", "w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(["prompt", "weak", "strong"])
            for _ in range(rows):
                a = int(random.integers(1, 999))
                hard = a > 99
                text = f"Topic {'abcdefghijkl'[k] * 3}: what is {a} + {a}?\nA. {2 * a}\nB. {a}\nAnswer:"
                lines.writerow([text, random.random() < (0.3 if hard else 0.9), random.random() < 0.9])


def test_suite_on_a_small_folder(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "out").mkdir()
    write_subjects(tmp_path / "data")
    monkeypatch.setattr(routing, "cached_embedder", LetterCounts)
    monkeypatch.setattr(routing, "DRAWS", 20)
    monkeypatch.setattr(routing, "SPLITS", 2)
    task = Task(data=tmp_path / "data", out=tmp_path / "out")
    findings = routing.run(task)
    rows = {f.name: f for f in findings.figures}
    assert rows["AUROC, question router"].value > 0.6
    assert rows["AUROC, random"].value == pytest.approx(0.5, abs=0.1)
    for row in rows.values():
        assert row.low <= row.high
    assert rows["CPT(50%), question router, gain"].value < rows["CPT(50%), random, wrong"].value
    assert findings.facts["subjects"] == 12
    assert findings.pictures[0].stat().st_size > 1000
    assert [f.value for f in routing.run(task).figures] == [f.value for f in findings.figures]


def test_unusable_suite_input_is_refused_with_a_reason(tmp_path):
    with pytest.raises(CogumiError, match="needs --data"):
        routing.run(Task())
    with pytest.raises(DataError, match="fewer than ten subjects"):
        routing.read_questions(tmp_path)
    (tmp_path / "mmlu_a.csv").write_text("prompt,weak,strong\nWhat?,True,maybe\n")
    with pytest.raises(DataError, match=r"mmlu_a\.csv:2 is not"):
        routing.read_questions(tmp_path)
    (tmp_path / "mmlu_a.csv").write_text("question,a\n")
    with pytest.raises(DataError, match=r"mmlu_a\.csv:1 must read"):
        routing.read_questions(tmp_path)
