"""Suite `deliberation`: gain and cost of self-consistency votes and self-critique on hard questions (SPEC F13, F14).

The cascade answers questions of difficulty 3 and above greedily. Then the tier that gave the answer is sampled for a
vote, or its answer is criticised and generated again. One of these methods is chosen on the selection split; all are
measured on held-out questions. A vote without a majority keeps the cascade's answer. Gains are relative to the
cascade's own answers to the same questions, with 95% bounds by a paired bootstrap (Efron 1979).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cogumi.cascade.cascade import Cascade
from cogumi.cascade.opening import open_cascade
from cogumi.cascade.self_consistency import SAMPLING, Sampling, finish, vote
from cogumi.cascade.self_critique import Critic, improve
from cogumi.confidence.critic_net import FILE, critic_input, load_critic
from cogumi.confidence.metrics import auroc, bootstrap_gain
from cogumi.confidence.vote import final_answer
from cogumi.core.errors import CogumiError
from cogumi.core.pictures import legend_below, new_figure
from cogumi.core.types import Example, Reply, Request
from cogumi.data.examples import read_examples, split_path
from cogumi.engine.protocol import Engine, replies
from cogumi.evaluate.suite import Figure, Findings, Task
from cogumi.grading.graders import grade_all
from cogumi.train.critic import error_type, question_of

HARD = 3
"""Least difficulty of a hard question."""
ROWS: Mapping[str, int] = {"selection": 120, "heldout": 480}
"""Most hard questions used of each split."""
START, MODE = "balanced", "accurate"
"""The mode of the first answers, and the mode that includes deliberation."""
MAX_TOKENS, SLOTS, CONTEXT, TOGETHER = 64, 16, 256, 8
COOL = Sampling(temperature=0.5, frequency_penalty=0.0)
WARM = replace(SAMPLING, frequency_penalty=0.0)
VOTES = "5 votes"
_ANSWERS = "the cascade's answers"
NEAR, LONG = 1, 10
"""Permitted distance in tokens between the critic's passage and the first wrong token; least length of answers."""

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FirstAnswer:
    """A hard question, the cascade's answer, and the request for more answers of its tier."""

    example: Example
    reply: Reply
    request: Request


@dataclass(frozen=True, slots=True)
class Outcome:
    """The final text and the number of tokens generated after the first answer.

    `agreement` is that of the votes, `support` the share of votes equal to the first answer.
    """

    text: str
    tokens: int
    agreement: float = 0.0
    support: float = 0.0


Method = Callable[[FirstAnswer], Outcome]


def by_votes(engine: Engine, sampling: Sampling, start: FirstAnswer) -> Outcome:
    """The majority of the sampled answers, or the first answer without a majority."""
    found = finish(vote(engine, start.request, sampling=sampling))
    first = final_answer(start.reply.text)
    support = float(np.mean([final_answer(reply.text) == first for reply in found.replies]))
    text = start.reply.text if found.text is None else found.text
    return Outcome(text, found.usage.completion_tokens, found.agreement, support)


def by_critique(engine: Engine, critic: Critic, rounds: int, answers: int, hint: bool, start: FirstAnswer) -> Outcome:
    """The answer with the critic's highest score; with `hint` the critique is part of the new prompt."""
    found = finish(improve(engine, start.request, start.reply, critic, rounds=rounds, answers=answers, hint=hint))
    return Outcome(found.reply.text, found.usage.completion_tokens)


