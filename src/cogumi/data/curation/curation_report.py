"""Stage `curation_report`: what each step of curation dropped and why, as a table and a waterfall (SPEC A5).

`in order` counts the rows that a rule dropped after the steps before it. For the rules of a step `filter` the report
has also what a rule drops alone, and what only this rule drops: the rows that come back without it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import DataError
from cogumi.core.files import write_text
from cogumi.core.pictures import new_figure
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.curation.pool_writer import DROPPED

VERSION = 1
KIND = "report"
LIGHT = True
INPUTS: dict[str, str] = {}
REPORTS = True
PICTURE = "curation.png"

_SAMPLE_CHARACTERS = 90


class Config(BaseModel):
    """`steps` are the inputs in the order of the chain, from `load` on; `samples` rows are shown for each rule."""

    model_config = ConfigDict(extra="forbid")
    steps: list[str] = Field(min_length=2)
    samples: int = Field(3, ge=0)


@dataclass(frozen=True, slots=True)
class Step:
    """A step: rows that it left, and dropped ones by rule; effects and samples (reason, text) by rule.

    Of the first step, which reads files, `rejected` is the number of unusable rows; of a filter, `redacted` that of
    rows without their personal data.
    """

    name: str
    rows: int
    rejected: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    redacted: int = 0
    effects: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    samples: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)


def needs(config: Config, roles: Collection[str]) -> dict[str, str]:
    """A pool for each of `steps`."""
    return dict.fromkeys(config.steps, "pool")


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """A pool for each of `steps` -> report.md, a picture, and the share of rows that is kept."""
    source, *rest = (inputs[name] for name in config.steps)
    first = Step(config.steps[0], source.metrics["rows"], source.metrics.get("rejected", 0))
    steps = [first, *(_step(*each, config.samples) for each in zip(config.steps[1:], rest, strict=True))]
    last = steps[-1]
    for before, after in pairwise(steps):
        if before.rows != after.rows + sum(after.dropped.values()):
            raise DataError(f"'{after.name}' did not read the rows of '{before.name}': list `steps` in their order")
    picture(out / PICTURE, steps)
    write_text(out / "report.md", page(steps))
    return {
        "rows": {step.name: step.rows for step in steps},
        "kept": round(last.rows / first.rows, 4),
        "dropped": {step.name: dict(step.dropped) for step in steps[1:]},
        "effects": {step.name: dict(step.effects) for step in steps if step.effects},
    }


def _step(name: str, artifact: Artifact, samples: int) -> Step:
    metrics, path = artifact.metrics, artifact.path / DROPPED
    if not path.is_file():
        raise DataError(f"'{name}' is not a step of curation: it has no {DROPPED}")
    shown: dict[str, list[tuple[str, str]]] = defaultdict(list)
    with open(path, encoding="utf-8", newline="\n") as lines:
        for line in lines:
            row = json.loads(line)
            if len(shown[row["rule"]]) < samples:
                shown[row["rule"]].append((row["reason"], row["text"]))
    return Step(
        name,
        metrics["rows"],
        dropped=metrics["dropped"],
        redacted=metrics.get("redacted", 0),
        effects=metrics.get("effects", {}),
        samples=shown,
    )


def picture(path: Path, steps: Sequence[Step]) -> None:
    """The waterfall: rows left after each step, and what each rule dropped."""
    labels, bottoms, heights, colors = [steps[0].name], [0], [steps[0].rows], ["C0"]
    left = steps[0].rows
    for step in steps[1:]:
        for rule, count in step.dropped.items():
            left -= count
            labels.append(rule if rule == step.name else f"{step.name}: {rule}")
            bottoms.append(left)
            heights.append(count)
            colors.append("C3")
        labels.append(f"after {step.name}")
        bottoms.append(0)
        heights.append(left)
        colors.append("C0")
    figure, (axes,) = new_figure(width=9, height=max(3.0, 0.35 * len(labels)))
    axes.barh(range(len(labels)), heights, left=bottoms, color=colors)
    axes.set_yticks(range(len(labels)), labels, fontsize="small")
    axes.invert_yaxis()
    for position, (bottom, height, color) in enumerate(zip(bottoms, heights, colors, strict=True)):
        sign = "-" if color == "C3" else ""
        axes.annotate(f" {sign}{height:,}", (bottom + height, position), va="center", fontsize="small")
    axes.margins(x=0.12)
    axes.set(xlabel="rows", title=f"{left:,} of {steps[0].rows:,} rows kept")
    figure.savefig(path)


def page(steps: Sequence[Step]) -> str:
    """report.md."""
    first, last = steps[0].rows, steps[-1].rows
    lines = [
        "# Curation",
        "",
        f"{last:,} of {first:,} rows are kept ({last / first:.1%}); {steps[0].rejected:,} could not be read.",
        "",
        f"![rows left after each step]({PICTURE})",
        "",
        "`alone`: what a rule of a filter would drop without the others. `only it`: what comes back without the rule.",
        "",
        "| step | rule | dropped in order | alone | only it | rows left |",
        "|---|---|---:|---:|---:|---:|",
        f"| {steps[0].name} | | | | | {first:,} |",
    ]
    left = first
    for step in steps[1:]:
        for rule in step.effects or step.dropped or {"": {}}:
            count, effect = step.dropped.get(rule, 0), step.effects.get(rule)
            left -= count
            alone, only = (f"{effect['alone']:,}", f"{effect['only']:,}") if effect else ("", "")
            lines.append(f"| {step.name} | {rule} | {count:,} | {alone} | {only} | {left:,} |")
    for step in steps[1:]:
        if step.redacted:
            lines += ["", f"Personal data is redacted in {step.redacted:,} rows of {step.name}."]
        for rule, samples in step.samples.items():
            lines += ["", f"## {step.name}: {rule}", ""]
            lines += [f"- {_cell(reason)}: {_cell(text)}" for reason, text in samples]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    short = " ".join(text.split())
    short = short if len(short) <= _SAMPLE_CHARACTERS else short[:_SAMPLE_CHARACTERS] + " ..."
    return short.replace("|", "\\|").replace("<", "&lt;")
