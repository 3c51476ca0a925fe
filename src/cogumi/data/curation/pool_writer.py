"""What the steps of curation share: a pool of kept rows, and a list of dropped ones with their reasons (SPEC A5).

A step writes `pool.jsonl` and `dropped.jsonl`, one JSON object per dropped row:
{"id", "source", "rule", "reason", "text" (the first 200 characters of question and answer)}.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from cogumi.core.errors import DataError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import RowFacts
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example
from cogumi.data.examples import POOL, iterate_examples

DROPPED = "dropped.jsonl"

_SHOWN = 200
ROWS_PER_REPORT = 1_000


def whole_text(example: Example) -> str:
    """Question and answer as one text, without the system prompt."""
    return "\n".join([*(m.content for m in example.messages if m.role != "system"), example.answer])


def rows_of(pool: Artifact) -> int | None:
    """The number of rows of a pool, from its metrics; None if its step does not say."""
    rows = pool.metrics.get("rows")
    return rows if isinstance(rows, int) else None


def same_facts(config: Any, given: Given) -> Estimate:
    """The estimate of a step that drops rows: those of its pool at most."""
    return Estimate((given.find("pool", RowFacts),))


class PoolWriter:
    """Writes the rows of a step; a context manager.

    `remedies`: what to do, by rule, if that rule leaves nothing. Progress is reported against `total` rows.
    """

    def __init__(self, out: Path, context: Context, total: int | None, remedies: Mapping[str, str]) -> None:
        self._out, self._context, self._total, self._remedies = out, context, total, remedies
        self._read = 0
        self._dropped: Counter[str] = Counter()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._pool = stack.enter_context(open(self._out / POOL, "w", encoding="utf-8", newline="\n"))
            self._list = stack.enter_context(open(self._out / DROPPED, "w", encoding="utf-8", newline="\n"))
            self._files = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def keep(self, line: str) -> None:
        """Keep a row, given as its JSON line with line break."""
        self._pool.write(line)
        self._count()

    def drop(self, example: Example, rule: str, reason: str) -> None:
        """List a row as dropped."""
        found = {"id": example.id, "source": example.source, "rule": rule, "reason": reason}
        self._list.write(json.dumps(found | {"text": whole_text(example)[:_SHOWN]}, ensure_ascii=False) + "\n")
        self._dropped[rule] += 1
        self._count()

    def metrics(self) -> dict[str, Any]:
        """Rows read and kept, and dropped ones by rule; `DataError` if none is left."""
        if not self._read:
            raise DataError("the pool has no rows: give the step before this one rows that it keeps")
        self._report()
        kept = self._read - self._dropped.total()
        if not kept:
            rule, count = self._dropped.most_common(1)[0]
            raise DataError(
                f"no row is left: the rule '{rule}' dropped {count:,} of {self._read:,} ({self._out / DROPPED} lists "
                f"them); {self._remedies[rule]}"
            )
        return {"rows": kept, "read": self._read, "dropped": dict(self._dropped.most_common())}

    def _count(self) -> None:
        self._read += 1
        if self._read % ROWS_PER_REPORT == 0:
            self._report()

    def _report(self) -> None:
        self._context.progress(self._read, self._total, {"dropped": self._dropped.total()})


def examples_of(pool: Artifact) -> Iterator[Example]:
    """The rows of a pool, one at a time."""
    return iterate_examples(pool.path / POOL)