def methods(engine: Engine, critic: Critic | None) -> dict[str, Method]:
    """All methods by name; those with a critic only if there is one."""
    found: dict[str, Method] = {
        VOTES: partial(by_votes, engine, SAMPLING),
        f"{VOTES}, no penalty": partial(by_votes, engine, WARM),
        f"{VOTES}, temperature {COOL.temperature:g}, no penalty": partial(by_votes, engine, COOL),
    }
    if critic:
        judged = partial(by_critique, engine, critic)
        found |= {
            "critique, told": partial(judged, 1, 1, True),
            "critique, told, 3 rounds": partial(judged, 3, 1, True),
            "critique, not told": partial(judged, 1, 1, False),
            "critique, not told, 5 answers": partial(judged, 1, 5, False),
        }
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One method on all questions: correct [n], tokens [n], seconds in total, and its outcomes."""

    correct: Doubles
    tokens: Doubles
    seconds: float
    outcomes: Sequence[Outcome] = ()

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.correct.mean())


def hard_questions(folder: Path, split: str) -> list[Example]:
    """The first `ROWS` hard questions of a split. Raises `DataError` for bad data, `CogumiError` if there are none."""
    found = [e for e in read_examples(split_path(folder, split)) if e.difficulty >= HARD][: ROWS[split]]
    if not found:
        raise CogumiError(f"{folder} has no question of difficulty {HARD} or more in '{split}'; name other data")
    return found


def _graded(examples: Sequence[Example], texts: Sequence[str]) -> Doubles:
    return np.array([v.correct for v in grade_all(list(zip(examples, texts, strict=True)))], np.float64)


def first_answers(cascade: Cascade, examples: Sequence[Example], mode: str) -> tuple[list[Reply], Measured]:
    """The cascade's answers in a mode."""
    requests = [Request(messages=e.messages, max_tokens=MAX_TOKENS, mode=mode) for e in examples]
    began = time.perf_counter()
    given = list(replies(cascade, requests, 2 * SLOTS))
    seconds = time.perf_counter() - began
    tokens = np.array([reply.usage.completion_tokens for reply in given], np.float64)
    return given, Measured(_graded(examples, [reply.text for reply in given]), tokens, seconds)


def starts_of(
    examples: Sequence[Example], given: Sequence[Reply], adapters: Sequence[str], seed: int
) -> list[FirstAnswer]:
    """The starting points of deliberation, each with its own seed."""
    found = []
    for i, (example, reply) in enumerate(zip(examples, given, strict=True)):
        name = reply.tier.partition(":")[2]
        adapter = name if name in adapters else None
        request = Request(messages=example.messages, max_tokens=MAX_TOKENS, adapter=adapter, seed=seed * 100_000 + i)
        found.append(FirstAnswer(example, reply, request))
    return found


def measure(method: Method, starts: Sequence[FirstAnswer], first: Measured) -> Measured:
    """Apply a method to all questions, `TOGETHER` at a time; tokens and seconds include those of the first answers."""
    began = time.perf_counter()
    with ThreadPoolExecutor(TOGETHER) as pool:
        outcomes = list(pool.map(method, starts))
    seconds = first.seconds + time.perf_counter() - began
    correct = _graded([s.example for s in starts], [o.text for o in outcomes])
    return Measured(correct, first.tokens + [o.tokens for o in outcomes], seconds, outcomes)


def gain_figures(first: Measured, found: Mapping[str, Measured], chosen: str, seed: int) -> list[Figure]:
    """Accuracy gained and cost of each method."""
    rows = [Figure("accuracy of the cascade on hard questions", first.accuracy, note=f"mode {START}, greedy")]
    for name, one in found.items():
        gain, low, high = bootstrap_gain(first.correct, one.correct, seed)
        cost = f"{one.tokens.sum() / first.tokens.sum():.1f}x tokens, {one.seconds / first.seconds:.1f}x seconds"
        note = f"{cost}; chosen on the selection split" if name == chosen else cost
        rows.append(Figure(f"accuracy gained: {name}", gain, low=low, high=high, note=note))
    return rows


def confidence_figures(starts: Sequence[FirstAnswer], first: Measured, votes: Measured) -> list[Figure]:
    """AUROC of several confidence scores."""
    p = [s.reply.p_correct or 0.0 for s in starts]
    support, agreement = ([getattr(o, name) for o in votes.outcomes] for name in ("support", "agreement"))
    return [
        Figure("AUROC of the gate's P(correct)", auroc(p, first.correct), note=_ANSWERS),
        Figure("AUROC of the votes' support", auroc(support, first.correct), note=_ANSWERS),
        Figure("AUROC of the votes' agreement", auroc(agreement, votes.correct), note="the votes' answers"),
    ]


