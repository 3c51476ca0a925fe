"""Stage `respond`: a model's graded answers to the training questions (SPEC C4, B3).

The draft is trained on its answers to easy questions, modifiers on the questions it fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.estimate import Cost, Estimate, Given
from cogumi.core.facts import ModelFacts
from cogumi.core.footprint import FP32, Footprint
from cogumi.core.registry import engine
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example, Reply, Request
from cogumi.data.examples import read_examples, split_path
from cogumi.data.responses import Response, write_responses
from cogumi.engine.protocol import replies
from cogumi.engine.torch import ROWS
from cogumi.grading.graders import grade_all

VERSION = 1
KIND = "responses"
INPUTS = {"examples": "examples", "model": "model"}


class Config(BaseModel):
    """`rows` limits the number of training questions (None: all)."""

    model_config = ConfigDict(extra="forbid")
    rows: int | None = Field(None, ge=1)
    max_tokens: int = Field(64, ge=1)
    window: int = Field(512, ge=1, description="questions in flight")


def estimate(config: Config, given: Given) -> Estimate:
    """Memory for generation: the weights in fp32, and a key-value cache for one batch."""
    model = given.find("model", ModelFacts)
    if model is None:
        return Estimate()
    shape, rows = model.shape, given.rows("examples", model)
    length = (rows.longest - rows.answer if rows else 512) + config.max_tokens
    cache = FP32 * shape.cache_values() * min(ROWS, config.window) * length
    weights = FP32 * shape.parameters
    memory = Footprint(weights, 0, 0, cache, 0, weights + cache)
    limit, problems = given.hardware.memory, []
    if limit is not None and memory.peak > limit:
        what = f"answering needs {memory.peak / 1e9:.1f} GB on a GPU that has {limit / 1e9:.1f} GB"
        problems.append(f"{what}; use a smaller `window`, or run this step without the GPU")
    return Estimate(cost=Cost("answers", shape, shape.parameters, memory=memory), problems=tuple(problems))


def _answers(examples: list[Example], config: Config, folder: Path, context: Context) -> Iterator[Reply]:
    torch.set_num_threads(context.threads)
    model = engine("torch")(folder)
    try:
        requests = (Request(messages=e.messages, max_tokens=config.max_tokens) for e in examples)
        for done, reply in enumerate(replies(model, requests, config.window), 1):
            if done % 100 == 0 or done == len(examples):
                context.progress(done, len(examples), {})
            yield reply
    finally:
        model.close()


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples` + `model` -> responses.jsonl."""
    examples = read_examples(split_path(inputs["examples"].path, "train"))[: config.rows]
    answers = list(_answers(examples, config, inputs["model"].path, context))
    verdicts = grade_all([(e, a.text) for e, a in zip(examples, answers, strict=True)])
    rows = [
        Response(
            id=example.id,
            output=answer.text,
            correct=verdict.correct,
            reason=verdict.reason,
            nats=round(-sum(t.logprob for t in answer.tokens), 6),
            tokens=len(answer.tokens),
            finished=answer.finish_reason == "stop",
        )
        for example, answer, verdict in zip(examples, answers, verdicts, strict=True)
    ]
    write_responses(out, rows)
    failed = Counter(e.domain for e, row in zip(examples, rows, strict=True) if not row.correct)
    return {
        "rows": len(rows),
        "accuracy": round(sum(row.correct for row in rows) / max(len(rows), 1), 4),
        "failures": dict(sorted(failed.items())),
        "tokens": sum(row.tokens for row in rows),
    }
