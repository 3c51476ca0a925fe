"""Stage `mix`: exact numbers of rows by domain, difficulty or source, drawn with a seed (SPEC A6).

Which rows of a group are taken depends on a hash of their ids and the seed, so that a larger quota adds rows and
exchanges none. The order of the pool is kept.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cogumi.core.errors import DataError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import BYTES_PER_TOKEN, RowFacts
from cogumi.core.registry import nearest
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example
from cogumi.data.curation.pool_writer import ROWS_PER_REPORT, PoolWriter, examples_of, rows_of, whole_text
from cogumi.data.examples import NO_LEVEL, to_line

VERSION = 1
KIND = "pool"
INPUTS = {"pool": "pool"}

EASY_UP_TO = 2
"""The highest level of difficulty that counts as easy."""
PRESETS: dict[str, tuple[str, dict[str, int]]] = {
    "corpus-600k": (
        "domain",
        {"web": 150_000, "docs": 120_000, "science": 100_000, "code": 80_000, "chat": 75_000, "reasoning": 75_000},
    ),
    "plan-60k": (
        "domain",
        dict.fromkeys(("code", "math", "tools", "reasoning"), 10_000)
        | dict.fromkeys(("reading", "summarization", "commonsense", "instructions"), 5_000),
    ),
    "easy-hard": ("ease", {"easy": 40, "hard": 60}),
}
"""Name -> what the rows are grouped by, and the quota of each group."""

By = Literal["domain", "difficulty", "ease", "source"]


class Config(BaseModel):
    """`quotas`: rows of each group that `by` makes: the domain; the difficulty (1 to 5); the ease (easy: levels 1 and
    2; hard: above); the source (the name of the file). Rows of other groups are dropped. `preset` stands for `by` and
    `quotas`. With a `total`, quotas are shares of it.
    """

    model_config = ConfigDict(extra="forbid")
    by: By = "domain"
    quotas: dict[str, int] = Field(default_factory=dict)
    preset: str | None = None
    total: int | None = Field(None, ge=1)

    @field_validator("quotas", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return {str(name): quota for name, quota in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_source_of_quotas(self) -> Self:
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"there is no preset '{self.preset}': {nearest(self.preset, PRESETS)}")
        if bool(self.quotas) == (self.preset is not None):
            raise ValueError("give either `quotas` or a `preset`")
        if any(quota < 1 for quota in self.quotas.values()):
            raise ValueError("a quota is at least 1; leave out groups that you do not want")
        return self

    @property
    def grouped_by(self) -> str:
        """What the rows are grouped by."""
        return PRESETS[self.preset][0] if self.preset else self.by

    @property
    def wanted(self) -> dict[str, int]:
        """The number of rows of each group."""
        quotas = PRESETS[self.preset][1] if self.preset else self.quotas
        return quotas if self.total is None else apportion(quotas, self.total)


def apportion(shares: Mapping[str, int], total: int) -> dict[str, int]:
    """`total` divided in proportion to `shares`, with the largest remainders rounded up; the sum is exact."""
    whole = sum(shares.values())
    found = {name: share * total // whole for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: (-(shares[name] * total % whole), name))
    for name in by_remainder[: total - sum(found.values())]:
        found[name] += 1
    return found


def estimate(config: Config, given: Given) -> Estimate:
    """The rows of all quotas."""
    pool = given.find("pool", RowFacts)
    return Estimate((replace(pool, count=sum(config.wanted.values())) if pool else None,))


def group_of(example: Example, by: str) -> str:
    """The group of a row."""
    if by == "domain":
        return example.domain
    if by == "source":
        return example.source.rpartition(":")[0] or example.source
    if not example.difficulty:
        return NO_LEVEL
    if by == "difficulty":
        return str(example.difficulty)
    return "easy" if example.difficulty <= EASY_UP_TO else "hard"


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`pool` -> as many rows of each group as its quota says; `DataError` if the pool has too few of one."""
    wanted, by = config.wanted, config.grouped_by
    chosen = _choose(inputs["pool"], wanted, by, context)
    rows, tokens = Counter[str](), Counter[str]()
    with PoolWriter(out, context, rows_of(inputs["pool"]), {}) as writer:
        for number, example in enumerate(examples_of(inputs["pool"])):
            group = group_of(example, by)
            if number in chosen:
                writer.keep(to_line(example))
                rows[group] += 1
                tokens[group] += round(len(whole_text(example).encode()) / BYTES_PER_TOKEN)
            elif group in wanted:
                writer.drop(example, "quota", f"the quota of {wanted[group]:,} for '{group}' is full")
            else:
                writer.drop(example, "no_quota", f"'{group}' has no quota")
    shares = {group: round(count / tokens.total(), 4) for group, count in tokens.items()}
    return writer.metrics() | {
        "by": by,
        "groups": dict(sorted(rows.items())),
        "tokens_estimated": dict(sorted(tokens.items())),
        "token_shares": dict(sorted(shares.items())),
    }


def _choose(pool: Artifact, wanted: Mapping[str, int], by: str, context: Context) -> set[int]:
    """The numbers of the chosen rows; memory is that of the quotas."""
    best: dict[str, list[tuple[int, int]]] = defaultdict(list)
    available = Counter[str]()
    for number, example in enumerate(examples_of(pool)):
        group = group_of(example, by)
        available[group] += 1
        if number % ROWS_PER_REPORT == 0:
            context.progress(number, rows_of(pool), {})
        if group not in wanted:
            continue
        digest = blake2b(f"{context.seed}\n{example.id}".encode(), digest_size=8).digest()
        entry = (-int.from_bytes(digest, "big"), -number)
        if len(best[group]) < wanted[group]:
            heapq.heappush(best[group], entry)
        else:
            heapq.heappushpop(best[group], entry)
    if lacking := {group: quota for group, quota in wanted.items() if available[group] < quota}:
        raise DataError(_shortage(lacking, available, wanted, by))
    return {-number for entries in best.values() for _, number in entries}


def _shortage(lacking: Mapping[str, int], available: Counter[str], wanted: Mapping[str, int], by: str) -> str:
    """The message for quotas that cannot be met, with the largest total that can."""
    numbers = ", ".join(f"'{group}' has {available[group]:,} of {quota:,} rows" for group, quota in lacking.items())
    most = min(sum(wanted.values()) * available[group] // quota for group, quota in wanted.items() if quota)
    if not most:
        known = ", ".join(f"'{group}'" for group, _ in available.most_common(8))
        return f"quotas cannot be met: {numbers}; the pool's groups by {by} are {known}"
    return f"quotas cannot be met: {numbers}; add rows, lower these quotas, or set `total: {most}` for the same shares"