def critic_figures(path: Path, starts: Sequence[FirstAnswer], first: Measured) -> list[Figure]:
    """AUROC of the critic, accuracy of its error class, and how often it finds the first wrong token."""
    net = load_critic(path)
    opinions = [net.judge(critic_input(question_of(s.example), s.reply)) for s in starts]
    named, near, chance = [], [], []
    for opinion, start, correct in zip(opinions, starts, first.correct, strict=True):
        if correct:
            continue
        named.append(opinion.error == error_type(start.example, start.reply, correct=False))
        at = first_wrong(start)
        if at is not None and len(opinion.attention) >= LONG:
            distance = np.abs(np.arange(len(opinion.attention)) - at)
            near.append(bool(distance[opinion.attention.argmax()] <= NEAR))
            chance.append(float(np.mean(distance <= NEAR)))
    figures = [
        Figure("AUROC of the critic's score", auroc([o.p_correct for o in opinions], first.correct), note=_ANSWERS),
        Figure("error type named", _mean(named), note=f"of {len(named)} wrong answers"),
    ]
    if near:
        note = (
            f"within {NEAR} token, of {len(near)} wrong answers of {LONG} tokens or more; by chance {_mean(chance):.2f}"
        )
        figures.append(Figure("passage at the first wrong token", _mean(near), note=note))
    return figures


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def first_wrong(start: FirstAnswer) -> int | None:
    """Index of the first token that differs from the reference; None if the answer ends before."""
    shared = end = 0
    for given, wanted in zip(start.reply.text, start.example.answer, strict=False):
        if given != wanted:
            break
        shared += 1
    for i, token in enumerate(start.reply.tokens):
        end += len(token.text)
        if end > shared:
            return i
    return None


def cost_picture(path: Path, first: Measured, found: Mapping[str, Measured]) -> None:
    """Accuracy against generated tokens on hard questions; tokens relative to the first answers."""
    figure, (axes,) = new_figure(width=6, height=5.0)
    for name, one in {f"mode {START}, greedy": first, **found}.items():
        axes.plot(one.tokens.sum() / first.tokens.sum(), one.accuracy, "o", label=name)
    axes.set(xlabel="tokens generated, relative to the greedy answers", ylabel="share of hard questions right")
    axes.set_title(f"Methods on hard questions ({len(first.tokens)} questions)")
    legend_below(axes)
    figure.savefig(path)


def run(task: Task) -> Findings:
    """Measure `task.bundle` with the questions in `task.data`, or in the folder `data` beside the bundle."""
    if task.bundle is None:
        raise CogumiError("the suite 'deliberation' needs a bundle; name its folder")
    folder = task.data or task.bundle.parent / "data"
    examples = {split: hard_questions(folder, split) for split in ROWS}
    file = task.bundle / FILE
    with closing(open_cascade(task.bundle, slots=SLOTS, context=CONTEXT)) as cascade:
        base = cascade.tiers.base
        table = methods(base, Critic(file) if file.exists() else None)
        total, done = len(ROWS) * len(table) + 1, 0
        for split in ROWS:
            given, first = first_answers(cascade, examples[split], START)
            starts = starts_of(examples[split], given, base.adapters, task.seed)
            found = {}
            for name, method in table.items():
                found[name] = measure(method, starts, first)
                done += 1
                task.progress(done, total, {"accuracy": found[name].accuracy})
            if split == "selection":
                chosen = max(found, key=lambda name: (found[name].accuracy, -found[name].tokens.sum()))
        _, found[f"mode {MODE}"] = first_answers(cascade, examples["heldout"], MODE)
    figures = [*gain_figures(first, found, chosen, task.seed), *confidence_figures(starts, first, found[VOTES])]
    if file.exists():
        figures += critic_figures(file, starts, first)
    pictures = []
    if task.out:
        pictures.append(task.out / "deliberation.png")
        cost_picture(pictures[0], first, found)
    facts = {
        "questions": {split: len(rows) for split, rows in examples.items()},
        "difficulty": f">= {HARD}",
        "cost": f"generated tokens and wall seconds, {TOGETHER} questions at a time, relative to the greedy answers",
        "critic": file.exists(),
    }
    return Findings(figures, facts, pictures)
