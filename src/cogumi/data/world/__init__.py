"""The embedded world (SPEC A2): eleven synthetic domains and `knowledge` of the real world.

Five difficulties each, and an automatic check for every question.

One file per domain; each offers `make(difficulty, rng, wording) -> Task`, and `UNANSWERABLE`, its kinds of unanswerable
questions. A difficulty is a fixed family of questions; the families are listed in the docstring of each file and were
frozen before the first measured build.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import ModuleType

from cogumi.data.world import (
    code,
    commonsense,
    creative,
    finance,
    instructions,
    knowledge,
    math,
    reading,
    reasoning,
    science,
    summarization,
    tools,
)
from cogumi.data.world.task import Maker, Task, Wording

DOMAINS: Mapping[str, ModuleType] = {
    "math": math,
    "code": code,
    "reasoning": reasoning,
    "tools": tools,
    "reading": reading,
    "commonsense": commonsense,
    "knowledge": knowledge,
    "summarization": summarization,
    "science": science,
    "instructions": instructions,
    "finance": finance,
    "creative": creative,
}
SYNTHETIC = ("math", "code", "reasoning", "tools", "reading", "commonsense")
"""The default: the domains that a model trained from nothing learns."""
DIFFICULTIES = (1, 2, 3, 4, 5)

UNANSWERABLE: Mapping[str, tuple[str, Maker]] = {
    kind: (domain, make) for domain, module in DOMAINS.items() for kind, make in module.UNANSWERABLE.items()
}
"""Kind -> (domain, generator)."""


def make(domain: str, difficulty: int, rng: random.Random, wording: Wording = "terse") -> Task:
    """One question of a domain and difficulty; the same generator state gives the same question."""
    task: Task = DOMAINS[domain].make(difficulty, rng, wording)
    return task
