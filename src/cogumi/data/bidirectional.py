"""Stage `bidirectional`: adds the reverse of question-answer pairs, from an answer to its instruction (SPEC A9).

A row "Name three primary colours." -> "Red, blue and yellow." also becomes a question that shows the answer and asks
for the instruction. Only answers that tell enough have a reverse: a number or a name belongs to many questions. A pair
and its reverse share a `split_group`, so that stage `split` never trains on the one and reports on the other.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import DataError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import RowFacts
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example
from cogumi.data.examples import POOL, SPLIT_GROUP, example_id, iterate_examples, to_line

VERSION = 1
KIND = "pool"
LIGHT = True
INPUTS = {"pool": "pool"}
ASKED = "Here is an answer:\n\n{answer}\n\nWrite the instruction that it answers."

_ROWS_PER_REPORT = 1_000


class Config(BaseModel):
    """`share` of the rows that can have a reverse get one, chosen by a hash. `words`: the fewest words of an answer
    that tells its question.
    """

    model_config = ConfigDict(extra="forbid")
    share: float = Field(1.0, gt=0, le=1)
    words: int = Field(12, ge=1)


def estimate(config: Config, given: Given) -> Estimate:
    """The rows of the pool, twice at most."""
    pool = given.find("pool", RowFacts)
    return Estimate((replace(pool, count=2 * pool.count) if pool else None,))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`pool` -> its rows, each followed by its reverse if it has one. Raises `DataError` if none has."""
    counts, done = Counter[str](), 0
    with open(out / POOL, "w", encoding="utf-8", newline="\n") as file:
        for done, example in enumerate(iterate_examples(inputs["pool"].path / POOL), 1):
            why = why_not(example, config.words) or ("not chosen" if not _chosen(example, config, context.seed) else "")
            if why:
                file.write(to_line(example))
                counts[why] += 1
            else:
                for row in pair(example):
                    file.write(to_line(row))
                counts["reversed"] += 1
            if done % _ROWS_PER_REPORT == 0:
                context.progress(done, None, {"reversed": counts["reversed"]})
    if not counts["reversed"]:
        raise DataError(
            f"no row has a reverse: of {done:,} rows {_reasons(counts)}; lower `words`, or leave this step out"
        )
    return {
        "rows": done + counts["reversed"],
        "reversed": counts.pop("reversed"),
        "without": dict(counts.most_common()),
    }


def why_not(example: Example, words: int) -> str:
    """Why a row has no reverse; empty if it has one."""
    if not example.answerable:
        return "no answer"
    if sum(message.role != "system" for message in example.messages) != 1:
        return "several turns"
    if len(example.answer.split()) < words:
        return "short answer"
    return ""


def pair(example: Example) -> tuple[Example, Example]:
    """A row and its reverse, in one split group."""
    group = example.meta.get(SPLIT_GROUP) or example.id
    (question,) = (message for message in example.messages if message.role == "user")
    asked = tuple(
        replace(message, content=ASKED.format(answer=example.answer)) if message is question else message
        for message in example.messages
    )
    reverse = Example(
        example_id(example.domain, asked),
        example.domain,
        example.difficulty,
        asked,
        question.content,
        example.source,
        {SPLIT_GROUP: group, "reverse_of": example.id},
    )
    return replace(example, meta={**example.meta, SPLIT_GROUP: group}), reverse


def _chosen(example: Example, config: Config, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed}\n{example.id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < config.share * 2**64


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} have: {why}" for why, count in counts.most_common() if why != "reversed")
