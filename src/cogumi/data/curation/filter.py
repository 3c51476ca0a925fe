"""Stage `filter`: drops rows by rules and thresholds, from the statistics of stage `score` (SPEC A5).

A row is listed under the first rule that drops it. For each rule the metrics count, besides, the rows that it would
drop alone, and those that only it drops: what comes back if the rule is left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from cogumi.core.errors import DataError
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.curation.boilerplate import Settings as Boilerplate
from cogumi.data.curation.coherence import Settings as Coherence
from cogumi.data.curation.copyright import Settings as Copyright
from cogumi.data.curation.length import Settings as Length
from cogumi.data.curation.offensive import Settings as Offensive
from cogumi.data.curation.personal_data import Settings as PersonalData
from cogumi.data.curation.personal_data import redact
from cogumi.data.curation.pool_writer import PoolWriter, examples_of, rows_of, same_facts
from cogumi.data.curation.rules import RULES
from cogumi.data.curation.score import STATISTICS
from cogumi.data.examples import to_line

VERSION = 1
KIND = "pool"
LIGHT = True
INPUTS = {"pool": "pool", "statistics": "statistics"}


class Config(BaseModel):
    """The settings of each rule that is applied; `{}` stands for the defaults of a rule."""

    model_config = ConfigDict(extra="forbid")
    length: Length | None = None
    boilerplate: Boilerplate | None = None
    copyright: Copyright | None = None
    offensive: Offensive | None = None
    personal_data: PersonalData | None = None
    coherence: Coherence | None = None

    @model_validator(mode="after")
    def _some_rule(self) -> Self:
        if not self.rules:
            raise ValueError(f"name at least one rule: {', '.join(RULES)}")
        return self

    @property
    def rules(self) -> dict[str, Any]:
        """The settings of the rules that are applied, in their order."""
        return {name: settings for name in RULES if (settings := getattr(self, name)) is not None}


estimate = same_facts


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`pool` and its `statistics` -> the rows that no rule drops; personal data may be redacted in them."""
    statistics = inputs["statistics"].path / STATISTICS
    _check(config, statistics)
    judges = {
        name: RULES[name].judge(settings, (row[name] for row in _rows(statistics)))
        for name, settings in config.rules.items()
    }
    alone, only, redacted = Counter[str](), Counter[str](), 0
    remedies = {name: RULES[name].REMEDY for name in judges}
    redacts = config.personal_data is not None and config.personal_data.action == "redact"
    with PoolWriter(out, context, rows_of(inputs["pool"]), remedies) as writer:
        for example, values in zip_longest(examples_of(inputs["pool"]), _rows(statistics)):
            if example is None or values is None or example.id != values["id"]:
                raise DataError("the statistics are those of another pool: give `filter` the pool that `score` read")
            reasons = {name: reason for name, judge in judges.items() if (reason := judge(values[name]))}
            alone.update(list(reasons))
            if len(reasons) == 1:
                only.update(list(reasons))
            if reasons:
                writer.drop(example, *next(iter(reasons.items())))
                continue
            if redacts and values["personal_data"]:
                example = redact(example, values["personal_data"])
                redacted += 1
            writer.keep(to_line(example))
    effects = {name: {"alone": alone[name], "only": only[name]} for name in judges}
    return writer.metrics() | {"effects": effects} | ({"redacted": redacted} if redacts else {})


def _rows(statistics: Path) -> Iterator[dict[str, Any]]:
    with open(statistics, encoding="utf-8", newline="\n") as lines:
        for line in lines:
            yield json.loads(line)


def _check(config: Config, statistics: Path) -> None:
    """`DataError` if a rule needs a statistic that only a model can give and none did."""
    first = next(_rows(statistics), None)
    if first is None or "coherence" in first:
        return
    if config.coherence is not None or (config.length is not None and config.length.unit == "tokens"):
        rule = "coherence" if config.coherence is not None else "length in tokens"
        also = "" if config.coherence is not None else ", or count in `unit: words`"
        raise DataError(f"no model has measured {rule}: give step `score` the input `reference`, a gguf{also}")
