"""The automation world: tasks can be solved, are judged by their state, and tell mistakes from errors in the way."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi.data.world.automation import FAMILIES, TURNS, Environment, Tool, make, perfect, play, random_actor


@given(st.sampled_from(FAMILIES), st.integers(0, 10**6))
def test_every_task_can_be_solved_without_a_mistake(family, seed):
    env = make(family, random.Random(seed))
    outcome = perfect(env)
    assert (outcome.success, outcome.mistakes) == (True, 0)
    assert (outcome.faults > 0) == (family == 5)


@given(st.sampled_from(FAMILIES), st.integers(0, 10**6))
def test_equal_seeds_make_equal_tasks(family, seed):
    one, other = (make(family, random.Random(seed)) for _ in range(2))
    assert (one.goal, one.describe()) == (other.goal, other.describe())


@given(st.sampled_from(FAMILIES), st.integers(0, 10**6))
def test_nothing_is_reached_by_doing_nothing_or_by_a_second_time(family, seed):
    env = make(family, random.Random(seed))
    assert not env.succeeded("")
    assert not env.succeeded("done")
    env.solve(env)
    if family == 4:
        return  # the shops have no more
    if family != 1:
        env.solve(env)
        assert not env.succeeded("done")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_actor_reaches_little(family):
    outcomes = [play(make(family, random.Random(seed)), random_actor(random.Random(seed))) for seed in range(200)]
    assert sum(outcome.success for outcome in outcomes) <= 4
    assert all(outcome.turns <= TURNS for outcome in outcomes)


def test_calls_that_do_not_fit_are_mistakes():
    env = make(2, random.Random(1))
    assert "there is no tool fly" in env.call("fly", {})["error"]
    assert "order takes person_id, item_id, count" in env.call("order", {"person_id": 1})["error"]
    assert "must be a whole number" in env.call("order", {"person_id": "x", "item_id": 1, "count": 1})["error"]
    assert "there is no person Nobody" in env.call("find_person", {"name": "Nobody"})["error"]
    assert env.mistakes == 4
    assert not env.faults


def test_errors_in_the_way_are_told_and_can_be_overcome():
    env = make(5, random.Random(3))
    first = next(iter(env.tools))
    assert env.call(first, dict.fromkeys(env.tools[first].parameters, "x"))["error"] == "busy, try again"
    assert (env.faults, env.mistakes) == (1, 0)
    last = list(env.tools)[-1]
    assert env.tools[last].parameters[-1] == "code"
    env.call(last, dict.fromkeys(env.tools[last].parameters, 0))
    assert "to confirm" in env.call(last, dict.fromkeys(env.tools[last].parameters, 0))["error"]


def test_a_play_ends_with_last_words_or_with_the_turns():
    seen = []
    tools = {"add": Tool("adds", ("x",), lambda given: {"sum": given["x"] + 1})}
    env = Environment("Say 3.", 1, tools, lambda answer: answer == "3", lambda env: "3")

    def act(env, turns):
        seen.append(list(turns))
        return "3" if len(turns) == 2 else [("add", {"x": len(turns)})]

    outcome = play(env, act)
    assert (outcome.success, outcome.turns) == (True, 3)
    assert [json.loads(result) for _, result in seen[-1]] == [[{"sum": 1}], [{"sum": 2}]]
    endless = play(env, lambda env, turns: [("add", {"x": 1})], turns=4)
    assert (endless.success, endless.turns) == (False, 4)
