"""Stage `answers`: graded answers of all tiers to the questions that gates are fitted and tested on (SPEC F4).

The base and, if there is one, the draft answer every question, a modifier the questions routed to its domain. Nothing
is fitted here: `calibrate` may run again with other limits without asking again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from cogumi.cascade.tiers import Heads, Question, Tiers
from cogumi.confidence.nets import load_head, load_net, load_scope
from cogumi.confidence.signals import answer_signals
from cogumi.core.errors import DataError
from cogumi.core.estimate import Cost, Estimate, Given
from cogumi.core.facts import ModelFacts
from cogumi.core.stage import CHECKPOINT, Context
from cogumi.core.types import Artifact, Example, Reply, Request
from cogumi.data.examples import read_examples, split_path
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply, replies
from cogumi.grading.graders import grade_all
from cogumi.teach.answer_rows import Answer, Row, read_rows, write_rows
from cogumi.teach.context_size import context_for

VERSION = 2
KIND = "answers"
INPUTS = {"data": "examples", "base": "gguf", "difficulty": "model|reader", "router": "router|reader"}
OPTIONAL = {"draft": "gguf", "modifier_*": "gguf"}
SPLITS = ("fit", "selection", "threshold")
"""The sets of questions that are asked; `report` asks the held-out ones."""
MODIFIER = "modifier_"
CHUNK = 200
"""Questions that are answered, graded and stored together; a killed run loses at most these."""
PER_REPORT = 20
"""Questions between two reports of the progress."""

Progress = Callable[[int, int, Mapping[str, float]], None]
T = TypeVar("T")


class Config(BaseModel):
    """`slots` questions are answered at the same time."""

    model_config = ConfigDict(extra="forbid")
    rows: int | None = Field(None, ge=1, description="at most so many rows of each split; none: all")
    max_tokens: int = Field(128, ge=1)
    slots: int = Field(16, ge=1)
    context: int | None = Field(None, ge=16, description="tokens of question and answer; none: the longest")


def estimate(config: Config, given: Given) -> Estimate:
    """The base that answers."""
    model = given.find("base", ModelFacts)
    return Estimate(cost=Cost("answers", model.shape, model.shape.parameters)) if model else Estimate()


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`data`, the models and the heads -> the answers of each split (see `answer_rows`)."""
    examples = {name: read_examples(split_path(inputs["data"].path, name))[: config.rows] for name in SPLITS}
    if empty := [name for name, found in examples.items() if not found]:
        raise DataError(f"the split '{empty[0]}' is empty: calibration needs rows in {', '.join(SPLITS)}")
    chunks = {
        f"{name}-{at:08}": found[at : at + CHUNK]
        for name, found in examples.items()
        for at in range(0, len(found), CHUNK)
    }
    _answer_missing(chunks, config, inputs, out / CHECKPOINT, context)
    answered: dict[str, list[Row]] = {}
    for split in SPLITS:
        parts = [
            read_rows(out / CHECKPOINT, name, rows) for name, rows in chunks.items() if name.split("-")[0] == split
        ]
        answered[split] = [row for part in parts for row in part]
        write_rows(out, split, answered[split])
    models = [role for role in ("base", "draft") if role in inputs]
    return {
        "rows": {name: len(rows) for name, rows in answered.items()},
        "bytes": {role: (inputs[role].path / "model.gguf").stat().st_size for role in models},
        "accuracy": _accuracy([row for rows in answered.values() for row in rows]),
    }


