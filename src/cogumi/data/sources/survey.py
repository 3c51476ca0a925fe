"""Surveys a user's question files before a build: domains, rows, answers, and the graders they need (SPEC M4)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cogumi.core.errors import DataError
from cogumi.core.types import Example
from cogumi.data.examples import normalised_question
from cogumi.data.sources.containers import topic
from cogumi.data.sources.question_files import Reading, load
from cogumi.grading.graders import asks_model
from cogumi.grading.suggest import suggested_grader

OWN = "each row's own check"
BYTES_PER_TOKEN = 3.0
LONGEST_ANSWER = 256
"""Tokens of an answer, at most."""
AS_SEEN = Reading()
_NAME = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class DomainRows:
    """The rows of one domain. `grader` is a kind of check, `OWN`, or None where no grader of a build fits the answers.

    `example` is the first row, `longest` the one with the longest question.

    `questions` counts different questions; `answer_bytes` is the length that 95% of the answers do not exceed.
    """

    name: str
    files: tuple[Path, ...]
    rows: int
    questions: int
    rejected: int
    grader: str | None
    answer_bytes: int
    example: Example = field(repr=False)
    longest: Example = field(repr=False)


@dataclass(frozen=True, slots=True)
class Survey:
    """The domains of some files, in the order of the files, and how these were read."""

    domains: tuple[DomainRows, ...]
    reading: Reading = AS_SEEN

    @property
    def gradable(self) -> tuple[DomainRows, ...]:
        """Domains with a grader."""
        return tuple(d for d in self.domains if d.grader)

    @property
    def max_tokens(self) -> int:
        """Tokens that leave room for most of the files' answers: twice the longest usual one, at least 32."""
        longest = max((d.answer_bytes for d in self.gradable), default=0)
        return min(LONGEST_ANSWER, max(32, 16 * math.ceil(2 * longest / BYTES_PER_TOKEN / 16)))


def domain_name(text: str) -> str:
    """A text as a domain's name: letters, digits, `_` and `-`."""
    return _NAME.sub("_", text).strip("_-") or "general"


def survey(files: Sequence[Path], reading: Reading = AS_SEEN) -> Survey:
    """Read all files once. The domain of a row is its own, or else the name of its file or data set.

    Raises `DataError` for a file that cannot be read or has no usable row.
    """
    if not files:
        raise DataError("name at least one file of questions and answers")
    found: dict[str, list[Example]] = {}
    places: dict[str, dict[Path, None]] = {}
    rejected: dict[str, int] = {}
    for path in files:
        default = domain_name(topic(path))
        examples, refused = load(path, default, reading)
        rejected[default] = rejected.get(default, 0) + len(refused)
        for example in examples:
            name = domain_name(example.domain)
            found.setdefault(name, []).append(example)
            places.setdefault(name, {})[path] = None
    domains = (_of(name, rows, tuple(places[name]), rejected.get(name, 0)) for name, rows in found.items())
    return Survey(tuple(domains), reading)


def _of(name: str, rows: Sequence[Example], files: tuple[Path, ...], rejected: int) -> DomainRows:
    lengths = sorted(len(e.answer.encode()) for e in rows)
    different = len({normalised_question(e.messages) for e in rows})
    usual = lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]
    longest = max(rows, key=lambda e: sum(len(m.content.encode()) for m in e.messages))
    return DomainRows(name, files, len(rows), different, rejected, _grader(rows), usual, rows[0], longest)


def _grader(rows: Sequence[Example]) -> str | None:
    without = [e.answer for e in rows if "check" not in e.meta]
    if not without and any(map(asks_model, rows)):
        return None
    return suggested_grader(without) if without else OWN


def files_by_domain(domains: Iterable[DomainRows]) -> Mapping[str, list[Path]]:
    """The files to load under each domain's name; a file with several domains is listed once."""
    listed: dict[str, list[Path]] = {}
    seen: set[Path] = set()
    for domain in domains:
        fresh = [path for path in domain.files if path not in seen]
        seen.update(fresh)
        if fresh:
            listed[domain.name] = fresh
    return listed
