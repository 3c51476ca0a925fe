"""The embedded synthetic world (SPEC A2): six domains, five difficulties, an automatic check for every question.

One file per domain; each offers `make(difficulty, rng) -> Task`, and `UNANSWERABLE`, its kinds of unanswerable
questions. A difficulty is a fixed family of questions; the families are listed in the docstring of each file and were
frozen before the first measured build.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import ModuleType

from cogumi.data.world import code, commonsense, math, reading, reasoning, tools
from cogumi.data.world.task import Task

DOMAINS: Mapping[str, ModuleType] = {
    "math": math,
    "code": code,
    "reasoning": reasoning,
    "tools": tools,
    "reading": reading,
    "commonsense": commonsense,
}
DIFFICULTIES = (1, 2, 3, 4, 5)

UNANSWERABLE: Mapping[str, tuple[str, Callable[[random.Random], Task]]] = {
    kind: (domain, make) for domain, module in DOMAINS.items() for kind, make in module.UNANSWERABLE.items()
}
"""Kind -> (domain, generator)."""


def make(domain: str, difficulty: int, rng: random.Random) -> Task:
    """One question of a domain and difficulty; the same generator state gives the same question."""
    task: Task = DOMAINS[domain].make(difficulty, rng)
    return task
