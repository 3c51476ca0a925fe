"""Speculative decoding keeps greedy tokens and the sampling distribution; the choice of k minimises the time."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cogumi.engine.llama.speculative.latency_measurement import GPU
from cogumi.engine.llama.speculative.speculation import (
    PRIOR,
    Acceptance,
    Controller,
    LatencyCurve,
    best_k,
    expected_speedup,
    expected_tokens,
    verify_greedy,
    verify_sampled,
)
from support.latencies import accepted_run, draft_options, random_costs

VOCABULARY = 6


def model(seed, flat=1.0):
    """A language model: a distribution over the next id for every history."""

    def distribution(history):
        generator = np.random.default_rng([seed, len(history), *history])
        return generator.dirichlet(np.full(VOCABULARY, flat))

    return distribution


@given(st.integers(0, 10_000), st.integers(1, 10), st.integers(0, 100))
@settings(derandomize=True, deadline=None)
def test_greedy_speculation_equals_greedy_decoding(seed, k, draft_seed):
    base, draft = model(seed), model(seed if draft_seed % 3 == 0 else draft_seed)
    plain = []
    for _ in range(20):
        plain.append(int(base(plain).argmax()))
    written = []
    while len(written) < 20:
        drafted = []
        for _ in range(k):
            drafted.append(int(draft(written + drafted).argmax()))
        sampled = []

        def best(i, sofar=tuple(written), drafted=drafted, sampled=sampled):
            sampled.append(i)
            return int(base([*sofar, *drafted[:i]]).argmax())

        emitted = verify_greedy(drafted, best)
        assert sampled == list(range(len(emitted)))  # in order, each once, no more than needed
        assert 1 <= len(emitted) <= k + 1
        written += emitted
    assert written[:20] == plain


@pytest.mark.parametrize("draft_kind", ["sampled", "greedy", "disjoint"])
def test_sampled_speculation_has_the_distribution_of_plain_sampling(draft_kind):
    """Chi-square over all histories of three tokens, against the exact probabilities."""
    base, draft = model(1, 0.7), model(2, 0.7)
    if draft_kind == "disjoint":  # the draft proposes tokens that are impossible for the base, and vice versa
        half = np.arange(VOCABULARY) < VOCABULARY // 2

        def base(history, plain=base):
            return np.where(half, plain(history), 0) / plain(history)[half].sum()

        def draft(history, plain=draft):
            return np.where(half, 0, plain(history)) / plain(history)[~half].sum()

    generator = np.random.default_rng(3)
    counts = np.zeros((VOCABULARY,) * 3)
    n, k = 12_000, 2
    tables = {}

    def known(kind, function, history):
        key = (kind, *history)
        if key not in tables:
            tables[key] = function(history)
        return tables[key]

    for _ in range(n):
        written = []
        while len(written) < 3:
            drafted, q = [], []
            for _ in range(k):
                row = known("draft", draft, written + drafted)
                token = int(row.argmax()) if draft_kind == "greedy" else int(generator.choice(VOCABULARY, p=row))
                q.append(row)
                drafted.append(token)
            sampled = []

            def p(i, sofar=tuple(written), drafted=drafted, sampled=sampled):
                sampled.append(i)
                return known("base", base, [*sofar, *drafted[:i]])

            emitted = verify_sampled(drafted, None if draft_kind == "greedy" else q, p, generator)
            assert sampled == list(range(len(emitted)))
            written += emitted
        counts[tuple(written[:3])] += 1
    exact = np.zeros_like(counts)
    for a in range(VOCABULARY):
        for b in range(VOCABULARY):
            exact[a, b] = known("base", base, [])[a] * known("base", base, [a])[b] * known("base", base, [a, b])
    assert counts[exact == 0].sum() == 0
    often = exact * n >= 5
    seen, awaited = counts[often], exact[often] * n
    rest = n - awaited.sum()
    if rest > 5:
        seen, awaited = np.append(seen, n - seen.sum()), np.append(awaited, rest)
    assert stats.chisquare(seen, awaited * seen.sum() / awaited.sum()).pvalue > 1e-4


def test_draft_equal_to_the_base_is_always_accepted():
    p = np.random.default_rng(0).dirichlet(np.ones(VOCABULARY), size=6)
    generator = np.random.default_rng(1)
    for _ in range(200):
        drafted = [int(generator.choice(VOCABULARY, p=row)) for row in p[:5]]
        assert verify_sampled(drafted, p[:5], p.__getitem__, generator)[:5] == drafted


@given(st.floats(0, 1), st.integers(0, 10))
@settings(derandomize=True, deadline=None)
def test_expected_tokens_are_the_accepted_run_plus_one(acceptance, k):
    direct = 1 + sum(acceptance**i for i in range(1, k + 1))
    assert expected_tokens(acceptance, k) == pytest.approx(direct, rel=1e-6)


curves = st.lists(st.floats(0.1, 5), min_size=1, max_size=9).map(lambda x: np.cumsum(x).tolist())


@given(st.floats(0, 1), st.floats(0, 5), curves)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_best_k_has_no_regret(acceptance, draft_cost, verify_costs):
    k = best_k(acceptance, draft_cost, verify_costs)
    speedups = [expected_speedup(acceptance, i, draft_cost, verify_costs) for i in range(len(verify_costs))]
    assert speedups[0] == pytest.approx(1)
    assert speedups[k] == max(speedups)


def test_best_k_on_known_machines():
    """On a two-core laptop, verifying 6 tokens costs 4 steps, so k = 5 loses; on a GPU, verification is free."""
    laptop = [32.0, 54.0, 70.0, 84.0, 106.0, 128.0]
    assert expected_speedup(0.75, 5, 6.5, laptop) < 0.95
    assert best_k(0.5, 6.5, laptop) == 0
    gpu = [10.0] * 6
    assert best_k(0.75, 1.0, gpu) >= 3
    assert expected_speedup(0.75, 5, 1.0, gpu) == pytest.approx(expected_tokens(0.75, 5) / 1.5)


def test_running_acceptance_estimates_the_rate_from_tested_tokens_only():
    generator = random.Random(0)
    for rate in (0.1, 0.8):
        acceptance = Acceptance()
        assert acceptance.rate == pytest.approx(PRIOR)
        for _ in range(2000):
            acceptance.update(5, accepted_run(generator, rate, 5))
        assert acceptance.rate == pytest.approx(rate, abs=0.1)


def test_acceptance_of_a_request_starts_from_the_engines_and_diverges():
    controller = Controller(GPU)
    early = controller.tracker()
    for _ in range(100):
        controller.learn(controller.tracker(), "model", 5, 0)
    assert controller.tracker().acceptance["model"].rate == pytest.approx(controller.rate("model"))
    assert early.acceptance["model"].rate == controller.rate("model") < 0.1  # follows the prior while it has no data
    for _ in range(20):
        controller.learn(early, "model", 5, 5)
    assert early.acceptance["model"].rate > 0.99  # the prior has faded
    assert controller.rate("ngram") == pytest.approx(PRIOR)


# LatencyCurve


def test_costs_are_monotone_and_extrapolated_linearly():
    costs = LatencyCurve(0.0, (1.0, 3.0, 2.0, 4.0))
    assert [costs.seconds(n) for n in range(1, 5)] == [1.0, 3.0, 3.0, 4.0]
    assert costs.step == 1.0
    assert costs.seconds(7) - costs.seconds(6) == pytest.approx(costs.seconds(6) - costs.seconds(5)) == 0.5
    assert LatencyCurve(0.0, (2.0,)).seconds(3) == 6.0


@given(st.lists(st.integers(0, 15), min_size=1, max_size=6), st.integers(0, 50))
@settings(derandomize=True, deadline=None)
def test_each_pass_takes_equally_many_tokens_of_every_sequence(drafted, seed):
    costs = random_costs(seed)
    left, seconds = [k + 1 for k in drafted], 0.0
    while left:
        seconds += costs.seconds(len(left) * min(left))
        left = [n - min(left) for n in left if n > min(left)]
    assert costs.passes(drafted) == pytest.approx(seconds)


# The best turn for known acceptance rates


permilles, limits, seeds = st.integers(1, 999), st.integers(0, 15), st.integers(0, 10_000)


@given(permilles, permilles, limits, limits, seeds)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_best_source_and_k_for_one_request(model_rate, ngram_rate, most_model, most_ngram, seed):
    costs = random_costs(seed)
    turn = Controller(costs).best(
        [draft_options({"model": most_model, "ngram": most_ngram}, model=model_rate, ngram=ngram_rate)]
    )
    speeds = {(None, 0): 1 / costs.step}
    for k in range(1, most_model + 1):
        speeds["model", k] = expected_tokens(model_rate / 1000, k) / (costs.seconds(k + 1) + k * costs.draft)
    for k in range(1, most_ngram + 1):
        speeds["ngram", k] = expected_tokens(ngram_rate / 1000, k) / costs.seconds(k + 1)
    (choice,) = turn.choices
    assert speeds[choice.source, choice.k] == pytest.approx(max(speeds.values()))
    assert turn.tokens / turn.seconds == pytest.approx(max(speeds.values()))


@given(st.lists(permilles, min_size=1, max_size=4), seeds)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_best_subset_and_k_for_several_requests(rates, seed):
    costs, n = random_costs(seed), len(rates)
    turn = Controller(costs).best([draft_options({"model": 15}, model=rate, ngram=500) for rate in rates])
    best = 0.0
    for drafting in itertools.product((False, True), repeat=n):
        for k in range(1, 16):
            m = sum(drafting)
            tokens = sum(expected_tokens(rate / 1000, k) if on else 1 for rate, on in zip(rates, drafting, strict=True))
            apart = costs.seconds(n) + costs.seconds(m * k) + k * costs.drafting(m) if m else costs.seconds(n)
            best = max(best, tokens / (costs.seconds(n * (k + 1)) + k * costs.drafting(m) if m == n else apart))
    assert turn.tokens / turn.seconds == pytest.approx(best)


option_lists = st.builds(
    lambda model, ngram, a, b: draft_options({"model": a, "ngram": b}, model=model, ngram=ngram),
    permilles,
    permilles,
    limits,
    limits,
)


@given(st.lists(option_lists, max_size=8), seeds)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_turn_respects_the_limits_and_its_own_estimates(option_lists, seed):
    costs = random_costs(seed)
    turn = Controller(costs).best(option_lists)
    drafted = [choice.k for choice in turn.choices]
    tokens = 0.0
    for choice, wanted in zip(turn.choices, option_lists, strict=True):
        if choice.k == 0:
            assert choice.source is None
            tokens += 1
        else:
            assert choice.k <= wanted.limits[choice.source]
            assert choice.k == max(drafted) or choice.k == max(wanted.limits.values())
            tokens += expected_tokens(wanted.tracker.acceptance[choice.source].rate, choice.k)
    drafting = max(drafted, default=0) * costs.drafting(sum(choice.source == "model" for choice in turn.choices))
    assert turn.tokens == pytest.approx(tokens)
    assert turn.seconds >= (costs.passes(drafted) + drafting) * (1 - 1e-9)
    if option_lists:
        plain = len(option_lists) / costs.seconds(len(option_lists))
        assert turn.tokens / turn.seconds >= plain * (1 - 1e-9)


def test_sequences_with_fewer_tokens_left_draft_fewer_when_passes_are_free():
    turn = Controller(GPU).best([draft_options({"ngram": 15}, ngram=990), draft_options({"ngram": 3}, ngram=990)])
    assert [choice.k for choice in turn.choices] == [15, 3]
