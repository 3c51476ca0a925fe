"""Suite `cloze`: multiple-choice questions, answered by the likelihood of each choice's text (SPEC H2).

The model sees the bare question, never the other choices, and generates nothing: each choice is scored as the
continuation of "Question: ...", new line, "Answer:", without chat template and examples. `acc` takes the choice of the
largest log-likelihood; `acc_norm` divides it by the choice's characters first (the tasks arc_easy, arc_challenge and
piqa of lm-evaluation-harness, Gao et al. 2021). Of a bundle, the base is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from cogumi.cascade.opening import open_cascade
from cogumi.confidence.metrics import wilson
from cogumi.core.errors import CogumiError, DataError
from cogumi.core.types import Example, Request
from cogumi.data.sources.multiple_choice import ChoiceQuestion, choice_question
from cogumi.data.sources.question_files import iterate
from cogumi.engine.protocol import Engine
from cogumi.evaluate.suite import Figure, Findings, Task

PROMPT, CHOICE = "Question: {question}\nAnswer:", " {choice}"
AT_ONCE = 8
"""Questions in flight. The engine has twice as many slots, so that a question stays cached between its choices."""
MOST = 4096
"""Largest context in tokens; a longer row ends the suite."""
ENDINGS = {".json", ".jsonl"}


@dataclass(frozen=True, slots=True)
class ChoiceRows:
    """The multiple-choice questions of a file, and the number of its other rows."""

    name: str
    questions: Sequence[ChoiceQuestion]
    others: int


def run(task: Task) -> Findings:
    """Measure the model or bundle `task.bundle` on the file `task.data`, or on all files of that folder.

    Raises `CogumiError` without a model or data, `DataError` if no row has choices.
    """
    if task.bundle is None or task.data is None:
        raise CogumiError("name a model or a bundle, and with --data a file of multiple-choice questions")
    files = read_rows(task.data, task.limit)
    total = sum(len(rows.questions) for rows in files)
    size = min(max(map(_bytes, (q for rows in files for q in rows.questions))), MOST)
    figures: list[Figure] = []
    done = 0
    opened = open_cascade(task.bundle, slots=2 * AT_ONCE, context=size, threads=task.threads)
    with closing(opened) as engine, ThreadPoolExecutor(AT_ONCE) as pool:
        for rows in files:
            found: list[tuple[bool, bool]] = []
            for picked in pool.map(partial(picks, engine), rows.questions):
                found.append(picked)
                done += 1
                task.progress(done, total, {})
            figures += _figures(rows, found)
    facts = {
        "form": f"{PROMPT.format(question='...')!r} continued by {CHOICE.format(choice='...')!r}",
        "settings": "no examples, no chat template; acc: by log-likelihood, acc_norm: by log-likelihood per character",
        "model": str(task.bundle),
    }
    for rows in files:
        if rows.others:
            facts[rows.name] = f"{rows.others} rows without choices, or without a right one, are left out"
    return Findings(figures, facts)


def read_rows(data: Path, most: int | None) -> list[ChoiceRows]:
    """The first `most` rows of a file, or of every JSON file in a folder; `DataError` if no row has choices."""
    found = []
    for path in sorted(p for p in data.rglob("*") if p.suffix in ENDINGS) if data.is_dir() else [data]:
        rows = list(islice(iterate(path), most))
        questions = [q for row in rows if isinstance(row, Example) and (q := choice_question(row))]
        found.append(ChoiceRows("/".join(path.with_suffix("").parts[-2:]), questions, len(rows) - len(questions)))
    if not any(rows.questions for rows in found):
        raise DataError(f"{data} has no row with choices; docs/your-data.md shows the forms of such rows")
    return found


def picks(engine: Engine, question: ChoiceQuestion) -> tuple[bool, bool]:
    """Whether the likeliest choice is the right one; and the likeliest per character.

    The choices are scored one after the other, because the engine keeps the question in its cache.
    """
    request = Request(prompt=PROMPT.format(question=question.question))
    nats = [engine.score(request, CHOICE.format(choice=choice)).nats for choice in question.choices]
    per_character = [x / len(choice) for x, choice in zip(nats, question.choices, strict=True)]
    return nats.index(min(nats)) == question.right, per_character.index(min(per_character)) == question.right


def standard_error(share: float, n: int) -> float:
    """The standard error of a mean of `n` outcomes 0 or 1, from their sample variance; nan for one outcome."""
    return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan


def _figures(rows: ChoiceRows, found: Sequence[tuple[bool, bool]]) -> Iterator[Figure]:
    n = len(found)
    if not n:
        return
    guessing = sum(1 / len(question.choices) for question in rows.questions) / n
    for at, name in enumerate(("acc", "acc_norm")):
        right = sum(picked[at] for picked in found)
        note = f"SE {standard_error(right / n, n):.4f}, n {n}, guessing {guessing:.3f}"
        yield Figure(f"{rows.name} {name}", right / n, "", *wilson(right, n), note)


def _bytes(question: ChoiceQuestion) -> int:
    """A bound on the tokens of a question with any of its choices: their bytes, and the tokens a model may add."""
    texts = (PROMPT.format(question=question.question) + CHOICE.format(choice=c) for c in question.choices)
    return max(len(text.encode()) for text in texts) + 8
