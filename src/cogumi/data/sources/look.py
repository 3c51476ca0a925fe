"""What is in question files: forms, rows, rejected rows by reason, lengths, languages, repetitions, graders (SPEC A1).

Every row is counted; languages, near-duplicates, lengths and the suggested grader are those of the first rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.core.packages import installed
from cogumi.core.pictures import legend_below, new_figure
from cogumi.core.text import normalise
from cogumi.core.types import Example
from cogumi.data.curation import language
from cogumi.data.curation.near_pairs import repeated
from cogumi.data.examples import normalised_question
from cogumi.data.sources.containers import topic
from cogumi.data.sources.hub import is_hub_id
from cogumi.data.sources.question_files import Reading, Rejected, Seen, iterate
from cogumi.data.sources.question_groups import Group, question_groups
from cogumi.grading.suggest import suggested_grader

SAMPLE = 5_000
"""The first rows, of which a grader is suggested, lengths are measured, and near-duplicates are sought."""
LANGUAGE_SAMPLE = 1_000
CHARACTERS = 2_000
"""Beginning of a text that is looked at."""
GROUPED = 400
"""Questions that are grouped by meaning, spread over the first rows."""
SIMILAR = 0.8
"""Jaccard similarity of near-duplicates."""
PER_REPORT = 1_000
_QUOTED = re.compile(r"'[^']*'|\d+")


@dataclass
class Look:
    """The rows of one path. `reasons` counts rejected rows by their reason without its details; `first` is an example
    of each. Lengths are in words.
    """

    path: Path
    rows: int = 0
    repeated: int = 0
    seen: Seen = field(default_factory=Seen)
    domains: Counter[str] = field(default_factory=Counter)
    graders: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, Rejected] = field(default_factory=dict)
    example: Example | None = None
    groups: Sequence[Group] = ()
    _questions: set[bytes] = field(default_factory=set)
    _answers: list[str] = field(default_factory=list)
    _texts: list[tuple[str, str]] = field(default_factory=list)
    _words: list[tuple[int, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """How tables call the path: a file by its name, a data set by its id."""
        return str(self.path) if is_hub_id(self.path) else self.path.name

    @property
    def rejected(self) -> int:
        """Number of rejected rows."""
        return self.reasons.total()

    @property
    def grader(self) -> str | None:
        """The checks of the rows, or else the grader that fits their answers; None if no grader fits."""
        if self.graders:
            return ", ".join(name for name, _ in self.graders.most_common(3))
        return suggested_grader(self._answers) if self._answers else None

    @cached_property
    def languages(self) -> Mapping[str, int] | None:
        """The languages of the first `LANGUAGE_SAMPLE` rows, most frequent first; None without py3langid."""
        if not installed("py3langid"):
            return None
        identify = language.identifier(language.Config())
        return dict(Counter(identify("\n".join(pair)) for pair in self._texts[:LANGUAGE_SAMPLE]).most_common())

    @cached_property
    def near_duplicates(self) -> int | None:
        """How many of the first `SAMPLE` rows repeat another's question and answer nearly; None without rensa."""
        return repeated(self._texts, SIMILAR) if installed("rensa") else None

    @property
    def looked_at(self) -> int:
        """Number of the first rows of which texts are compared."""
        return len(self._texts)

    def group(self, embed: Callable[[Sequence[str]], NDArray[np.float32]]) -> None:
        """Group some of the first questions by the meaning that sentence embeddings see."""
        questions = [question for question, _ in self._texts[:: -(-len(self._texts) // GROUPED) or 1]]
        self.groups = question_groups(questions, embed(questions)) if questions else ()

    def lengths(self, part: int) -> list[int]:
        """Words of each of the first questions (part 0) or answers (part 1), in increasing order."""
        return sorted(pair[part] for pair in self._words)

    def words(self, part: int, share: float) -> int:
        """The length that a share of the questions (part 0) or answers (part 1) does not exceed."""
        lengths = self.lengths(part)
        return lengths[min(int(share * len(lengths)), len(lengths) - 1)] if lengths else 0

    def add(self, row: Example | Rejected) -> None:
        """Count one row."""
        if isinstance(row, Rejected):
            kind = _QUOTED.sub("…", row.reason)[:120]
            self.reasons[kind] += 1
            self.first.setdefault(kind, row)
            return
        self.rows += 1
        self.domains[row.domain] += 1
        self.example = self.example or row
        if "check" in row.meta:
            self.graders[row.check["kind"]] += 1
        question = normalised_question(row.messages)
        digest = blake2b(question.encode(), digest_size=8).digest()
        self.repeated += digest in self._questions
        self._questions.add(digest)
        if len(self._words) < SAMPLE:
            self._words.append((len(question.split()), len(row.answer.split())))
            self._answers.append(row.answer)
            self._texts.append((question[:CHARACTERS], normalise(row.answer)[:CHARACTERS]))

    def to_json(self) -> dict[str, Any]:
        """All figures as one JSON object."""
        return {
            "path": str(self.path),
            "forms": dict(self.seen.forms),
            "rows": self.rows,
            "rejected": self.rejected,
            "reasons": [
                {"reason": kind, "rows": count, "first": str(self.first[kind])}
                for kind, count in self.reasons.most_common()
            ],
            "repeated_questions": self.repeated,
            "near_duplicates": self.near_duplicates,
            "languages": self.languages,
            "looked_at": self.looked_at,
            "groups": [asdict(group) for group in self.groups],
            "unused_columns": dict(self.seen.unused),
            "domains": dict(self.domains),
            "question_words": {str(q): self.words(0, q) for q in (0.5, 0.95)},
            "answer_words": {str(q): self.words(1, q) for q in (0.5, 0.95)},
            "grader": self.grader,
            "own_checks": dict(self.graders),
        }


def look(path: Path, reading: Reading | None = None, progress: Callable[[int], None] = lambda rows: None) -> Look:
    """Read a path once, in memory that grows by a few bytes per row. Raises `DataError` if it cannot be read."""
    found = Look(path)
    for number, row in enumerate(iterate(path, topic(path) or "general", found.seen, reading), 1):
        found.add(row)
        if number % PER_REPORT == 0:
            progress(number)
    return found


def picture(path: Path, looks: Sequence[Look]) -> None:
    """Lengths of questions and answers, and what became of the rows, of some files as one picture."""
    figure, (questions, answers, rows) = new_figure(3, height=3.0 + 0.3 * len(looks))
    for part, axes in enumerate((questions, answers)):
        for one in looks:
            lengths = one.lengths(part)
            shares = [(i + 1) / len(lengths) for i in range(len(lengths))]
            axes.plot([max(length, 1) for length in lengths], shares, label=one.name)
        axes.set(xscale="log", xlabel=f"words of {('a question', 'an answer')[part]}", ylabel="share of the rows")
    legend_below(questions, 1)
    counts = {
        "usable": [one.rows for one in looks],
        "repeated questions": [one.repeated for one in looks],
        "rejected": [one.rejected for one in looks],
    }
    for shift, (label, values) in enumerate(counts.items()):
        bars = rows.barh([place + 0.25 * shift for place in range(len(looks))], values, 0.25, label=label)
        rows.bar_label(bars, [f" {value:,}" for value in values], fontsize="small")
    rows.set_yticks([place + 0.25 for place in range(len(looks))], [one.name for one in looks], fontsize="small")
    rows.invert_yaxis()
    rows.margins(x=0.15)
    rows.set(xlabel="rows")
    legend_below(rows, 3)
    figure.savefig(path)
