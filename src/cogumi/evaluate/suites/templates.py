"""Suite `templates`: what examples before a question are worth to the base (SPEC F18), and how fast they are found.

The base answers held-out questions alone, with random examples of the domain, with the nearest ones, and with `GIVEN`
random ones that stand for a user's own, alone and filled up with near ones; in the prompt, and with an adapted head if
the bundle has one. Every gain is against the same questions answered alone, with a paired bootstrap of 95%.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cogumi.bundle.format import open_bundle
from cogumi.cascade.opening import open_cascade
from cogumi.cascade.template_bank import Pair, Templates
from cogumi.confidence.metrics import gained
from cogumi.confidence.nearest_examples import SHAPES
from cogumi.core.errors import CogumiError, ContextError
from cogumi.core.types import Example, Request
from cogumi.data.examples import read_examples, split_path
from cogumi.engine.protocol import Capability, Engine, replies
from cogumi.evaluate.suite import Figure, Findings, Task
from cogumi.grading.graders import grade_all

ROWS = 300
"""Held-out questions asked, at most."""
GIVEN = 1
MAX_TOKENS, SLOTS, CONTEXT = 64, 8, 512
ALONE, RANDOM, NEAREST = "alone", "random examples", "nearest examples"
OWN, COMBINED = "given examples", "given examples filled up"
ADAPTED = ", head adapted"

Show = Callable[[Example], tuple[Pair, ...]]


def ways(templates: Templates) -> dict[str, Show]:
    """What the base is shown before a question, by name."""

    def at_random(example: Example) -> tuple[Pair, ...]:
        return templates.at_random(_question(example), example.domain, max(SHAPES.values()))

    return {
        ALONE: lambda example: (),
        RANDOM: at_random,
        NEAREST: lambda example: templates.near(_question(example)),
        OWN: lambda example: at_random(example)[:GIVEN],
        COMBINED: lambda example: templates.filled_up(_question(example), at_random(example)[:GIVEN]),
    }


def answers(engine: Engine, examples: Sequence[Example], shown: Sequence[tuple[Pair, ...]], adapt: bool) -> list[str]:
    """The texts of the base's answers; what does not fit the context is asked without examples."""
    requests = []
    for example, pairs in zip(examples, shown, strict=True):
        alone = Request(messages=example.messages, max_tokens=MAX_TOKENS, speculate=False)
        asked = replace(alone, examples=pairs, adapt=adapt if pairs else None)
        try:
            engine.check(asked)
        except ContextError:
            asked = alone
        requests.append(asked)
    return [reply.text for reply in replies(engine, requests)]


def measure(base: Engine, templates: Templates, examples: Sequence[Example], task: Task) -> Findings:
    """All ways over all questions."""
    has_head = Capability.HEAD_ADAPTATION in base.capabilities
    table, tails = ways(templates), ["", ADAPTED] if has_head else [""]
    shown = {name: [show(example) for example in examples] for name, show in table.items()}
    correct: dict[str, NDArray[np.float64]] = {}
    for tail in tails:
        for name in table:
            if name == ALONE and tail:
                continue
            texts = answers(base, examples, shown[name], adapt=bool(tail))
            verdicts = grade_all(list(zip(examples, texts, strict=True)))
            right = correct[name + tail] = np.array([verdict.correct for verdict in verdicts], np.float64)
            task.progress(len(correct), len(tails) * len(table), {"accuracy": float(right.mean())})
    figures = [Figure(f"accuracy: {ALONE}", float(correct[ALONE].mean()), note=f"{len(examples)} questions")]
    for tail in tails:
        for name in [name for name in table if name != ALONE]:
            right, pairs = correct[name + tail], float(np.mean([len(one) for one in shown[name]]))
            gain, low, high = gained(correct[ALONE], right, task.seed)
            note = f"accuracy {right.mean():.3f}, {pairs:.1f} examples each"
            figures.append(Figure(f"accuracy gained: {name}{tail}", gain, low=low, high=high, note=note))
        better = max(float(correct[name + tail].mean()) for name in (OWN, NEAREST))
        combined = float(correct[COMBINED + tail].mean()) - better
        figures.append(Figure(f"combined against the better one{tail}", combined, ">= 0"))
    seconds = lookups(templates, examples)
    figures += [
        Figure("questions with a near example", float(np.mean([bool(pairs) for pairs in shown[NEAREST]]))),
        Figure("milliseconds to find examples, median", 1000 * float(np.median(seconds))),
        Figure("milliseconds to find examples, 95%", 1000 * float(np.quantile(seconds, 0.95)), "<= 30"),
    ]
    return Findings(figures, {"questions": len(examples), "head": has_head, "given": GIVEN})


def run(task: Task) -> Findings:
    """Measure `task.bundle` with held-out questions in `task.data`, or in the folder `data` beside the bundle."""
    if task.bundle is None:
        raise CogumiError("the suite templates needs a bundle; name its folder")
    bundle = open_bundle(task.bundle)
    if bundle.examples is None or bundle.embedder is None:
        raise CogumiError(f"{task.bundle} lacks examples or an embedder; build it with both")
    found = read_examples(split_path(task.data or task.bundle.parent / "data", "heldout"))
    order = np.random.default_rng(task.seed).permutation(len(found))[:ROWS]
    with closing(open_cascade(task.bundle, slots=SLOTS, context=CONTEXT)) as cascade:
        templates, base = cascade.services.templates, cascade.tiers.base
        assert templates is not None
        return measure(base, templates, [found[i] for i in order], task)


def lookups(templates: Templates, examples: Sequence[Example]) -> list[float]:
    """Seconds that each search took, embedding included; the bank was embedded before."""
    templates.near("once")
    seconds = []
    for example in examples:
        began = time.perf_counter()
        templates.near(_question(example))
        seconds.append(time.perf_counter() - began)
    return seconds


def _question(example: Example) -> str:
    return example.messages[-1].content
