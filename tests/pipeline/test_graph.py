"""`pipeline.graph`: order of steps, cycles, and the number of steps that can run concurrently."""

from itertools import combinations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cogumi.pipeline.build import threads_of
from cogumi.pipeline.fingerprint import plan
from cogumi.pipeline.graph import beside, in_order, width
from cogumi.pipeline.recipe import load_recipe

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def graphs(draw):
    """Acyclic graphs with keys in any order."""
    names = [str(i) for i in range(draw(st.integers(1, 7)))]
    needs = {name: draw(st.lists(st.sampled_from(names[:i]), unique=True)) if i else [] for i, name in enumerate(names)}
    return {name: needs[name] for name in draw(st.permutations(names))}


def reachable(graph, step):
    return {step}.union(*(reachable(graph, needed) for needed in graph[step]))


@PATIENT
@given(graphs())
def test_order_is_topological_and_stable(graph):
    order = in_order(graph)
    assert sorted(order) == sorted(graph)
    keys = list(graph)
    for i, step in enumerate(order):
        ready = [one for one in keys if one not in order[:i] and set(graph[one]) <= set(order[:i])]
        assert step == ready[0]
    assert in_order({step: graph[step] for step in order}) == order  # an ordered recipe keeps its order


@PATIENT
@given(graphs())
def test_width_is_the_largest_set_of_independent_steps(graph):
    above = {step: reachable(graph, step) for step in graph}

    def independent(steps):
        return all(a not in above[b] and b not in above[a] for a, b in combinations(steps, 2))

    sizes = [n for n in range(1, len(graph) + 1) if any(map(independent, combinations(graph, n)))]
    assert width(graph) == max(sizes)


def test_cycle_is_named_without_the_steps_that_only_lead_to_it():
    graph = {"start": (), "late": ("b",), "a": ("start", "c"), "b": ("a",), "c": ("b",)}
    with pytest.raises(
        ValueError, match=r"^the steps form a cycle: 'b' needs 'a' and 'a' needs 'c' and 'c' needs 'b'; "
    ):
        in_order(graph)


def test_width_of_the_tiny_recipe():
    """Modifiers and their controls, the draft, and two networks without inputs."""
    assert width(load_recipe("tiny").graph) == 9


def test_steps_that_may_run_beside_each_other():
    graph = {"a": [], "b": ["a"], "c": ["a"], "d": ["b"], "e": []}
    found = beside(graph)
    assert found == {"a": {"e"}, "b": {"c", "e"}, "c": {"b", "d", "e"}, "d": {"c", "e"}, "e": {"a", "b", "c", "d"}}


@given(graphs())
def test_beside_is_mutual_and_never_a_dependency(graph):
    found = beside(graph)
    for step, others in found.items():
        assert all(step in found[other] for other in others)
        assert not others & set(graph[step])


def test_a_step_beside_light_ones_only_gets_all_threads(monkeypatch):
    """In `smollm2` the modifiers share the threads; nothing heavy runs beside the base or the calibration."""
    recipe = load_recipe("smollm2")
    monkeypatch.setattr("cogumi.pipeline.build.usable_threads", lambda: 2)
    found = threads_of(recipe, plan(recipe, 7), 2)
    assert {found[name] for name in ("math", "code", "tools")} == {1}
    assert {found[name] for name in ("responses", "calibration", "report")} == {2}
    assert set(threads_of(recipe, plan(recipe, 7), 1).values()) == {2}
