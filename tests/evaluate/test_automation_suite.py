"""The suite `automation`: the perfect actor reaches every goal, a model's turns are played and judged."""

import json
import random
from types import SimpleNamespace

import pytest

from cogumi.core.errors import CogumiError
from cogumi.core.types import Reply, Usage
from cogumi.data.world.automation import make, play
from cogumi.evaluate.suite import Task
from cogumi.evaluate.suites import automation_tasks as automation
from support.bundle import make_bundle


def test_actors_and_a_model_are_measured_on_the_same_tasks(tmp_path):
    done = []
    task = Task(make_bundle(tmp_path), limit=2, progress=lambda at, of, figures: done.append((at, of)))
    found = {figure.name: figure.value for figure in automation.run(task).figures}
    assert found["perfect: success"] == found["perfect: recovery"] == 1.0
    assert found["random: success"] <= 0.2
    assert 0 <= found["model: success"] <= 1
    assert all(f"model: success, family {family}" in found for family in range(1, 6))
    assert done[-1] == (10, 10)
    with pytest.raises(CogumiError, match="name a model"):
        automation.run(Task())


class Scripted:
    """An engine that gives prepared texts in turn, and keeps the requests."""

    def __init__(self, *texts):
        self.texts, self.requests = list(texts), []

    def generate(self, request):
        self.requests.append(request)
        return [SimpleNamespace(reply=Reply(self.texts.pop(0), (), "stop", Usage(1, 1)))]


def test_a_models_calls_are_run_and_their_results_shown(monkeypatch):
    monkeypatch.setattr(automation, "final_reply", lambda events: events[-1].reply)
    env = make(1, random.Random(4))
    name = env.goal.split()[-1].rstrip("?")
    engine = Scripted(
        json.dumps({"tool": "find_person", "args": {"name": name}}),
        '{"tool": "phone", "args": {"id": 0}}',
        '{"x',
        "I give up",
    )
    outcome = play(env, automation.model_actor(engine))
    assert (outcome.success, outcome.turns, outcome.mistakes) == (False, 3, 2)
    last = engine.requests[-1].messages
    assert "phone(id)" in last[0].content
    assert last[1].content == env.goal
    assert last[3].content.startswith('Result: [{"id": ')
    assert "there is no person with id 0" in last[5].content
