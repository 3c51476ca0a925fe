"""Stage `respond`: the base's graded answers to the training questions, and its readings of them (SPEC C4, B3, M3).

The questions are asked in llama.cpp, of the file that answers at run time. The draft is trained on answers to easy
questions, modifiers on the questions that were failed, the reader on the hidden states of all questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import DataError
from cogumi.core.estimate import Cost, Estimate, Given
from cogumi.core.facts import ModelFacts
from cogumi.core.stage import CHECKPOINT, Context
from cogumi.core.types import Artifact, Example, Reading, Reply, Request
from cogumi.data.examples import read_examples, split_path
from cogumi.data.responses import (
    READINGS,
    Readings,
    Response,
    from_lines,
    read_readings,
    to_lines,
    write_readings,
    write_responses,
)
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import Engine, final_reply
from cogumi.grading.graders import grade_all
from cogumi.teach.context_size import context_for

VERSION = 3
KIND = "responses"
INPUTS = {"examples": "examples", "model": "gguf"}

CHUNK = 200
"""Questions that are answered, graded and stored together; a killed run loses at most these."""
PER_REPORT = 20
"""Answers between two reports of the progress."""

Part = tuple[list[Response], Readings]
Answered = tuple[Reading, Reply]


class Config(BaseModel):
    """`rows`: at most so many training questions, from all parts of the set (None: all).

    `slots` questions are answered at the same time.
    """

    model_config = ConfigDict(extra="forbid")
    rows: int | None = Field(None, ge=1)
    max_tokens: int = Field(64, ge=1)
    slots: int = Field(16, ge=1)


def estimate(config: Config, given: Given) -> Estimate:
    """The model that answers."""
    model = given.find("model", ModelFacts)
    return Estimate(cost=Cost("answers", model.shape, model.shape.parameters)) if model else Estimate()


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples` + `model` -> responses.jsonl and readings.safetensors."""
    every = read_examples(split_path(inputs["examples"].path, "train"))
    if not every:
        raise DataError("there is no training question to ask: give the split `train` some rows")
    chosen = min(config.rows or len(every), len(every))
    examples = [every[i * len(every) // chosen] for i in range(chosen)]  # a set may be ordered by domain
    parts = list(_parts(examples, config, inputs["model"].path / "model.gguf", out / CHECKPOINT, context))
    rows = [row for responses, _ in parts for row in responses]
    write_readings(out / READINGS, Readings.joined(readings for _, readings in parts))
    write_responses(out, rows)
    failed = Counter(e.domain for e, row in zip(examples, rows, strict=True) if not row.correct)
    return {
        "rows": len(rows),
        "accuracy": round(sum(row.correct for row in rows) / len(rows), 4),
        "asked": dict(sorted(Counter(e.domain for e in examples).items())),
        "failures": dict(sorted(failed.items())),
        "tokens": sum(row.tokens for row in rows),
    }


def _parts(
    examples: Sequence[Example], config: Config, model: Path, checkpoint: Path, context: Context
) -> Iterator[Part]:
    """Responses and readings in chunks; finished chunks of an interrupted run are read from `checkpoint`."""
    checkpoint.mkdir(exist_ok=True)
    chunks = {start: examples[start : start + CHUNK] for start in range(0, len(examples), CHUNK)}
    stored = {start: checkpoint / f"{start:08}.safetensors" for start in chunks}
    missing = [start for start, path in stored.items() if not path.is_file()]
    if missing:
        requests = [Request(messages=e.messages, max_tokens=config.max_tokens, speculate=False) for e in examples]
        size = context_for([model], examples, config.max_tokens, None)
        engine = LlamaEngine(model, slots=config.slots, context=size, threads=context.threads, lookup=False)
        done = len(examples) - sum(len(chunks[start]) for start in missing)
        with closing(engine) as base, ThreadPoolExecutor(config.slots) as pool:
            for start in missing:
                asked: list[Answered] = []
                for pair in pool.map(partial(_read_and_answer, base), requests[start : start + CHUNK]):
                    asked.append(pair)
                    done += 1
                    if done % PER_REPORT == 0 or done == len(examples):
                        context.progress(done, len(examples), {})
                responses, readings = _graded(chunks[start], asked)
                write_readings(stored[start], readings, to_lines(responses))
    for path in stored.values():
        readings, lines = read_readings(path)
        yield from_lines(lines), readings


def _read_and_answer(base: Engine, request: Request) -> Answered:
    """Read a question and answer it at once, while its prompt is in the cache."""
    return base.read(request), final_reply(base.generate(request))


def _graded(examples: Sequence[Example], asked: Sequence[Answered]) -> Part:
    verdicts = grade_all([(e, reply.text) for e, (_, reply) in zip(examples, asked, strict=True)])
    responses = [
        Response(
            id=example.id,
            output=reply.text,
            correct=verdict.correct,
            reason=verdict.reason,
            nats=round(-sum(t.logprob for t in reply.tokens), 6),
            tokens=len(reply.tokens),
            finished=reply.finish_reason == "stop",
        )
        for example, (_, reply), verdict in zip(examples, asked, verdicts, strict=True)
    ]
    last, mean = (np.array([getattr(reading, name) for reading, _ in asked], np.float32) for name in ("last", "mean"))
    return responses, Readings(last, mean)
