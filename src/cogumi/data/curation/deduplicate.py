"""Stage `deduplicate`: drops near-duplicates, and marks rows that must stay in one split (SPEC A4).

Two rows are duplicates if their questions are similar and their answers agree (equal, or similar too); the first one is
kept. The same question with different answers is a conflict. Rows with similar questions form a cluster: where several
of a cluster are kept, `meta["split_group"]` names it, and stage `split` puts them into the same set. Similarity is that
of Jaccard between sets of shingles of the normalised texts (`shingles`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

from cogumi.core.errors import DataError
from cogumi.core.stage import CHECKPOINT, Context
from cogumi.core.text import normalise
from cogumi.core.types import Artifact
from cogumi.data.curation.near_pairs import BANDS, Groups, find_groups, recall
from cogumi.data.curation.pool_writer import DROPPED, PoolWriter, rows_of, same_facts
from cogumi.data.curation.shingles import BATCH_BYTES, Hashes, Integers
from cogumi.data.curation.sketches import Sketches, SketchFiles
from cogumi.data.examples import POOL, SPLIT_GROUP, normalised_text
from cogumi.data.examples import from_json as to_example

VERSION = 1
KIND = "pool"
INPUTS = {"pool": "pool"}
CONFLICTS = "conflicts.jsonl"
CHUNK = 10_000
"""Rows that are sketched and stored together, if their texts have no more than `BATCH_BYTES` characters."""

_ALONE = -1
_MANY = 0.2
"""Share of repeated rows above which one should look whether they are."""
_LARGE = 0.05
"""Share of the kept rows above which a cluster is rather a template than a question and its variants."""


class Config(BaseModel):
    """`threshold`: Jaccard similarity from which questions, or answers, are similar. `conflicts`: whether rows with the
    same question and different answers are kept or dropped, all of them; `conflicts.jsonl` lists them either way.
    """

    model_config = ConfigDict(extra="forbid")
    threshold: float = Field(0.8, ge=0.6, le=1)
    conflicts: Literal["keep", "drop"] = "keep"


@dataclass(frozen=True, slots=True, eq=False)
class Decisions:
    """For each of n rows the row that it repeats, or itself; the first row of its cluster, or `_ALONE` if no other row
    of it is kept; and whether it is in conflict [n].
    """

    original: Integers
    cluster: Integers
    conflict: NDArray[np.bool_]


estimate = same_facts


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`pool` -> its first rows of each set of duplicates, and `conflicts.jsonl`.

    The checkpoint holds what is known of the rows read so far; memory takes some 400 bytes per row.
    """
    pool, total = inputs["pool"].path / POOL, rows_of(inputs["pool"])
    files = SketchFiles(out / CHECKPOINT)
    _sketch(pool, files, context, total)
    writer = PoolWriter(out, context, total, {"conflict": "set `conflicts: keep`"})
    if not files.rows:
        with writer:
            return writer.metrics()
    sketches = files.open()
    groups = find_groups(sketches, config.threshold, lambda done, of: context.progress(done, of, {}))
    decisions = decide(sketches, groups, config.conflicts == "drop")
    with writer:
        _write(pool, out, sketches, decisions, config.conflicts == "drop", writer)
    return writer.metrics() | _figures(sketches, decisions, config)


