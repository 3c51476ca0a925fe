"""Stage `load`: reads a user's files into a pool of examples (SPEC A1)."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cogumi.core.errors import DataError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import RowFacts
from cogumi.core.registry import nearest
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example
from cogumi.data.examples import POOL, to_line
from cogumi.data.sources.question_files import Rejected, iterate, no_usable_row
from cogumi.grading.suggest import SUGGESTED, check_of

VERSION = 3
KIND = "pool"
LIGHT = True
INPUTS: dict[str, str] = {}
REJECTED_FILE = "rejected.jsonl"

_ROWS_PER_REPORT = 1_000


class Config(BaseModel):
    """`files` lists paths by domain; a "domain" in a row overrides it. `domains`: rows of others are left out.

    `graders` names a kind of check by domain, for rows without their own; the options of a `choice` are the different
    answers of its domain.
    """

    model_config = ConfigDict(extra="forbid")
    files: dict[str, list[Path]] = Field(min_length=1)
    domains: tuple[str, ...] | None = None
    graders: dict[str, str] = Field(default_factory=dict)

    @field_validator("graders")
    @classmethod
    def _known(cls, value: dict[str, str]) -> dict[str, str]:
        for kind in value.values():
            if kind not in SUGGESTED:
                raise ValueError(f"'{kind}' is not a grader that needs no further data: {nearest(kind, SUGGESTED)}")
        return value


def _rows(config: Config, root: Path, unused: Counter[str] | None = None) -> Iterator[Example | Rejected]:
    answers: dict[str, set[str]] = defaultdict(set)
    if "choice" in config.graders.values():
        for row in _read(config, root, None):
            if isinstance(row, Example) and config.graders.get(row.domain) == "choice":
                answers[row.domain].add(row.answer)
    for row in _read(config, root, unused):
        if isinstance(row, Example) and "check" not in row.meta and (kind := config.graders.get(row.domain)):
            yield replace(row, meta={**row.meta, "check": check_of(kind, row.answer, answers[row.domain])})
        else:
            yield row


def _read(config: Config, root: Path, unused: Counter[str] | None) -> Iterator[Example | Rejected]:
    for domain, paths in config.files.items():
        for path in paths:
            for row in iterate(root / path, domain, unused):
                if config.domains is None or isinstance(row, Rejected) or row.domain in config.domains:
                    yield row


def estimate(config: Config, given: Given) -> Estimate:
    """Lengths of the rows, read from the files; empty if a file is missing or no row is usable."""
    if not all((given.root / path).is_file() for paths in config.files.values() for path in paths):
        return Estimate()
    pairs, places = [], []
    unused = Counter[str]()
    rejected, first = 0, None
    for row in _rows(config, given.root, unused):
        if isinstance(row, Example):
            pairs.append((sum(len(m.content.encode()) for m in row.messages), len(row.answer.encode())))
            places.append(row.source)
        else:
            rejected, first = rejected + 1, first or row
    found = RowFacts.of(pairs, len(pairs), places) if pairs else None
    return Estimate((found,), notes=tuple(warnings(unused, rejected, first)))


def warnings(unused: Mapping[str, int], rejected: int, first: Rejected | None) -> list[str]:
    """A line for rejected rows, with the `first` of them, and one for columns that are not used."""
    found = []
    if first:
        found.append(f"{rejected} rows rejected, the first: {Path(first.file).name}:{first.line}: {first.reason}")
    names = ", ".join(f"'{name}' ({count} rows)" for name, count in sorted(unused.items()))
    return [*found, f"columns not used: {names}"] if names else found


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """Files -> `pool.jsonl` and `rejected.jsonl` in constant memory; DataError if no row is usable.

    A rejected row is {"file", "line", "reason"}.
    """
    domains, unused, rejected = Counter[str](), Counter[str](), 0
    first: Rejected | None = None
    with (
        open(out / POOL, "w", encoding="utf-8", newline="\n") as pool,
        open(out / REJECTED_FILE, "w", encoding="utf-8", newline="\n") as refused,
    ):
        for done, row in enumerate(_rows(config, context.root, unused), 1):
            if isinstance(row, Rejected):
                refused.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
                rejected, first = rejected + 1, first or row
            else:
                pool.write(to_line(row))
                domains[row.domain] += 1
            if done % _ROWS_PER_REPORT == 0:
                context.progress(done, None, {"rejected": rejected})
    if not domains:
        raise DataError(no_usable_row("the files of this recipe", rejected, first))
    return {
        "rows": domains.total(),
        "domains": dict(sorted(domains.items())),
        "rejected": rejected,
        "unused_columns": dict(sorted(unused.items())),
        "warnings": warnings(unused, rejected, first),
    }
