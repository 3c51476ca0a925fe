"""Suite `automation`: a model acts in the automation world, beside a random and a perfect actor (SPEC A2b, H2).

`success` is the share of tasks whose goal was reached within the turns; `recovery` that of tasks of family 5 in which
an error was met; `mistakes` are calls per task that do not fit the tools. Of a bundle, the base is asked.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from cogumi.cascade.opening import open_cascade
from cogumi.confidence.metrics import wilson
from cogumi.core.errors import CogumiError, ContextError
from cogumi.core.types import Message, Request
from cogumi.data.world.automation import (
    FAMILIES,
    TURNS,
    Actor,
    Arguments,
    Environment,
    Outcome,
    make,
    perfect,
    play,
    random_actor,
)
from cogumi.engine.protocol import Engine, final_reply
from cogumi.evaluate.suite import Figure, Findings, Task
from cogumi.grading.tool_calls import calls_in

TASKS, AT_ONCE, MAX_TOKENS, CONTEXT = 40, 8, 96, 2048
"""Tasks of each family, unless `limit` says fewer; tasks in flight; tokens of one turn; tokens of all turns."""
SYSTEM = """Reach the goal with these tools:
{tools}

Each turn, reply with the JSON of one call and nothing else: {{"tool": name, "args": {{parameter: value}}}}
You then see its result. When the goal is reached, reply with the answer, or with: done"""


def run(task: Task) -> Findings:
    """Measure the actors, and the model or bundle `task.bundle`. Raises `CogumiError` without one."""
    if task.bundle is None:
        raise CogumiError("name a model or a bundle, such as smollm2")
    number = min(task.limit or TASKS, TASKS)
    figures: list[Figure] = []
    for name in ("random", "perfect"):
        rng = random.Random(task.seed)
        actor = random_actor(rng)
        found = [perfect(env) if name == "perfect" else play(env, actor) for env in tasks(number, task.seed)]
        figures += _figures(name, found)
    opened = open_cascade(task.bundle, slots=AT_ONCE, context=CONTEXT, threads=task.threads)
    outcomes: list[Outcome] = []
    with closing(opened) as cascade, ThreadPoolExecutor(AT_ONCE) as pool:
        engine = cascade.resolve("cogumi:base", _request([]))[0]
        for outcome in pool.map(lambda env: play(env, model_actor(engine)), tasks(number, task.seed)):
            outcomes.append(outcome)
            task.progress(len(outcomes), number * len(FAMILIES), {})
    figures += _figures("model", outcomes)
    facts = {"tasks": f"{number} of each family, at most {TURNS} turns", "model": str(task.bundle)}
    return Findings(figures, facts)


def tasks(number: int, seed: int) -> Iterator[Environment]:
    """The tasks of a run, the same for every actor."""
    return (make(family, random.Random(f"{seed}/{family}/{i}")) for family in FAMILIES for i in range(number))


def _request(messages: Sequence[Message]) -> Request:
    return Request(messages=tuple(messages) or (Message("user", ""),), max_tokens=MAX_TOKENS)


def model_actor(engine: Engine) -> Actor:
    """A model that sees the goal, the tools and all results; what is no call is its last words."""

    def act(env: Environment, seen: Sequence[tuple[str, str]]) -> Sequence[tuple[str, Arguments]] | str:
        messages = [Message("system", SYSTEM.format(tools=env.describe())), Message("user", env.goal)]
        for said, result in seen:
            messages += [Message("assistant", said), Message("user", f"Result: {result}")]
        try:
            text = final_reply(engine.generate(_request(messages))).text
            calls: list[Any] = calls_in(text)
        except ContextError:
            return "the conversation is longer than the context"
        except ValueError:
            env.mistakes += 1
            return text
        return [(call.tool, call.arguments) for call in calls[:1]] or text

    return act


def _figures(name: str, found: Sequence[Outcome]) -> Iterator[Figure]:
    for family in FAMILIES:
        mine = [outcome for outcome in found if outcome.family == family]
        won = sum(outcome.success for outcome in mine)
        yield Figure(
            f"{name}: success, family {family}", won / len(mine), "", *wilson(won, len(mine)), f"n {len(mine)}"
        )
    won = sum(outcome.success for outcome in found)
    mistakes = sum(outcome.mistakes for outcome in found) / len(found)
    note = f"n {len(found)}, {mistakes:.1f} mistakes per task"
    yield Figure(f"{name}: success", won / len(found), "", *wilson(won, len(found)), note)
    met = [outcome for outcome in found if outcome.faults]
    if met:
        recovered = sum(outcome.success for outcome in met)
        yield Figure(f"{name}: recovery", recovered / len(met), "", *wilson(recovered, len(met)), f"n {len(met)}")
