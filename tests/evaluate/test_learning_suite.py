"""The simulator of drifting users has the stated statistics, and the suite runs on the real memory and learner."""

from functools import partial

import numpy as np
import pytest

from cogumi.cascade.memory import learner
from cogumi.evaluate.suite import SUITES, Findings, Task, suite
from cogumi.evaluate.suites import learning
from cogumi.evaluate.suites.learning import PHASES, Phase, accepted, ask, attacked, brier, people, promise_of, stream_of

RATERS = ["honest"] * 700


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_gate_is_calibrated_before_the_drift(rng):
    calm = stream_of(Phase("calm", 40_000), rng, RATERS)
    np.testing.assert_array_equal(calm.p, calm.truth)
    sure = calm.p > 0.8
    said = calm.vote[sure & (calm.vote >= 0)]
    assert said.mean() == pytest.approx(calm.p[sure].mean(), abs=0.03)  # honest raters err in 2%
    worse = stream_of(Phase("worse", 10_000, shift=(-2.0, 0, 0, 0, 0)), rng, RATERS)
    hit = worse.domain == 0
    assert (worse.truth < worse.p)[hit].all()
    np.testing.assert_array_equal(worse.truth[~hit], worse.p[~hit])
    new = stream_of(Phase("new", 10_000, new=0.5, harder=1.0), rng, RATERS)
    assert ((new.truth < new.p) == (new.user >= learning.PEOPLE)).all()


def test_raters_vote_according_to_their_type(rng):
    user, domain = np.arange(4).repeat(5_000), np.zeros(20_000, dtype=int)
    shift = np.full(20_000, 30.0)  # every answer is right
    stream = ask(rng, user, domain, shift, ["honest", "careless", "lazy", "malicious"], rated=1.0)
    up = [stream.vote[user == u].mean() for u in range(4)]
    assert up == pytest.approx([0.98, 0.85, 1.0, 0.02], abs=0.02)
    wrong = ask(rng, user, domain, -shift, ["honest", "careless", "lazy", "malicious"], rated=1.0)
    assert [wrong.vote[user == u].mean() for u in range(4)] == pytest.approx([0.02, 0.15, 1.0, 0.98], abs=0.02)
    assert set(people(rng, 500)) == set(learning.RATERS)


def test_attack_votes_do_not_change_other_users(rng):
    before = stream_of(Phase("calm", 500), rng, RATERS)
    after = attacked(before, rng, 600, 300)
    own = after.user != 600
    for name in ("user", "domain", "p", "truth", "vote"):
        np.testing.assert_array_equal(getattr(after, name)[own], getattr(before, name))
    assert (~own).sum() == 300
    assert ((after.p < 0.5) == after.vote)[~own].all()


def test_expected_scores_equal_the_mean_of_samples(rng):
    shown, truth = rng.random(50), rng.random(50)
    right = rng.random((20_000, 50)) < truth
    assert brier(shown, truth) == pytest.approx(((shown - right) ** 2).mean(), abs=0.005)
    share, wrong = accepted(shown, truth, 0.5)
    assert share == (shown >= 0.5).mean()
    assert wrong == pytest.approx(1 - right[:, shown >= 0.5].mean(), abs=0.005)
    assert accepted(shown, truth, 2.0) == (0.0, 0.0)


def test_risk_limit_holds_before_the_drift(rng):
    promise = promise_of(rng)
    calm = stream_of(Phase("calm", 50_000), rng, RATERS)
    share, wrong = accepted(calm.p, calm.truth, promise.threshold)
    assert share > 0.1
    assert wrong <= promise.risk


def test_suite_promotes_and_rolls_back_a_layer(tmp_path, monkeypatch):
    """With small numbers, so goals may fail; the test checks that each part of the suite ran."""
    small = {"calm": 600, "one domain worse": 1500, "still worse": 300, "new people too": 400, "as before": 800}
    phases = [Phase(p.name, small[p.name], p.mix, (2 * p.shift[0], 0, 0, 0, 0), p.new, p.harder) for p in PHASES]
    for name, value in {"CHECK_INTERVAL": 100, "FIT_INTERVAL": 200, "CANARY_VOTES": 60}.items():
        monkeypatch.setattr(learner, name, value)
    for name, value in {
        "PHASES": phases,
        "ATTACK": 200,
        "WINDOW": 600,
        "Learner": partial(learner.Learner, need=300),
        "personal": partial(learning.personal, each=2),
    }.items():
        monkeypatch.setattr(learning, name, value)
    found = suite("learning").run(Task(out=tmp_path / "out"))
    assert isinstance(found, Findings)
    assert SUITES["learning"] == learning.__name__
    figures = {figure.name: figure for figure in found.figures}
    assert all(figure.value is not None and figure.goal for figure in found.figures)
    assert figures["Brier score, one domain worse"].met
    assert figures["promotions"].met
    assert figures["rollbacks after the return"].met
    assert figures["Brier score, people: harder questions"].met
    assert found.facts["questions"] == sum(small.values())
    assert found.pictures[0].read_bytes().startswith(b"\x89PNG")
