"""Stage `decontaminate`: drops rows that share text with the questions one reports on (SPEC A5).

A row is dropped if its normalised question equals one of the reference, or if it shares a run of 13 words (Brown et al.
2020) with question or answer of a reference row. Runs that stand in many reference rows are those of a template, not of
a question, and do not count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import DataError
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example
from cogumi.data.curation.pool_writer import ROWS_PER_REPORT, PoolWriter, examples_of, rows_of, same_facts, whole_text
from cogumi.data.examples import POOL, SPLITS, iterate_examples, normalised_question, split_path, to_line
from cogumi.data.sources.containers import within
from cogumi.data.sources.question_files import content_hashes, iterate

VERSION = 1
KIND = "pool"
INPUTS = {"pool": "pool"}
OPTIONAL = {"against_*": "examples|pool"}

_SHOWN_WORDS = 8


class Config(BaseModel):
    """`files`: question files that one reports on. Runs of `words` words that more than `common` reference rows have do
    not count. Inputs `against_*` are references too: a pool, or splits without their training set.
    """

    model_config = ConfigDict(extra="forbid")
    files: tuple[Path, ...] = ()
    words: int = Field(13, ge=4)
    common: int = Field(10, ge=1)


estimate = same_facts


def needs(config: Config, roles: Collection[str]) -> dict[str, str]:
    """Without `files`, something else to compare with."""
    return {} if config.files else dict(OPTIONAL)


def identity(config: Config, root: Path) -> Any:
    """The config, and the hashes of all files that its paths name. Raises `DataError`."""
    return [config.model_dump(mode="json"), content_hashes(within(root, path) for path in config.files)]


class Reference:
    """Questions and word runs of reference rows; memory takes some 100 bytes per word of these."""

    def __init__(self, rows: Iterable[Example], words: int, common: int, context: Context) -> None:
        self._words = words
        self._questions: dict[str, str] = {}
        self._runs: dict[int, str] = {}
        seen = Counter[int]()
        self.rows = 0
        for row in rows:
            self.rows += 1
            if self.rows % ROWS_PER_REPORT == 0:
                context.progress(self.rows, None, {})
            place = row.source or row.id
            self._questions.setdefault(normalised_question(row.messages), place)
            runs = set(self._of(row))
            seen.update(runs)
            self._runs.update((run, place) for run in runs if run not in self._runs)
        for run, count in seen.items():
            if count > common:
                del self._runs[run]

    def reason(self, row: Example) -> tuple[str, str] | None:
        """The rule and the reason for which a row is dropped, or None."""
        if place := self._questions.get(normalised_question(row.messages)):
            return "same_question", f"its question is that of {place}"
        for start, run in enumerate(self._of(row)):
            if place := self._runs.get(run):
                shown = " ".join(_words(row)[start : start + _SHOWN_WORDS])
                return "shared_words", f"shares {self._words} words with {place}: '{shown} ...'"
        return None

    def _of(self, row: Example) -> Iterator[int]:
        """The hashes of all word runs of a row, in order."""
        words = _words(row)
        for start in range(len(words) - self._words + 1):
            yield hash(tuple(words[start : start + self._words]))


def _words(row: Example) -> list[str]:
    return re.findall(r"\w+", whole_text(row).casefold())


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`pool` -> the rows that share nothing with the references."""
    against = {role: artifact for role, artifact in inputs.items() if role != "pool"}
    reference = Reference(_reference_rows(config, against, context.root), config.words, config.common, context)
    remedies = dict.fromkeys(("same_question", "shared_words"), "the pool is the reference itself: give other rows")
    with PoolWriter(out, context, rows_of(inputs["pool"]), remedies) as writer:
        for example in examples_of(inputs["pool"]):
            if found := reference.reason(example):
                writer.drop(example, *found)
            else:
                writer.keep(to_line(example))
    return writer.metrics() | {"reference_rows": reference.rows}


def _reference_rows(config: Config, against: Mapping[str, Artifact], root: Path) -> Iterator[Example]:
    for path in config.files:
        found = 0
        for row in iterate(within(root, path)):
            if isinstance(row, Example):
                found += 1
                yield row
        if not found:
            raise DataError(f"{path} has no usable row to compare with: docs/your-data.md shows the forms of rows")
    for artifact in against.values():
        if artifact.kind == "pool":
            yield from iterate_examples(artifact.path / POOL)
        else:
            for name in SPLITS[1:]:
                yield from iterate_examples(split_path(artifact.path, name))
