"""Stage `load`: reads a user's files into a pool of examples (SPEC A1)."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cogumi.core.errors import DataError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import RowFacts
from cogumi.core.registry import nearest
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example
from cogumi.data.examples import POOL, to_line
from cogumi.data.sources.containers import problem_of_path, within
from cogumi.data.sources.question_files import Reading, Rejected, Seen, content_hashes, iterate, no_usable_row
from cogumi.grading.graders import asks_model, problem_of
from cogumi.grading.suggest import SUGGESTED, check_of

VERSION = 5
KIND = "pool"
LIGHT = True
INPUTS: dict[str, str] = {}
REJECTED_FILE = "rejected.jsonl"

_ROWS_PER_REPORT = 1_000


class ReadingConfig(BaseModel):
    """How the files of a domain are read (see `question_files.Reading`)."""

    model_config = ConfigDict(extra="forbid")
    layout: str | None = None
    form: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    licence: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _known(self) -> ReadingConfig:
        try:
            self.reading()
        except DataError as error:
            raise ValueError(str(error)) from error
        return self

    def reading(self) -> Reading:
        """The same for the reader of files."""
        return Reading(self.layout, self.form, self.columns, self.licence)


class Config(BaseModel):
    """`files` lists paths by domain; a "domain" in a row overrides it. `domains`: rows of others are left out.

    A path is a file, a folder, a pattern ("data/*.jsonl") or a data set ("hub:owner/name"). `graders` names a kind of
    check by domain, for rows without their own; the options of a `choice` are the different answers of its domain.
    `reading` tells by domain how files are read whose names and rows do not say it: their `layout`, their `form`, or
    the `columns` of the question, the answer and so on; and the `licence` of rows that name none.
    """

    model_config = ConfigDict(extra="forbid")
    files: dict[str, list[Path]] = Field(min_length=1)
    domains: tuple[str, ...] | None = None
    graders: dict[str, str] = Field(default_factory=dict)
    reading: dict[str, ReadingConfig] = Field(default_factory=dict)

    @field_validator("graders")
    @classmethod
    def _known(cls, value: dict[str, str]) -> dict[str, str]:
        for kind in value.values():
            if kind not in SUGGESTED:
                raise ValueError(f"'{kind}' is not a grader that needs no further data: {nearest(kind, SUGGESTED)}")
        return value


def identity(config: Config, root: Path) -> Any:
    """The config, and the hashes of all files that its paths name. Raises `DataError`."""
    paths = [within(root, path) for paths in config.files.values() for path in paths]
    return [config.model_dump(mode="json"), content_hashes(paths)]


def _rows(config: Config, root: Path, seen: Seen | None = None) -> Iterator[Example | Rejected]:
    answers: dict[str, set[str]] = defaultdict(set)
    if "choice" in config.graders.values():
        for row in _read(config, root, None):
            if isinstance(row, Example) and config.graders.get(row.domain) == "choice":
                answers[row.domain].add(row.answer)
    for row in _read(config, root, seen):
        if isinstance(row, Example) and "check" not in row.meta and (kind := config.graders.get(row.domain)):
            yield _graded(replace(row, meta={**row.meta, "check": check_of(kind, row.answer, answers[row.domain])}))
        elif isinstance(row, Example) and asks_model(row):
            yield _rejected(row, f"a check of kind '{row.check['kind']}' asks a model, which no step of a build has")
        else:
            yield row


def _graded(row: Example) -> Example | Rejected:
    """A row with the check of its domain, or why no output could be right by it."""
    problem = problem_of(row)
    return _rejected(row, f"{problem} (the grader of the domain '{row.domain}')") if problem else row


def _rejected(row: Example, reason: str) -> Rejected:
    file, _, line = row.source.rpartition(":")
    return Rejected(file, int(line), reason)


def _read(config: Config, root: Path, seen: Seen | None) -> Iterator[Example | Rejected]:
    for domain, paths in config.files.items():
        reading = config.reading[domain].reading() if domain in config.reading else None
        for path in paths:
            for row in iterate(within(root, path), domain, seen, reading):
                if config.domains is None or isinstance(row, Rejected) or row.domain in config.domains:
                    yield row


def estimate(config: Config, given: Given) -> Estimate:
    """Lengths of the rows, read from the files; empty if a file is missing or no row is usable."""
    if any(problem_of_path(within(given.root, path)) for paths in config.files.values() for path in paths):
        return Estimate()
    pairs, places = [], []
    seen = Seen()
    rejected, first = 0, None
    for row in _rows(config, given.root, seen):
        if isinstance(row, Example):
            pairs.append((sum(len(m.content.encode()) for m in row.messages), len(row.answer.encode())))
            places.append(row.source)
        else:
            rejected, first = rejected + 1, first or row
    found = RowFacts.of(pairs, len(pairs), places) if pairs else None
    return Estimate((found,), notes=tuple(warnings(seen, rejected, first)))


def warnings(seen: Seen, rejected: int, first: Rejected | None) -> list[str]:
    """A line for rejected rows, with the `first` of them, and one for columns that are not used."""
    found = []
    if first:
        found.append(
            f"{rejected} rows rejected, all of them in {REJECTED_FILE} of this step, the first: "
            f"{Path(first.file).name}:{first.line}: {first.reason}"
        )
    names = ", ".join(f"'{name}' ({count} rows)" for name, count in sorted(seen.unused.items()))
    return [*found, f"columns not used: {names}"] if names else found


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """Files -> `pool.jsonl` and `rejected.jsonl` in constant memory; DataError if no row is usable.

    A rejected row is {"file", "line", "reason"}.
    """
    domains, seen, rejected = Counter[str](), Seen(), 0
    first: Rejected | None = None
    with (
        open(out / POOL, "w", encoding="utf-8", newline="\n") as pool,
        open(out / REJECTED_FILE, "w", encoding="utf-8", newline="\n") as refused,
    ):
        for done, row in enumerate(_rows(config, context.root, seen), 1):
            if isinstance(row, Rejected):
                refused.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
                rejected, first = rejected + 1, first or row
            else:
                pool.write(to_line(row))
                domains[row.domain] += 1
            if done % _ROWS_PER_REPORT == 0:
                context.progress(done, None, {"rejected": rejected})
    context.progress(domains.total() + rejected, None, {"rejected": rejected})
    if not domains:
        raise DataError(no_usable_row("the files of this recipe", rejected, first))
    return {
        "rows": domains.total(),
        "domains": dict(sorted(domains.items())),
        "rejected": rejected,
        "forms": dict(sorted(seen.forms.items())),
        "unused_columns": dict(sorted(seen.unused.items())),
        "warnings": warnings(seen, rejected, first),
    }
