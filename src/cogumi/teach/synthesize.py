"""Stage `synthesize`: a model writes questions with answers, and a model scores them (SPEC A7, A8).

A cell is a domain at one difficulty. A question is written in it, then answered: directly up to `DIRECT` of 5, above it
step by step, with a critique of the draft by the same model before the final answer. A judge, the writer itself unless
another model is given, scores the pair from 1 to 10 on four axes. Kept are pairs with at least `least` on every axis,
whose question is new and whose answer is no refusal; others are written again, `attempts` times at most.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import ContextError, DataError
from cogumi.core.estimate import Estimate, Given, uncounted
from cogumi.core.files import write_text
from cogumi.core.stage import CHECKPOINT, Context
from cogumi.core.text import abstains, strip_fences, without_thinking
from cogumi.core.types import Artifact, Example, Message, Request
from cogumi.data.examples import POOL, example_id, normalised_question, to_line
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import Engine, final_reply

VERSION = 1
KIND = "pool"
INPUTS = {"writer": "gguf"}
OPTIONAL = {"judge": "gguf"}
REJECTED = "rejected.jsonl"
AXES = ("correctness", "clarity", "difficulty", "usefulness")
DIRECT = 3
"""The highest difficulty that is answered directly."""
CELL = "{domain}/{difficulty}"

_WRITE = (
    "Write one question about {domain} ({about}). Difficulty {difficulty} of 5: {level}. It must be possible to answer "
    "it from general knowledge alone, in at most three sentences. Reply with the question only."
)
_LEVELS = ("a child knows it", "easy", "it takes some thought", "it takes several steps", "an expert thinks about it")
_STEPS = "Solve this step by step, then give the answer.\n\n{question}"
_CRITIQUE = (
    "Question: {question}\n\nDraft of an answer: {draft}\n\nName the mistakes of the draft, if there are any. Then "
    "write the corrected answer after the word ANSWER:"
)
_JUDGE = (
    "Question: {question}\n\nAnswer: {answer}\n\nScore this pair from 1 to 10: is the answer correct, is the question "
    "clear, is its difficulty {difficulty} of 5, is it useful? Reply with the JSON "
    '{{"correctness": n, "clarity": n, "difficulty": n, "usefulness": n}} only.'
)


class Config(BaseModel):
    """`domains`: name -> what it is about; `per_cell`: pairs of each domain and difficulty that are asked for."""

    model_config = ConfigDict(extra="forbid")
    domains: dict[str, str] = Field(min_length=1)
    difficulties: tuple[int, ...] = Field((1, 2, 3, 4, 5), min_length=1)
    per_cell: int = Field(20, ge=1)
    least: int = Field(8, ge=1, le=10)
    attempts: int = Field(3, ge=1)
    max_tokens: int = Field(256, ge=16)
    temperature: float = Field(0.8, ge=0, le=2)
    slots: int = Field(8, ge=1)


@dataclass(frozen=True, slots=True)
class Written:
    """One attempt: the pair, its scores, and why it was rejected (empty: it was kept)."""

    domain: str
    difficulty: int
    question: str
    answer: str
    scores: Mapping[str, int]
    reason: str


def estimate(config: Config, given: Given) -> Estimate:
    """What models write cannot be estimated."""
    return uncounted()


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`writer` and optionally `judge` -> pool.jsonl and rejected.jsonl. Raises `DataError` if no pair is kept."""
    cells = [(domain, level) for domain in config.domains for level in config.difficulties]
    if bad := [level for _, level in cells if not 1 <= level <= 5]:
        raise DataError(f"difficulty {bad[0]} is not a level from 1 to 5")
    checkpoint = out / CHECKPOINT
    checkpoint.mkdir(exist_ok=True)
    written: list[Written] = []
    with ExitStack() as opened:
        engines: list[Engine] = []
        for number, (domain, level) in enumerate(cells):
            stored = checkpoint / f"{number:04}.jsonl"
            if not stored.is_file():
                engines = engines or _open(config, inputs, context, opened)
                found = list(_cell(config, engines[0], engines[-1], domain, level, context.seed))
                write_text(stored, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in found))
            written += [Written(**json.loads(line)) for line in stored.read_text("utf-8").splitlines()]
            context.progress(number + 1, len(cells), {"kept": sum(not one.reason for one in written)})
    return _store(written, out, config)


def _open(config: Config, inputs: Mapping[str, Artifact], context: Context, opened: ExitStack) -> list[Engine]:
    """The writer, and the judge if it is another model."""
    engines: list[Engine] = []
    for role in (role for role in ("writer", "judge") if role in inputs):
        engine = LlamaEngine(
            inputs[role].path / "model.gguf",
            slots=config.slots,
            context=6 * config.max_tokens + 512,
            threads=context.threads,
            lookup=False,
        )
        opened.callback(engine.close)
        engines.append(engine)
    return engines


