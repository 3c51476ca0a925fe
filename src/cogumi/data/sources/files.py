"""Stage `files`: a user's own files in place of the embedded world (SPEC A1).

Each question belongs to one set by a hash of its normalised text and the seed: however often and wherever it
occurs, it stays there. So the five sets share no question, and new rows move no old one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import DataError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import RowFacts
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example
from cogumi.data.examples import SPLITS, normalised_question, split_of, split_path, to_line
from cogumi.data.sources.question_files import Rejected, iterate, no_usable_row, write_rejected

VERSION = 1
KIND = "examples"
INPUTS: dict[str, str] = {}
REJECTED_FILE = "rejected.jsonl"

_ROWS_PER_REPORT = 1_000

Share = Annotated[int, Field(ge=1)]


class Config(BaseModel):
    """`files` lists paths by domain (a row's own "domain" wins); each set gets its share of the questions."""

    model_config = ConfigDict(extra="forbid")
    files: dict[str, list[Path]] = Field(min_length=1)
    train: Share = 60
    selection: Share = 5
    fit: Share = 12
    threshold: Share = 12
    heldout: Share = 11


def _rows(config: Config, root: Path) -> Iterator[Example | Rejected]:
    for domain, paths in config.files.items():
        for path in paths:
            yield from iterate(root / path, domain)


def estimate(config: Config, given: Given) -> Estimate:
    """Lengths of the rows, by reading the files; nothing if one is missing or no row can be used."""
    paths = [given.root / path for paths in config.files.values() for path in paths]
    if not all(path.is_file() for path in paths):
        return Estimate()
    found = [row for path in paths for row in iterate(path) if isinstance(row, Example)]
    pairs = [(sum(len(m.content.encode()) for m in e.messages), len(e.answer.encode())) for e in found]
    share = config.train / sum(getattr(config, name) for name in SPLITS)
    return Estimate((RowFacts.of(pairs, int(share * len(pairs))) if pairs else None,))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """Nothing -> `<split>.jsonl` for every set, and `rejected.jsonl`; DataError if a set stays empty."""
    shares = {name: int(getattr(config, name)) for name in SPLITS}
    rejected: list[Rejected] = []
    rows, domains = Counter(dict.fromkeys(SPLITS, 0)), Counter[str]()
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(open(split_path(out, name), "w", encoding="utf-8", newline="\n"))
            for name in SPLITS
        }
        for done, row in enumerate(_rows(config, context.root), 1):
            if isinstance(row, Rejected):
                rejected.append(row)
            else:
                name = split_of(normalised_question(row.messages), shares, context.seed)
                files[name].write(to_line(row))
                rows[name] += 1
                domains[row.domain] += 1
            if done % _ROWS_PER_REPORT == 0:
                context.progress(done, None, {"rejected": len(rejected)})
    write_rejected(out / REJECTED_FILE, rejected)
    if not domains:
        raise DataError(no_usable_row("the files of this recipe", rejected))
    if empty := [name for name in SPLITS if not rows[name]]:
        raise DataError(
            f"{sum(rows.values())} usable rows leave nothing for {', '.join(empty)}: "
            "give more rows, or these sets a larger share"
        )
    return {"rows": dict(rows), "domains": dict(sorted(domains.items())), "rejected": len(rejected)}
