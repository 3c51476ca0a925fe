"""Suite `templates`: accuracy gained by few-shot examples (SPEC F18), and time to find them.

The base answers held-out questions without examples, with random examples of the domain, with the nearest ones, with
`GIVEN` random ones (which stand for a user's own), and with these plus near ones. Examples are put in the prompt or, if
the bundle has an adaptable head, used to adapt it. Gains are relative to the same questions without examples, with 95%
bounds by a paired bootstrap.
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
from cogumi.confidence.metrics import bootstrap_gain
from cogumi.confidence.nearest_examples import EXAMPLE_COUNTS
from cogumi.core.errors import CogumiError, ContextError
from cogumi.core.types import Example, Request
from cogumi.data.examples import read_examples, split_path
from cogumi.engine.protocol import Capability, Engine, replies
from cogumi.evaluate.suite import Figure, Findings, Task
from cogumi.grading.graders import grade_all

ROWS = 300
"""Most held-out questions used."""
GIVEN = 1
MAX_TOKENS, SLOTS, CONTEXT = 64, 8, 512
ALONE, RANDOM, NEAREST = "alone", "random examples", "nearest examples"
OWN, COMBINED = "given examples", "given examples filled up"
ADAPTED = ", head adapted"

Selector = Callable[[Example], tuple[Pair, ...]]


def selectors(templates: Templates) -> dict[str, Selector]:
    """The ways to select few-shot examples for a question, by name."""

    def at_random(example: Example) -> tuple[Pair, ...]:
        return templates.random_examples(_question(example), example.domain, max(EXAMPLE_COUNTS.values()))

    return {
        ALONE: lambda example: (),
        RANDOM: at_random,
        NEAREST: lambda example: templates.similar(_question(example)),
        OWN: lambda example: at_random(example)[:GIVEN],
        COMBINED: lambda example: templates.fill_up(_question(example), at_random(example)[:GIVEN]),
    }


def answers(engine: Engine, examples: Sequence[Example], shown: Sequence[tuple[Pair, ...]], adapt: bool) -> list[str]:
    """The base's answers; questions whose examples do not fit the context are asked without examples."""
    requests = []
    for example, pairs in zip(examples, shown, strict=True):
        alone = Request(messages=example.messages, max_tokens=MAX_TOKENS, speculate=False)
        request = replace(alone, examples=pairs, adapt=adapt if pairs else None)
        try:
            engine.check(request)
        except ContextError:
            request = alone
        requests.append(request)
    return [reply.text for reply in replies(engine, requests)]


def measure(base: Engine, templates: Templates, examples: Sequence[Example], task: Task) -> Findings:
    """Measure all selectors on all questions, with and without an adapted head."""
    has_head = Capability.HEAD_ADAPTATION in base.capabilities
    table, tails = selectors(templates), ["", ADAPTED] if has_head else [""]
    shown = {name: [select(example) for example in examples] for name, select in table.items()}
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
            gain, low, high = bootstrap_gain(correct[ALONE], right, task.seed)
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
        raise CogumiError("the suite 'templates' needs a bundle; name its folder")
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
    """Seconds of each search, including the embedding of the question but not that of the bank."""
    templates.similar("once")
    seconds = []
    for example in examples:
        began = time.perf_counter()
        templates.similar(_question(example))
        seconds.append(time.perf_counter() - began)
    return seconds


def _question(example: Example) -> str:
    return example.messages[-1].content
