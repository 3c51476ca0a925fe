"""Stage `acceptance`: share of drafted tokens that a base accepts from each of several drafts (SPEC C5, E2).

The claim to test: a base accepts a draft trained on its own responses far more often than one trained on the data set's
answers. Each draft is exported and drafts for the base on the same held-out questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example, Reply, Request
from cogumi.data.examples import SPLITS, is_easy, read_examples, split_path
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import replies
from cogumi.grading.graders import grade_all
from cogumi.teach.context_size import context_for

VERSION = 2
KIND = "measurement"
INPUTS = {"data": "examples", "base": "gguf", "draft_*": "gguf"}
DRAFT = "draft_"
MODEL = "model.gguf"


class Config(BaseModel):
    """`rows`: most easy questions and most hard questions to ask; easy means difficulty up to `easy_up_to`, or without
    a level that the base answers correctly.
    """

    model_config = ConfigDict(extra="forbid")
    rows: int = Field(300, ge=1)
    easy_up_to: int = Field(2, ge=1)
    max_tokens: int = Field(64, ge=1)
    slots: int = Field(8, ge=1)
    context: int | None = Field(None, ge=16, description="tokens of question and answer; none: the longest")


def _answers(engine: LlamaEngine, examples: Sequence[Example], config: Config, speculate: bool) -> Iterator[Reply]:
    requests = (Request(messages=e.messages, max_tokens=config.max_tokens, speculate=speculate) for e in examples)
    return replies(engine, requests, 2 * config.slots)


def acceptance(engine: LlamaEngine, examples: Sequence[Example], config: Config) -> dict[str, float]:
    """Drafted and accepted tokens of greedy answers with drafting forced."""
    drafted = accepted = 0
    for reply in _answers(engine, examples, config, speculate=True):
        drafted, accepted = drafted + reply.usage.drafted, accepted + reply.usage.accepted
    return {"acceptance": accepted / max(drafted, 1), "drafted": drafted, "questions": len(examples)}


def _answered(base: Path, examples: Sequence[Example], config: Config, context: int) -> set[str]:
    """Ids of the questions that the base answers correctly."""
    if not examples:
        return set()
    with closing(LlamaEngine(base, slots=config.slots, context=context, lookup=False)) as engine:
        answers = [reply.text for reply in _answers(engine, examples, config, speculate=False)]
    return {v.example_id for v in grade_all(list(zip(examples, answers, strict=True))) if v.correct}


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`data`, `base` and `draft_<name>` (artifacts of stage `gguf`) -> acceptance by kind (easy, hard)."""
    drafts = {role.removeprefix(DRAFT): a.path / MODEL for role, a in inputs.items() if role.startswith(DRAFT)}
    heldout = read_examples(split_path(inputs["data"].path, SPLITS[-1]))
    base = inputs["base"].path / MODEL
    size = context_for([base, *drafts.values()], heldout, config.max_tokens, config.context)
    known = _answered(base, [e for e in heldout if not e.difficulty], config, size)
    easy = [e for e in heldout if is_easy(e, config.easy_up_to, e.id in known)]
    kinds = {"easy": easy, "hard": [e for e in heldout if e not in easy]}
    found: dict[str, Any] = {}
    for done, (name, path) in enumerate(drafts.items()):
        engine = LlamaEngine(base, slots=config.slots, context=size, draft=path, lookup=False)
        with closing(engine):
            found[name] = {kind: acceptance(engine, rows[: config.rows], config) for kind, rows in kinds.items()}
        context.progress(done + 1, len(drafts), {})
    return found
