"""`confidence.calibrators` and metrics: properties of probabilities, and agreement with scipy and sklearn."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.metrics import log_loss as sk_log_loss

from cogumi.cascade.tiers import Question
from cogumi.confidence import metrics
from cogumi.confidence.calibrators import NAMES, Calibrator, fit
from cogumi.confidence.gate import Calibration
from cogumi.confidence.nets import sigmoid
from cogumi.confidence.policy import POLICIES, Policy
from cogumi.confidence.signals import answer_signals, question_signals
from cogumi.core.types import ABSTENTION, Example, Message, Reading, Reply, Score, Token, Usage
from cogumi.data.examples import is_easy
from cogumi.teach.answer_rows import Answer, Row, policy_answers, probabilities
from cogumi.train.calibrate import Config, calibrate, fit_question_gate
from cogumi.train.fit_gate import fit_gate

rows = st.integers(2, 60).flatmap(
    lambda n: st.tuples(
        arrays(np.float64, n, elements=st.floats(-30, 30)), arrays(np.int64, n, elements=st.integers(0, 1))
    )
)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(data=rows)
def test_calibrators_are_monotone_probabilities(name, data):
    z, y = data
    calibrator = fit(name, z, y)
    p = calibrator(np.linspace(-40, 40, 400))
    assert np.all((p >= 0) & (p <= 1))
    assert np.all(np.diff(p) >= -1e-12)
    assert Calibrator.from_json(calibrator.to_json()) == calibrator


@pytest.mark.parametrize("name", NAMES[1:])
def test_calibrators_repair_overconfidence(name):
    rng = np.random.default_rng(3)
    truth = rng.normal(0, 1.5, 6000)
    y = (rng.random(6000) < sigmoid(truth)).astype(int)
    # overconfident, and shifted where the calibrator has an offset
    z = 3 * truth + (0 if name == "temperature" else 1.0)
    p = fit(name, z[:3000], y[:3000])(z[3000:])
    assert metrics.ece(p, y[3000:]) < 0.03 < metrics.ece(sigmoid(z[3000:]), y[3000:])


def test_platt_and_isotonic_equal_sklearn():
    rng = np.random.default_rng(4)
    z = rng.normal(0, 2, 4000)
    y = (rng.random(4000) < sigmoid(0.7 * z - 0.4)).astype(int)
    plain = LogisticRegression(C=1e9).fit(z[:, None], y)
    found = fit("platt", z, y)
    assert found.slope == pytest.approx(plain.coef_[0, 0], abs=0.01)
    assert found.offset == pytest.approx(plain.intercept_[0], abs=0.01)
    theirs = IsotonicRegression(out_of_bounds="clip").fit(z, y).predict(z)
    assert np.mean(np.abs(fit("isotonic", z, y)(z) - theirs)) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_calibrators_accept_outcomes_of_one_class(name):
    assert np.all(np.isfinite(fit(name, [1.0, 2.0, 3.0], [1, 1, 1])([0.0, 5.0])))
    assert np.all(np.isfinite(fit(name, [1.0, 1.0], [0, 0])([0.0, 5.0])))


outcomes = st.integers(1, 80).flatmap(
    lambda n: st.tuples(
        arrays(np.float64, n, elements=st.floats(0, 1)), arrays(np.int64, n, elements=st.integers(0, 1))
    )
)


@settings(deadline=None, max_examples=40)
@given(outcomes)
def test_metrics_lie_in_their_bounds(data):
    p, y = data
    assert 0.0 <= metrics.ece(p, y) <= 1.0
    assert metrics.ece(p, y) >= abs(p.mean() - y.mean()) - 1e-9  # more bins hide less than one bin
    assert 0.0 <= metrics.aurc(p, y) <= 1.0
    assert 0.0 <= metrics.auroc(p, y) <= 1.0
    assert metrics.auroc(p, y) + metrics.auroc(-p, y) == pytest.approx(1.0)
    assert sum(n for n, _, _ in metrics.reliability(p, y)) == len(p)
    assert metrics.brier(p, y) == pytest.approx(np.mean((p - y) ** 2))


def test_metrics_equal_sklearn():
    rng = np.random.default_rng(5)
    p = np.round(rng.random(500), 2)  # ties
    y = (rng.random(500) < p).astype(int)
    assert metrics.auroc(p, y) == pytest.approx(roc_auc_score(y, p))
    assert metrics.brier(p, y) == pytest.approx(brier_score_loss(y, p))
    inside = np.clip(p, 1e-6, 1 - 1e-6)
    assert metrics.log_loss(p, y) == pytest.approx(sk_log_loss(y, inside))


def test_metrics_on_a_hand_computed_example():
    assert metrics.ece([0.95, 0.95, 0.05, 0.05], [1, 0, 0, 0]) == pytest.approx(0.5 * 0.45 + 0.5 * 0.05)
    assert metrics.aurc([0.9, 0.8, 0.1], [1, 1, 0]) == pytest.approx((0 + 0 + 1 / 3) / 3)
    assert metrics.coverage([0.2, 0.8, 0.9], 0.8) == pytest.approx(2 / 3)
    assert metrics.auroc([0.1, 0.9], [1, 1]) == 0.5
    assert metrics.ece([], []) == metrics.brier([], []) == metrics.aurc([], []) == 0.0
    with pytest.raises(ValueError, match="outcomes"):
        metrics.ece([0.1], [1, 0])


def test_metrics_do_not_depend_on_the_order_of_ties():
    assert metrics.aurc([0.5] * 4, [1, 1, 0, 0]) == metrics.aurc([0.5] * 4, [0, 0, 1, 1]) == pytest.approx(0.5)
    assert metrics.aurc([0.9, 0.5, 0.5], [1, 1, 0]) == metrics.aurc([0.9, 0.5, 0.5], [1, 0, 1])


def test_crossing_separates_two_groups():
    rng = np.random.default_rng(6)
    cut = metrics.crossing(rng.normal(0, 1, 20_000), rng.normal(2, 1, 20_000))
    assert cut == pytest.approx(1.0, abs=0.15)  # equal spreads cross halfway
    assert metrics.crossing([1.0, 2.0], [5.0]) == 2.0
    with pytest.raises(ValueError, match="both groups"):
        metrics.crossing([], [1.0])


def row(rng, domain):
    """A synthetic answered question: confident tokens and easy questions are correct more often."""
    ease = rng.normal()
    difficulty = int(np.clip(3 - ease + rng.normal(0, 0.5), 1, 5))
    example = Example("x", domain, difficulty, (Message("user", "?"),), "a", meta={"check": {"kind": "exact"}})
    reading = Reading(Score(4.0 * np.exp(-ease / 3), 2, 8), (1.0, 2.0), (), ())
    p_easy = float(sigmoid(ease))
    domains = {"code": float(domain == "code"), "math": float(domain == "math")}
    signals = question_signals(reading, p_easy, domains, "?")
    question = Question(signals, reading.score.perplexity, p_easy, domains)

    def answer(skill):
        sure = skill + 2 * ease + rng.normal(0, 0.7)
        tokens = tuple(Token(0, "a", -float(np.exp(-sure - rng.random())), 0.1, 1.0) for _ in range(3))
        correct = bool(rng.random() < sigmoid(2 * sure))
        text = ABSTENTION if rng.random() < 0.05 else "aaa"
        reply = Reply(text, tokens, "stop", Usage())
        return Answer(text, 3, correct, answer_signals(reply))

    draft, base = answer(0.0), answer(0.5)
    seen = {**base.signals, **signals, "draft_nats": 1.0, "draft_gap": 0.5 + rng.normal()}
    base = replace(base, signals=seen, hidden=(ease + rng.normal(), rng.normal()))
    draft = replace(draft, signals={**draft.signals, **signals})
    modifier = answer(1.0) if domain == "math" else None
    return Row(example, question, reading.score.perplexity, draft, base, modifier, domain if modifier else "")


COST = {"draft": 1.0, "base": 3.0}


def synthetic_rows(rng, n):
    return [row(rng, domain) for domain in rng.choice(["math", "code"], n)]


def test_calibrated_gate_keeps_the_risk_limit_on_fresh_rows(tmp_path):
    rng = np.random.default_rng(9)
    rows = {
        "fit": synthetic_rows(rng, 800),
        "selection": synthetic_rows(rng, 500),
        "threshold": synthetic_rows(rng, 1500),
    }
    figures = calibrate(rows, COST, Config(), 0, tmp_path)
    text = (tmp_path / "calibration.json").read_text()
    assert len(text) < 300_000
    calibration = Calibration.from_json(json.loads(text))
    assert figures["gates"]["base"]["auroc"] > 0.8
    assert figures["gates"]["base"]["ece"] < 0.05
    assert figures["gates"]["modifier"]["n"] == sum(r.modifier is not None for r in rows["threshold"])
    assert figures["question"]["auroc_p_easy"] > 0.8
    assert (tmp_path / "reliability.png").stat().st_size > 5_000
    assert (tmp_path / "histogram.png").stat().st_size > 5_000

    fresh = synthetic_rows(rng, 3000)
    p = probabilities(fresh, calibration.gates, calibration.probe)
    policy = Policy(modifier=True)
    found = figures["guarantee"][policy.name]
    accepted, wrong = policy_answers(fresh, p, policy, math.inf, COST).count(found["threshold"])
    assert found["bound"] <= 0.05
    assert wrong / accepted <= 0.06
    assert accepted / 3000 == pytest.approx(found["coverage"], abs=0.05)
    assert min(found["coverage"], figures["guarantee"]["base"]["coverage"]) > 0.3
    assert set(figures["guarantee"]) == set(figures["searched"]) == {policy.name for policy in POLICIES}
    benefit = figures["benefit"]
    # questions the base gets wrong are not the questions a modifier improves
    assert benefit["auroc_benefit"] > benefit["auroc_base_wrong"]


def test_abstentions_are_never_accepted_answers():
    rng = np.random.default_rng(10)
    rows = [replace(r, base=replace(r.base, text="I don't know")) for r in synthetic_rows(rng, 20)]

    def counted(base, modifier, policy):
        p = np.tile([0.0, base, modifier, modifier], (20, 1))
        return policy_answers(rows, p, policy, math.inf, COST).count(0.5)

    assert counted(1.0, 0.0, Policy(modifier=True)) == (0, 0)
    # an abstention below the threshold escalates to the modifier
    speaking = [r for r in rows if r.modifier and r.modifier.text != ABSTENTION]
    accepted, _ = counted(0.0, 1.0, Policy(modifier=True))
    assert accepted == len(speaking) > 0
    assert counted(0.0, 1.0, Policy()) == (0, 0)


@pytest.mark.parametrize("correct", [0.0, 1.0])
def test_gate_is_constant_when_all_outcomes_are_equal(correct):
    rows = [{"a": float(i), "b": 1.0} for i in range(50)]
    fitted = fit_gate(rows, np.full(50, correct), 0)
    p = fitted.gate.p_all(rows)
    assert np.ptp(p) == 0.0
    assert abs(p[0] - correct) < 0.05
    assert fitted.figures["form"] == "constant"


def test_best_gate_form_and_calibrator_is_selected():
    rng = np.random.default_rng(11)
    x = rng.normal(size=(900, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(float)  # these are not linearly separable
    rows = [{"mean_logprob": a, "b": b} for a, b in x]
    fitted = fit_gate(rows[:600], y[:600], 0)
    assert len(fitted.figures["tried"]) == 3 * len(NAMES)
    assert fitted.figures["form"] == "net"
    assert fitted.figures["log_loss"] == min(t["log_loss"] for t in fitted.figures["tried"])
    assert metrics.auroc(fitted.gate.p_all(rows[600:]), y[600:]) > 0.95
    assert metrics.auroc(fitted.out_of_fold, y[:600]) > 0.9


def test_question_gate_when_all_outcomes_are_equal():
    rows = synthetic_rows(np.random.default_rng(12), 30)
    gate = fit_question_gate(rows, [True] * 30, Config())
    assert all(r.question.perplexity <= gate.perplexity and r.question.p_easy >= gate.p_easy for r in rows)
    assert not is_easy(replace(rows[0].example, difficulty=0), 2, right=False)
    assert not is_easy(replace(rows[0].example, difficulty=1, meta={"check": {"kind": "abstain"}}), 2, right=True)