def _sketch(pool: Path, files: SketchFiles, context: Context, total: int | None) -> None:
    """Sketch the rows of a pool that are not yet in `files`."""
    chunk: list[tuple[str, str]] = []
    characters = 0
    with open(pool, encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(islice(lines, files.rows, None), files.rows + 1):
            try:
                row = from_json(line)
                question = "\n".join([m["content"] for m in row["messages"] if m["role"] != "system"])
                chunk.append((normalised_text(question), normalise(row["answer"])))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{pool}:{number} is not an example ({error}): build this step again") from error
            characters += len(line)
            if len(chunk) == CHUNK or characters >= BATCH_BYTES:
                files.append(chunk)
                context.progress(files.rows, total, {})
                chunk, characters = [], 0
    if chunk:
        files.append(chunk)


def decide(sketches: Sketches, groups: Groups, drop_conflicts: bool) -> Decisions:
    """What happens to each row; pure."""
    count = len(sketches.question_keys)
    kept = groups.original == np.arange(count)
    _, question, asked = np.unique(sketches.question_keys[kept], return_inverse=True, return_counts=True)
    conflict = np.zeros(count, np.bool_)
    conflict[kept] = asked[question] > 1
    if drop_conflicts:
        kept &= ~conflict
    members = np.bincount(groups.cluster[kept], minlength=count)
    together = kept & (members[groups.cluster] > 1)
    return Decisions(groups.original, np.where(together, groups.cluster, _ALONE), conflict)


def _write(
    pool: Path, out: Path, sketches: Sketches, decisions: Decisions, drop_conflicts: bool, writer: PoolWriter
) -> None:
    """Copy the kept lines of the pool; only rows that are changed, listed or referred to are parsed."""
    rows = np.arange(len(decisions.original))
    referred = np.zeros(len(rows), np.bool_)
    referred[decisions.original[decisions.original != rows]] = True
    clustered = decisions.cluster[decisions.cluster != _ALONE]
    referred[clustered] = True
    parsed = referred | (decisions.original != rows) | decisions.conflict | (decisions.cluster != _ALONE)
    ids, places, askers = dict[int, str](), dict[int, str](), dict[int, str]()
    with (
        open(pool, encoding="utf-8", newline="\n") as lines,
        open(out / CONFLICTS, "w", encoding="utf-8", newline="\n") as conflicts,
    ):
        for row, (line, needed) in enumerate(zip(lines, parsed.tolist(), strict=True)):
            if not needed:
                writer.keep(line)
                continue
            found = from_json(line)
            if referred[row]:
                ids[row], places[row] = found["id"], found["source"] or found["id"]
            original, cluster = int(decisions.original[row]), int(decisions.cluster[row])
            if original != row:
                same = _same(sketches.question_keys, row, original) and _same(sketches.answer_keys, row, original)
                rule = "duplicate" if same else "near_duplicate"
                writer.drop(to_example(found), rule, f"{'repeats' if same else 'nearly repeats'} {places[original]}")
                continue
            if decisions.conflict[row]:
                first = askers.setdefault(int(sketches.question_keys[row]), found["source"] or found["id"])
                listed = {"question": first, "id": found["id"], "source": found["source"], "answer": found["answer"]}
                conflicts.write(json.dumps(listed, ensure_ascii=False) + "\n")
                if drop_conflicts:
                    writer.drop(to_example(found), "conflict", f"rows with the question of {first} disagree")
                    continue
            if cluster != _ALONE:
                found["meta"] = found["meta"] | {SPLIT_GROUP: ids[cluster]}
                line = json.dumps(found, ensure_ascii=False) + "\n"
            writer.keep(line)


def _same(keys: Hashes, one: int, other: int) -> bool:
    return bool(keys[one] == keys[other])


def _figures(sketches: Sketches, decisions: Decisions, config: Config) -> dict[str, Any]:
    """Clusters and conflicts in numbers, and the probability of a pair at the threshold to be found."""
    sizes = np.bincount(decisions.cluster[decisions.cluster != _ALONE], minlength=1)
    kept = int((decisions.original == np.arange(len(decisions.original))).sum())
    largest = int(sizes.max())
    figures: dict[str, Any] = {
        "clusters": {"number": int((sizes > 0).sum()), "rows": int(sizes.sum()), "largest": largest},
        "conflicts": {
            "questions": len(np.unique(sketches.question_keys[decisions.conflict])),
            "rows": int(decisions.conflict.sum()),
        },
        "found_at_threshold": round(recall(config.threshold), 4),
    }
    figures["warnings"] = []
    repeats = len(decisions.original) - kept
    if repeats > _MANY * len(decisions.original):
        figures["warnings"].append(
            f"{repeats:,} of {len(decisions.original):,} rows repeat another: look at some of {DROPPED}; questions "
            "that share a long template look alike, then raise `threshold`"
        )
    if largest > max(_LARGE * kept, BANDS):
        figures["warnings"].append(
            f"{largest:,} of {kept:,} rows are similar to one another and will be in one split: they share a long "
            "text; raise `threshold`, or ask without it"
        )
    return figures
