"""Calibrators and figures: what must hold of any probability, and agreement with scipy/sklearn where they
have the same.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.metrics import log_loss as sk_log_loss

from cogumi.evaluate import metrics
from cogumi.route.calibrate import NAMES, Calibrator, fit
from cogumi.route.nets import sigmoid

rows = st.integers(2, 60).flatmap(
    lambda n: st.tuples(
        arrays(np.float64, n, elements=st.floats(-30, 30)), arrays(np.int64, n, elements=st.integers(0, 1))
    )
)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
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
    z = 3 * truth + (0 if name == "temperature" else 1.0)  # too sure, and shifted where the form can undo it
    p = fit(name, z[:3000], y[:3000])(z[3000:])
    assert metrics.ece(p, y[3000:]) < 0.03 < metrics.ece(sigmoid(z[3000:]), y[3000:])


def test_platt_is_logistic_regression_and_isotonic_is_isotonic():
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
def test_calibrators_bear_one_sided_data(name):
    assert np.all(np.isfinite(fit(name, [1.0, 2.0, 3.0], [1, 1, 1])([0.0, 5.0])))
    assert np.all(np.isfinite(fit(name, [1.0, 1.0], [0, 0])([0.0, 5.0])))


outcomes = st.integers(1, 80).flatmap(
    lambda n: st.tuples(
        arrays(np.float64, n, elements=st.floats(0, 1)), arrays(np.int64, n, elements=st.integers(0, 1))
    )
)


@settings(deadline=None)
@given(outcomes)
def test_figures_lie_in_their_bounds(data):
    p, y = data
    assert 0.0 <= metrics.ece(p, y) <= 1.0
    assert (
        metrics.ece(p, y) >= abs(p.mean() - y.mean()) - 1e-9
    )  # binning can only hide less than one bin does
    assert 0.0 <= metrics.aurc(p, y) <= 1.0
    assert 0.0 <= metrics.auroc(p, y) <= 1.0
    assert metrics.auroc(p, y) + metrics.auroc(-p, y) == pytest.approx(1.0)
    assert sum(n for n, _, _ in metrics.reliability(p, y)) == len(p)
    assert metrics.brier(p, y) == pytest.approx(np.mean((p - y) ** 2))


def test_figures_equal_sklearn():
    rng = np.random.default_rng(5)
    p = np.round(rng.random(500), 2)  # ties
    y = (rng.random(500) < p).astype(int)
    assert metrics.auroc(p, y) == pytest.approx(roc_auc_score(y, p))
    assert metrics.brier(p, y) == pytest.approx(brier_score_loss(y, p))
    inside = np.clip(p, 1e-6, 1 - 1e-6)
    assert metrics.log_loss(p, y) == pytest.approx(sk_log_loss(y, inside))


def test_figures_by_hand():
    assert metrics.ece([0.95, 0.95, 0.05, 0.05], [1, 0, 0, 0]) == pytest.approx(0.5 * 0.45 + 0.5 * 0.05)
    assert metrics.aurc([0.9, 0.8, 0.1], [1, 1, 0]) == pytest.approx((0 + 0 + 1 / 3) / 3)
    assert metrics.coverage([0.2, 0.8, 0.9], 0.8) == pytest.approx(2 / 3)
    assert metrics.auroc([0.1, 0.9], [1, 1]) == 0.5
    assert metrics.ece([], []) == metrics.brier([], []) == metrics.aurc([], []) == 0.0
    with pytest.raises(ValueError, match="outcomes"):
        metrics.ece([0.1], [1, 0])


def test_the_crossing_separates_two_groups():
    rng = np.random.default_rng(6)
    cut = metrics.crossing(rng.normal(0, 1, 20_000), rng.normal(2, 1, 20_000))
    assert cut == pytest.approx(1.0, abs=0.15)  # equal spreads cross half way
    assert metrics.crossing([1.0, 2.0], [5.0]) == 2.0
    with pytest.raises(ValueError, match="both groups"):
        metrics.crossing([], [1.0])