def _cell(config: Config, writer: Engine, judge: Engine, domain: str, level: int, seed: int) -> Iterator[Written]:
    """All attempts of a cell, in rounds: each round writes the pairs that are still missing."""
    missing = config.per_cell
    seen: set[str] = set()
    with ThreadPoolExecutor(config.slots) as pool:
        for attempt in range(config.attempts):
            numbers = range(attempt * config.per_cell, attempt * config.per_cell + missing)
            tried = pool.map(lambda n: _attempt(config, writer, judge, domain, level, 1000 * seed + n), numbers)
            for one in list(tried):
                key = normalised_question((Message("user", one.question),))
                if not one.reason and key in seen:
                    one = Written(**{**asdict(one), "reason": "the question was written before"})
                seen.add(key)
                missing -= not one.reason
                yield one
            if not missing:
                return


def _attempt(config: Config, writer: Engine, judge: Engine, domain: str, level: int, seed: int) -> Written:
    """Write a question, answer it, and score the pair."""

    def said(engine: Engine, prompt: str, temperature: float) -> str:
        request = Request(
            messages=(Message("user", prompt),), max_tokens=config.max_tokens, temperature=temperature, seed=seed
        )
        return without_thinking(final_reply(engine.generate(request)).text).strip()

    def rejected(reason: str, scores: Mapping[str, int] | None = None) -> Written:
        return Written(domain, level, question, answer, scores or {}, reason)

    question = answer = ""
    try:
        about = {"domain": domain, "about": config.domains[domain], "difficulty": level, "level": _LEVELS[level - 1]}
        question = said(writer, _WRITE.format(**about), config.temperature)
        if len(question.split()) < 3:
            return rejected("no question was written")
        answer = _answered(lambda prompt: said(writer, prompt, 0.0), question, level)
        if not answer or abstains(answer):
            return rejected("no answer was written")
        scores = parsed_scores(said(judge, _JUDGE.format(question=question, answer=answer, difficulty=level), 0.0))
    except ContextError:
        return rejected("question and answer do not fit the context")
    if scores is None:
        return rejected("the judge gave no scores")
    if low := [axis for axis in AXES if scores[axis] < config.least]:
        return rejected(f"{low[0]} is {scores[low[0]]}, below {config.least}", scores)
    return rejected("", scores)


def _answered(ask: Any, question: str, level: int) -> str:
    """The answer: directly, or for a hard question as a solution in steps that was criticized and corrected."""
    if level <= DIRECT:
        return str(ask(question))
    critique = ask(_CRITIQUE.format(question=question, draft=ask(_STEPS.format(question=question))))
    return str(critique.rpartition("ANSWER:")[2].strip())


def parsed_scores(text: str) -> dict[str, int] | None:
    """The four scores in a judge's words; None if one is missing or out of range."""
    start, end = text.find("{"), text.rfind("}")
    try:
        found = json.loads(strip_fences(text[start : end + 1]))
        scores = {axis: int(found[axis]) for axis in AXES}
    except (ValueError, KeyError, TypeError):
        return None
    return scores if all(1 <= score <= 10 for score in scores.values()) else None


def _store(written: list[Written], out: Path, config: Config) -> dict[str, Any]:
    kept = [one for one in written if not one.reason]
    refused = [one for one in written if one.reason]
    write_text(out / REJECTED, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in refused))
    reasons = Counter(one.reason.split(" is ")[0] for one in refused)
    if not kept:
        first = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        raise DataError(
            f"no pair is good enough: {first}; take a better writer, lower `least`, or read {out / REJECTED}"
        )
    write_text(out / POOL, "".join(to_line(_example(one)) for one in kept))
    cells = Counter(CELL.format(domain=one.domain, difficulty=one.difficulty) for one in kept)
    wanted = config.per_cell * len(config.domains) * len(config.difficulties)
    found: dict[str, Any] = {
        "rows": len(kept),
        "wanted": wanted,
        "attempts": len(written),
        "cells": dict(sorted(cells.items())),
    }
    found["rejected"] = dict(reasons.most_common())
    if len(kept) < wanted:
        found["warnings"] = [
            f"{wanted - len(kept)} of {wanted} pairs are missing after {config.attempts} attempts each"
        ]
    return found


def _example(one: Written) -> Example:
    messages = (Message("user", one.question),)
    meta = {"synthetic": True, "scores": dict(one.scores)}
    source = f"synthesize:{CELL.format(domain=one.domain, difficulty=one.difficulty)}"
    return Example(example_id(one.domain, messages), one.domain, one.difficulty, messages, one.answer, source, meta)
