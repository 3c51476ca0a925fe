"""Confidence signals, small networks, domains, the gate and policies."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from cogumi.confidence import signals
from cogumi.confidence.calibrators import Calibrator
from cogumi.confidence.domain_router import modifier_probabilities, route
from cogumi.confidence.gate import FORMAT, Calibration, Gate, QuestionGate, check, matrix
from cogumi.confidence.guarantee import Guarantee
from cogumi.confidence.nets import Net, load_head, load_net, sigmoid, softmax
from cogumi.confidence.policy import POLICIES, Policy, PolicyAnswers, select_answer
from cogumi.core.errors import BundleError, RequestError
from cogumi.core.types import ABSTENTION, Reading, Reply, Score, Token, Usage
from cogumi.grading.graders import normalise


def reply(values, text="x", finish="stop"):
    return Reply(text, tuple(Token(0, "x", *v) for v in values), finish, Usage())


number = st.floats(allow_nan=True, allow_infinity=True)


@settings(deadline=None)
@given(st.lists(st.tuples(number, number, number), max_size=30), st.sampled_from(["stop", "length"]))
def test_answer_signals_are_finite_for_any_reply(values, finish):
    found = signals.answer_signals(reply(values, finish=finish))
    assert all(math.isfinite(v) for v in found.values())
    assert found["min_logprob"] <= found["q10_logprob"] <= found["q25_logprob"]
    assert found["min_logprob"] <= found["mean_logprob"] + 1e-9
    assert set(found) == set(signals.answer_signals(reply([])))


def test_answer_signals_on_a_hand_computed_example():
    two = [(-1.0, 0.5, 2.0), (-3.0, 1.5, 0.0)]
    found = signals.answer_signals(reply(two, text="I don't  know", finish="length"))
    assert found["mean_logprob"] == -2.0
    assert found["first_logprob"] == -1.0
    assert found["max_entropy"] == 1.5
    assert found["min_margin"] == 0.0
    assert found["cut"] == found["abstains"] == 1.0
    assert signals.perplexity(found) == pytest.approx(math.exp(2))


def test_empty_answer_has_low_confidence_signals():
    empty, sure = signals.answer_signals(reply([])), signals.answer_signals(reply([(-0.1, 0.1, 3.0)]))
    assert empty["mean_logprob"] < sure["mean_logprob"]
    assert empty["mean_entropy"] > sure["mean_entropy"]


@settings(deadline=None)
@given(st.text(max_size=30))
def test_abstention_is_detected_as_by_the_grader(text):
    assert signals.abstains(text) == (normalise(text) == normalise(ABSTENTION))
    assert signals.abstains(f" '{ABSTENTION.upper()}' ")


def test_question_signals_contain_digits_and_domains():
    reading = Reading(Score(6.0, 3, 9), (1.0, 4.0, math.inf), (0.0,), (0.0,))
    found = signals.question_signals(reading, 0.25, {"math": 0.7, "code": 0.3}, "12 + 3")
    assert found["question_nats"] == 2.0
    assert found["question_max_nats"] == signals.FLOOR
    assert found["question_log_digits"] == pytest.approx(math.log(4))
    assert (found["domain_math"], found["p_easy"]) == (0.7, 0.25)
    nothing = signals.question_signals(Reading(Score(0.0, 0, 0), (), (), ()), 0.5, {}, "")
    assert all(math.isfinite(v) for v in nothing.values())


@pytest.mark.parametrize("classes", [2, 4])
def test_networks_equal_sklearn(tmp_path, classes):
    rng = np.random.default_rng(1)
    x = rng.normal(3.0, 2.0, (300, 7))
    names = [f"c{i}" for i in range(classes)]
    y = np.array(names)[np.argmax(x[:, :classes] + rng.normal(0, 1, (300, classes)), axis=1)]
    scaler = StandardScaler().fit(x)
    model = MLPClassifier((64, 32), max_iter=30, random_state=0).fit(scaler.transform(x), y)
    net = Net.of(scaler.mean_, scaler.scale_, model.coefs_, model.intercepts_, model.classes_)
    net.save(tmp_path / "net.safetensors")
    again = load_net(tmp_path / "net.safetensors")
    wanted = model.predict_proba(scaler.transform(x))
    for row, probabilities in zip(x, wanted, strict=True):
        mine = again.probabilities(row)
        assert tuple(mine) == tuple(model.classes_)
        assert np.allclose(list(mine.values()), probabilities, atol=1e-4)
        assert mine == net.probabilities(row)


def test_network_json_round_trip_is_exact():
    rng = np.random.default_rng(2)
    weights = [rng.normal(size=(3, 5)), rng.normal(size=(5, 1))]
    net = Net.of(rng.normal(size=3), rng.uniform(1, 2, 3), weights, [np.zeros(5), [0.1]])
    again = Net.from_json(json.loads(json.dumps(net.to_json())))
    x = rng.normal(size=(50, 3))
    assert np.array_equal(net.logits(x), again.logits(x))
    assert json.dumps(again.to_json()) == json.dumps(net.to_json())


def test_network_with_inconsistent_shapes_is_refused():
    with pytest.raises(ValueError, match="cannot follow"):
        Net.of([0.0], [1.0], [np.zeros((2, 1))], [[0.0]])
    with pytest.raises(ValueError, match="3 outputs for 2 classes"):
        Net.of([0.0], [1.0], [np.zeros((1, 3))], [np.zeros(3)], ["a", "b"])


def test_difficulty_head_loads_and_invalid_files_are_refused(tmp_path):
    path = tmp_path / "difficulty.safetensors"
    save_file({"weight": np.float32([1.0, -2.0]), "bias": np.float32([0.5])}, path)
    assert load_head(path).logits([3.0, 1.0])[0] == pytest.approx(1.5)
    with pytest.raises(BundleError, match="not a net of this version"):
        load_net(path)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(BundleError, match="cannot read"):
        load_head(tmp_path / "broken.safetensors")
    with pytest.raises(BundleError, match="cannot read"):
        load_head(tmp_path / "missing.safetensors")


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_sigmoid_and_softmax_are_probabilities(z):
    assert np.all((sigmoid(z) >= 0) & (sigmoid(z) <= 1))
    assert softmax(z).sum() == pytest.approx(1.0)


def test_probability_of_domains_without_a_modifier_goes_to_the_base():
    seen = {"math": 0.4, "code": 0.3, "reading": 0.3}
    assert route(seen, ["math", "code"]) == "math"
    assert route(seen, ["code"]) is None
    assert modifier_probabilities(seen, ["code"])["base"] == pytest.approx(0.7)
    assert route(seen, []) is None
    assert route({}, ["math"]) is None


def gate_of(weight, offset=0.0):
    return Gate(("a", "b"), Net.of([0, 0], [1, 1], [[[weight], [0.0]]], [[0.0]]), Calibrator("platt", 1.0, offset))


def test_calibration_json_round_trip_is_exact():
    isotonic = Gate(("a", "b"), gate_of(0.3).net, Calibrator("isotonic", knots=((-1.0, 0.1), (2.0, 0.9))))
    promise = Guarantee(math.inf, 0.05, 0.95, 100, 0, 0, 1.0)
    promises = {"base": promise, "base+modifier": promise}
    gates = {"base": gate_of(1.0), "modifier": isotonic}
    whole = Calibration(QuestionGate(20.0, 0.5), gates, gate_of(2.0).net, 30.0, promises, {"base": 0.8})
    text = json.dumps(whole.to_json(), allow_nan=False)
    again = Calibration.from_json(json.loads(text))
    assert json.dumps(again.to_json()) == text
    assert again.threshold("calibrated", Policy(modifier=True)) == math.inf
    assert again.threshold("searched", Policy()) == 0.8
    row = {"a": 0.3, "b": 5.0, "other": 1.0}
    assert again.gates["modifier"].p_correct(row) == isotonic.p_correct(row)
    with pytest.raises(BundleError, match="format 9"):
        Calibration.from_json({"format": 9})
    with pytest.raises(BundleError, match="incomplete"):
        Calibration.from_json({"format": FORMAT})


def test_a_gate_sees_logarithms_and_which_modifier_answered():
    rows = [
        {"mean_logprob": -0.25, **signals.answered_by("math")},
        {"mean_logprob": 0.0, **signals.answered_by("code")},
    ]
    names = ("by_code", "by_math", "log_of_mean_logprob", "mean_logprob")
    found = matrix(rows, names)
    assert found[0].tolist() == pytest.approx([0.0, 1.0, math.log(0.251), -0.25])
    assert found[1].tolist() == pytest.approx([1.0, 0.0, math.log(0.001), 0.0])
    with pytest.raises(KeyError, match="mean_logprob"):
        matrix([{"by_code": 1.0}], names)


def test_bundle_without_modifiers_has_only_the_base_policy():
    promise = Guarantee(0.8, 0.05, 0.95, 100, 80, 1, 0.05)
    plain = Calibration(QuestionGate(20.0, 0.5), {"base": gate_of(1.0)}, None, 30.0, {"base": promise}, {})
    assert plain.threshold("calibrated", Policy()) == 0.8
    turbo = Policy(draft=True)  # not calibrated: only the base's answers count, by the guarantee of `base`
    assert plain.threshold("calibrated", turbo, "draft") == math.inf
    assert plain.threshold("calibrated", turbo, "base") == 0.8
    assert plain.promise(turbo) == promise
    straight = Policy(modifier=True, modifier_first=True)  # may skip the base, so `base` says nothing about it
    assert plain.threshold("calibrated", straight, "base") == math.inf


def test_gate_kinds():
    sure = {"mean_logprob": -0.1}
    assert check("calibrated", 0.8, sure, 0.8).accepted
    assert not check("calibrated", 0.79, sure, 0.8).accepted
    assert not check("calibrated", 1.0, sure, math.inf).accepted
    assert check("perplexity", 0.0, sure, 30.0).accepted
    assert not check("perplexity", 1.0, {"mean_logprob": -3.5}, 30.0).accepted
    with pytest.raises(RequestError, match="calibrated, searched, perplexity"):
        check("other", 0.5, sure, 0.5)


chances = st.lists(st.floats(0, 1), min_size=1, max_size=4)


@settings(deadline=None)
@given(chances, st.floats(0, 1))
def test_settle_never_accepts_an_answer_below_the_threshold(p, threshold):
    which, accepted = select_answer(p, [x >= threshold for x in p])
    assert accepted == (p[which] >= threshold) == (max(p) >= threshold)
    assert accepted or p[which] == max(p)
    assert not any(x >= threshold for x in p[:which])  # the first answer above the threshold is taken


@settings(deadline=None)
@given(st.lists(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=3, max_size=3), min_size=1), st.floats(0, 1))
def test_settling_all_rows_equals_settling_each(rows, threshold):
    rows = [[0.5, *row] for row in rows]  # one of the tiers always answers
    p = np.array([[math.nan if x is None else x for x in row] for row in rows])
    which, accepted = PolicyAnswers(p, p > 2, p > -1, p).given(threshold)
    for row, i, sure in zip(rows, which, accepted, strict=True):
        asked = [j for j, x in enumerate(row) if x is not None]
        mine, was = select_answer([row[j] for j in asked], [row[j] >= threshold for j in asked])
        assert (asked[mine], was) == (i, sure)


def test_policy_answers_count_accepted_wrong_and_cost():
    p = np.array([[0.9, math.nan], [0.4, 0.95], [0.3, 0.2], [0.95, math.nan]])
    correct = np.array([[True, False], [False, True], [True, False], [False, False]])
    claims = np.array([[True, True], [True, True], [True, True], [False, True]])
    answers = PolicyAnswers(p, correct, claims, np.full((4, 2), 2.0))
    assert answers.count(0.9) == (2, 0)
    assert answers.count(0.0) == (3, 1)
    assert answers.outcome(0.9) == (0.75, 3.0)
    assert answers.rows(np.array([1])).count(0.9) == (1, 0)


def test_policies_have_unique_names_and_ordered_tiers():
    assert len({policy.name for policy in POLICIES}) == len(POLICIES) == 6
    assert Policy(modifier=True).order(True, True) == ("base", "modifier")
    assert Policy(modifier=True).order(False, True) == ("base",)
    assert Policy(draft=True).order(True, True) == ("draft", "base")
    assert Policy(True, True, True).order(True, True) == ("draft", "direct")
    assert Policy(True, True, True).order(True, False) == ("draft", "base", "modifier")
