"""The latency model follows observed times, whatever its initial curve was."""

from hypothesis import given
from hypothesis import strategies as st

from cogumi.engine.llama.speculative.latency_model import UPDATE_INTERVAL, WINDOW, LatencyCurve, LatencyTracker

TRUE = [0.03 + 0.016 * i for i in range(16)]
curves = st.lists(st.floats(1e-4, 1.0), min_size=16, max_size=16).map(lambda c: LatencyCurve(0.01, tuple(c)))
passes = st.lists(st.tuples(st.integers(0, 20), st.floats(1e-4, 1.0)), max_size=200)


@given(curves, passes)
def test_cost_never_decreases_with_the_pass_size(before, seen):
    tracker = LatencyTracker(before)
    for tokens, seconds in seen:
        now = tracker.observe(tokens, seconds)
        assert list(now.verify) == sorted(now.verify)
        assert len(now.verify) == 16


@given(curves, st.lists(st.integers(1, 16), min_size=1, max_size=8, unique=True))
def test_observed_times_replace_the_measured_curve(before, sizes):
    tracker = LatencyTracker(before)
    for _ in range(WINDOW * UPDATE_INTERVAL):
        for tokens in sizes:
            now = tracker.observe(tokens, TRUE[tokens - 1])
    assert all(now.verify[tokens - 1] == TRUE[tokens - 1] for tokens in sizes)


def test_curve_measured_on_a_busy_machine_is_corrected():
    """The curve is flat because every pass waited for others, so drafting looks free until real passes are observed."""
    tracker = LatencyTracker(LatencyCurve(0.2, (1.6,) * 16))
    for _ in range(UPDATE_INTERVAL):
        tracker.observe(6, TRUE[5])
        tracker.observe(1, TRUE[0])
        now = tracker.observe(0, 0.006)
    assert (now.verify[0], now.verify[5], now.draft) == (TRUE[0], TRUE[5], 0.006)
    assert all(seconds <= TRUE[5] for seconds in now.verify[:6])


def test_short_slowdown_is_forgotten():
    before = LatencyCurve(0.006, tuple(TRUE))
    tracker = LatencyTracker(before)
    for _ in range(UPDATE_INTERVAL):
        now = tracker.observe(1, 2.0)
    assert now.verify[0] == 2.0
    for _ in range(WINDOW + UPDATE_INTERVAL):
        now = tracker.observe(1, TRUE[0])
    assert now == before