def _answer_missing(
    chunks: Mapping[str, Sequence[Example]],
    config: Config,
    inputs: Mapping[str, Artifact],
    stored: Path,
    context: Context,
) -> None:
    """Ask the chunks that an interrupted run has not stored."""
    stored.mkdir(exist_ok=True)
    missing = {name: rows for name, rows in chunks.items() if not (stored / f"{name}.jsonl").is_file()}
    if not missing:
        return
    total = sum(map(len, chunks.values()))
    done = total - sum(map(len, missing.values()))
    with ExitStack() as opened:
        tiers = open_tiers(inputs, [e for rows in chunks.values() for e in rows], config, context, opened)
        for name, rows in missing.items():

            def progress(
                asked: int, of: int, figures: Mapping[str, float], done: int = done, n: int = len(rows)
            ) -> None:
                context.progress(done + asked * n // of, total, figures)

            write_rows(stored, name, ask(tiers, rows, AskOptions(config.max_tokens, 2 * config.slots, progress)))
            done += len(rows)
            context.progress(done, total, {})


def _accuracy(rows: Sequence[Row]) -> dict[str, float]:
    """Share of correct answers of each tier, of those that it gave."""
    shares = {}
    for tier in ("draft", "base", "modifier"):
        right = [answer.correct for row in rows if (answer := getattr(row, tier))]
        if right:
            shares[tier] = round(sum(right) / len(right), 4)
    return shares


def open_tiers(
    inputs: Mapping[str, Artifact], examples: Sequence[Example], config: Config, context: Context, opened: ExitStack
) -> Tiers:
    """Open the models for questions `examples`; `opened` closes them. Without a draft the base reads the questions."""
    models = [inputs[role].path / "model.gguf" for role in ("base", "draft") if role in inputs]
    adapters = {
        role.removeprefix(MODIFIER): artifact.path / "adapter.gguf"
        for role, artifact in inputs.items()
        if role.startswith(MODIFIER)
    }
    size: dict[str, Any] = {
        "slots": config.slots,
        "context": context_for(models, examples, config.max_tokens, config.context),
        "threads": context.threads,
        "lookup": False,
    }
    base = LlamaEngine(inputs["base"].path / "model.gguf", adapters=adapters, **size)
    opened.callback(base.close)
    draft = base
    if "draft" in inputs:
        draft = LlamaEngine(inputs["draft"].path / "model.gguf", **size)
        opened.callback(draft.close)
    difficulty = load_head(inputs["difficulty"].path / "difficulty.safetensors")
    router = inputs["router"].path / "router.safetensors"
    return Tiers(base, draft, Heads(difficulty, load_net(router), load_scope(router)))


@dataclass(frozen=True, slots=True)
class AskOptions:
    """Options of `ask`: most tokens of an answer, requests in flight, and a progress callback."""

    max_tokens: int
    window: int
    progress: Progress = lambda done, total, figures: None


class _Unmodified(NamedTuple):
    """What the tiers without modifiers say about one question."""

    question: Question
    surprise: float
    draft: Reply | None
    base: Reply
    signals: Mapping[str, float]


def _without_modifier(tiers: Tiers, request: Request) -> _Unmodified:
    """Read a question and answer it at once, while its prompt is in the base's cache."""
    question = tiers.read_question(request)
    surprise = tiers.base_perplexity(request, question)
    base = final_reply(tiers.base.generate(replace(request, hidden=True)))
    draft = final_reply(tiers.draft.generate(request)) if tiers.has_draft else None
    return _Unmodified(question, surprise, draft, base, tiers.base_signals(request, base, question))


def ask(tiers: Tiers, examples: Sequence[Example], options: AskOptions) -> list[Row]:
    """Let every tier answer, greedily and without speculation, and grade all answers."""
    requests = [Request(messages=e.messages, max_tokens=options.max_tokens, speculate=False) for e in examples]
    counter = _ProgressCounter(options.progress, (1 + bool(tiers.modifiers)) * len(requests))
    with ThreadPoolExecutor(options.window // 2) as pool:
        said = list(counter.counted(pool.map(partial(_without_modifier, tiers), requests)))
    routed = [tiers.modifier_of(one.question) for one in said]
    order = sorted((i for i, domain in enumerate(routed) if domain), key=lambda i: (routed[i], i))
    counter.done += bool(tiers.modifiers) * (len(requests) - len(order))
    adapted = (replace(requests[i], adapter=routed[i]) for i in order)
    modified = list(counter.counted(replies(tiers.base, adapted, options.window)))
    drafts = [(i, one.draft) for i, one in enumerate(said) if one.draft]
    answered = [*enumerate(one.base for one in said), *drafts, *zip(order, modified, strict=True)]
    correct = [v.correct for v in grade_all([(examples[i], reply.text) for i, reply in answered])]
    judged = [(i, reply, right) for (i, reply), right in zip(answered, correct, strict=True)]
    n, m = len(said), len(said) + len(drafts)
    of_base = [_answer(reply, right, said[i].signals) for i, reply, right in judged[:n]]
    of_draft = {
        i: _answer(reply, right, {**answer_signals(reply), **said[i].question.signals})
        for i, reply, right in judged[n:m]
    }
    of_modifier = {i: _answer(reply, right, answer_signals(reply)) for i, reply, right in judged[m:]}
    return [
        Row(examples[i], one.question, one.surprise, of_draft.get(i), of_base[i], of_modifier.get(i), routed[i] or "")
        for i, one in enumerate(said)
    ]


def _answer(reply: Reply, correct: bool, signals: Mapping[str, float]) -> Answer:
    return Answer(reply.text, len(reply.tokens), correct, signals, reply.hidden)


class _ProgressCounter:
    """Reports progress every `PER_REPORT` items."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def counted(self, items: Iterable[T]) -> Iterable[T]:
        for item in items:
            self.done += 1
            if self.done % PER_REPORT == 0 or self.done == self.total:
                self.progress(self.done, self.total, {})
            yield item
