"""Stage `split`: divides a pool of examples into the five disjoint sets (SPEC A1).

The set of a question is a hash of its normalised text and the seed. So questions that differ in letter case or white
space are in the same set, the five sets share no question, and adding rows does not change the set of others. Rows with
the same `meta["split_group"]` (near-duplicates, by stage `deduplicate`) are in the same set, by its hash. A row that
repeats an earlier conversation is left out: gates and guarantee count on independent questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import DataError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import RowFacts
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.examples import (
    POOL,
    SPLIT_GROUP,
    SPLITS,
    iterate_examples,
    normalised_question,
    split_of,
    split_path,
    to_line,
)

VERSION = 3
KIND = "examples"
LIGHT = True
INPUTS = {"pool": "pool"}

_ROWS_PER_REPORT = 1_000

Share = Annotated[int, Field(ge=1)]


class Config(BaseModel):
    """Relative shares of the five sets, in questions."""

    model_config = ConfigDict(extra="forbid")
    train: Share = 60
    selection: Share = 5
    fit: Share = 12
    threshold: Share = 12
    heldout: Share = 11


def estimate(config: Config, given: Given) -> Estimate:
    """The share of the pool's rows in the training set."""
    pool = given.find("pool", RowFacts)
    if pool is None:
        return Estimate()
    share = config.train / sum(getattr(config, name) for name in SPLITS)
    return Estimate((replace(pool, count=int(share * pool.count)),))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`pool` -> `<split>.jsonl` for every set, with one id per row in memory; DataError if a set is empty."""
    shares = {name: int(getattr(config, name)) for name in SPLITS}
    rows, domains, answers = Counter(dict.fromkeys(SPLITS, 0)), Counter[str](), dict[str, int]()
    repeated, disagreeing = 0, 0
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(open(split_path(out, name), "w", encoding="utf-8", newline="\n"))
            for name in SPLITS
        }
        for done, example in enumerate(iterate_examples(inputs["pool"].path / POOL), 1):
            if example.id in answers:
                repeated += 1
                disagreeing += answers[example.id] != hash(example.answer)
                continue
            answers[example.id] = hash(example.answer)
            key = example.meta.get(SPLIT_GROUP) or normalised_question(example.messages)
            name = split_of(key, shares, context.seed)
            files[name].write(to_line(example))
            rows[name] += 1
            domains[example.domain] += 1
            if done % _ROWS_PER_REPORT == 0:
                context.progress(done, None, {})
    if empty := [name for name in SPLITS if not rows[name]]:
        raise DataError(
            f"{rows.total()} usable rows leave nothing for {', '.join(empty)}: "
            "add rows, or give these sets a larger share"
        )
    found: dict[str, Any] = {"rows": dict(rows), "domains": dict(sorted(domains.items()))}
    if repeated:
        line = f"{repeated} rows repeat a question and are left out"
        found["warnings"] = [line + f"; {disagreeing} of them have another answer" * bool(disagreeing)]
    return found
