"""Stage `gain`: whether a modifier answers the selection questions of its domain better than the base (SPEC C6, M4).

Both are asked in llama.cpp and graded, so that the gain is one of answers, not of the loss. A recipe may reject a
modifier by it (`gates: [{metric: gain, at_least: 0.05}]`) before anything is calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import DataError
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Request
from cogumi.data.examples import read_examples, split_path
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import replies
from cogumi.grading.graders import grade_all
from cogumi.teach.context_size import context_for

VERSION = 1
KIND = "gain"
INPUTS = {"examples": "examples", "base": "gguf", "adapter": "gguf"}
PER_REPORT = 20


class Config(BaseModel):
    """At most `rows` questions of the domain are asked."""

    model_config = ConfigDict(extra="forbid")
    domain: str
    rows: int = Field(200, ge=1)
    max_tokens: int = Field(64, ge=1)
    slots: int = Field(16, ge=1)


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples`, `base` and `adapter` -> metrics only: the share of right answers before and after, and the gain."""
    selection = read_examples(split_path(inputs["examples"].path, "selection"))
    examples = [e for e in selection if e.domain == config.domain][: config.rows]
    if not examples:
        raise DataError(f"no selection question is of the domain '{config.domain}': name another, or add questions")
    path, name = inputs["base"].path / "model.gguf", config.domain
    requests = [
        Request(messages=e.messages, max_tokens=config.max_tokens, adapter=adapter, speculate=False)
        for adapter in (None, name)
        for e in examples
    ]
    engine = LlamaEngine(
        path,
        adapters={name: inputs["adapter"].path / "adapter.gguf"},
        slots=config.slots,
        context=context_for([path], examples, config.max_tokens, None),
        threads=context.threads,
        lookup=False,
    )
    texts = []
    with closing(engine):
        for reply in replies(engine, requests, 2 * config.slots):
            texts.append(reply.text)
            if len(texts) % PER_REPORT == 0 or len(texts) == len(requests):
                context.progress(len(texts), len(requests), {})
    right = [verdict.correct for verdict in grade_all(list(zip([*examples, *examples], texts, strict=True)))]
    n = len(examples)
    before, after = sum(right[:n]), sum(right[n:])
    return {"domain": name, "n": n, "before": before / n, "after": after / n, "gain": (after - before) / n}
