"""Stage `chain`: quality, size and speed after each step of a compression chain (SPEC H7).

The model of every step is measured as a GGUF file in the llama.cpp engine: nats per byte of the held-out answers, share
of held-out questions answered correctly, size of the file before and after zstd (pruned weights save bytes only when
packed), and decoding speed with one answer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import zstandard
from pydantic import BaseModel, ConfigDict, Field

from cogumi.bundle.packed import LEVEL
from cogumi.confidence.metrics import bootstrap_gain
from cogumi.core.errors import DataError, RecipeError
from cogumi.core.estimate import Estimate, Given, uncounted
from cogumi.core.files import write_text
from cogumi.core.pictures import new_figure
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example, Request
from cogumi.data.examples import read_examples, split_path
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply, replies
from cogumi.grading.graders import grade_all
from cogumi.teach.context_size import context_for

VERSION = 2
KIND = "report"
INPUTS = {"data": "examples"}
MODEL = "model.gguf"
PICTURE = "chain.png"


class Config(BaseModel):
    """`steps` are the inputs in the order of the chain; all others are compared with the first. Inputs in `beside` are
    measured too: controls and alternatives.

    `rows`: number of held-out questions (None: all). Speed is the median of `rounds`; in each, all steps take turns
    with `prompts` questions.
    """

    model_config = ConfigDict(extra="forbid")
    steps: list[str] = Field(min_length=2)
    beside: list[str] = []
    rows: int | None = Field(None, ge=1)
    max_tokens: int = Field(64, ge=1)
    slots: int = Field(8, ge=1)
    context: int | None = Field(None, ge=16, description="tokens of question and answer; none: the longest")
    rounds: int = Field(5, ge=1)
    prompts: int = Field(40, ge=1)


@dataclass(frozen=True, slots=True)
class Quality:
    """`nats` of each reference answer, whether the model's own answer is `right` `[questions]`; `bytes` of answers."""

    nats: np.ndarray[Any, np.dtype[np.float64]]
    right: np.ndarray[Any, np.dtype[np.float64]]
    bytes: int

    @property
    def nats_per_byte(self) -> float:
        """Nats per byte of the reference answers; comparable across vocabularies."""
        return float(self.nats.sum()) / self.bytes


def judge(model: Path, examples: Sequence[Example], config: Config, context: Context) -> Quality:
    """Score the reference answers and grade greedy answers of one model."""
    requests = [Request(messages=e.messages, max_tokens=config.max_tokens) for e in examples]
    with closing(_engine(model, examples, config, context, config.slots)) as engine:
        scores = [engine.score(request, e.answer) for request, e in zip(requests, examples, strict=True)]
        answers = list(replies(engine, requests, 2 * config.slots))
    verdicts = grade_all([(e, a.text) for e, a in zip(examples, answers, strict=True)])
    return Quality(
        np.array([score.nats for score in scores]),
        np.array([verdict.correct for verdict in verdicts], np.float64),
        sum(score.bytes for score in scores),
    )


def decode_rate(model: Path, examples: Sequence[Example], config: Config, context: Context) -> float:
    """Tokens per second after the first of each answer, one answer at a time."""
    tokens, seconds = 0, 0.0
    with closing(_engine(model, examples, config, context, 1)) as engine:
        for example in examples:
            reply = final_reply(engine.generate(Request(messages=example.messages, max_tokens=config.max_tokens)))
            tokens += len(reply.tokens) - 1
            seconds += reply.signals["seconds"] - reply.signals["first_token_seconds"]
    return tokens / seconds if tokens else math.nan


def _engine(model: Path, examples: Sequence[Example], config: Config, context: Context, slots: int) -> LlamaEngine:
    size = context_for([model], examples, config.max_tokens, config.context)
    return LlamaEngine(model, slots=slots, context=size, threads=context.threads, lookup=False)


def packed_bytes(path: Path) -> int:
    """Size of a file after zstd compression."""
    size = 0
    with path.open("rb") as file:
        for chunk in zstandard.ZstdCompressor(level=LEVEL).read_to_iter(file):
            size += len(chunk)
    return size


def compare(name: str, first: Quality, measured: Quality, seed: int) -> dict[str, Any]:
    """Quality of a step against the first: `kept` is the ratio of accuracies, `perplexity_kept` the inverse ratio of
    perplexities per byte, `points_lost` the lost percentage points of accuracy with 95% bounds (paired bootstrap).
    """
    gain, low, high = bootstrap_gain(first.right, measured.right, seed)
    return {
        "step": name,
        "nats_per_byte": measured.nats_per_byte,
        "perplexity_per_byte": math.exp(measured.nats_per_byte),
        "accuracy": float(measured.right.mean()),
        "kept": float(measured.right.mean() / first.right.mean()) if first.right.any() else math.nan,
        "perplexity_kept": math.exp(first.nats_per_byte - measured.nats_per_byte),
        "points_lost": 0.0 - 100 * gain,
        "points_lost_95": [0.0 - 100 * high, 0.0 - 100 * low],
    }


def picture(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Size against quality, from step to step; rings mark the inputs beside the chain."""
    figure, (axes,) = new_figure(width=8)
    chain, beside = ([row for row in rows if row["beside"] == aside] for aside in (False, True))
    for name, style, label in (("kept", "-o", "right answers"), ("perplexity_kept", "--s", "1 / perplexity per byte")):
        sizes, shares = [row["packed_bytes"] / 1e6 for row in chain], [100 * row[name] for row in chain]
        color = axes.plot(sizes, shares, style, markersize=4, label=label)[0].get_color()
        sizes, shares = [row["packed_bytes"] / 1e6 for row in beside], [100 * row[name] for row in beside]
        axes.scatter(sizes, shares, facecolors="none", edgecolors=color)
    for i, row in enumerate(rows):  # labels alternate between right and left, because points are often close
        point, (offset, side) = (row["packed_bytes"] / 1e6, 100 * row["kept"]), ((6, "left"), (-6, "right"))[i % 2]
        axes.annotate(row["step"], point, (offset, 5), textcoords="offset points", ha=side, fontsize=8)
    axes.axhline(97, color="0.6", linestyle=":", linewidth=1, label="97%")
    axes.margins(x=0.1, y=0.1)
    axes.set(xlabel="MB of the file, packed by zstd", ylabel="kept of the first model, %")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, fontsize="small")
    figure.savefig(path)


def page(rows: Sequence[Mapping[str, Any]], n: int) -> str:
    """report.md."""
    lines = [
        "# The compression chain",
        "",
        f"{n} held-out questions. Every step is measured as a GGUF file in the llama.cpp engine. Perplexity is that of",
        "the reference answers, per byte. Speed is measured with one answer at a time, in turns.",
        "",
        "| step | bytes | packed | perplexity per byte | right | kept | points lost (95%) | tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row["points_lost_95"]
        lines.append(
            f"| {row['step']}{' (beside)' * row['beside']} | {row['bytes']:,} | {row['packed_bytes']:,} "
            f"| {row['perplexity_per_byte']:.4f} | {row['accuracy']:.1%} | {row['kept']:.1%} "
            f"| {row['points_lost']:.1f} ({low:.1f} to {high:.1f}) | {row['tokens_per_second']:.0f} |"
        )
    return "\n".join([*lines, "", f"![size against quality]({PICTURE})"]) + "\n"


def needs(config: Config, roles: Collection[str]) -> dict[str, str]:
    """One GGUF model for each of `steps` and `beside`."""
    return dict.fromkeys((*config.steps, *config.beside), "gguf")


def estimate(config: Config, given: Given) -> Estimate:
    """The cost is not estimated."""
    return uncounted()


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`data` and a `gguf` artifact for each of `steps` -> report.md, a picture, and the figures of every step."""
    names = [*config.steps, *config.beside]
    if sorted(names) != sorted(set(inputs) - {"data"}):
        given = ", ".join(sorted(set(inputs) - {"data"}))
        raise RecipeError(f"'steps' must name every input but data once, in the order of the chain; inputs: {given}")
    examples = read_examples(split_path(inputs["data"].path, "heldout"))[: config.rows]
    if not examples:
        raise DataError(f"{inputs['data'].path} has no held-out questions to measure a chain on; give some")
    models = {name: inputs[name].path / MODEL for name in names}
    total = len(models) * (1 + config.rounds)
    measured: dict[str, Quality] = {}
    for name, model in models.items():
        measured[name] = judge(model, examples, config, context)
        context.progress(len(measured), total, {name: float(measured[name].right.mean())})
    rates: dict[str, list[float]] = {name: [] for name in models}
    for i in range(config.rounds):
        for j, (name, model) in enumerate(models.items(), 1):
            rates[name].append(decode_rate(model, examples[: config.prompts], config, context))
            context.progress(len(models) * (i + 1) + j, total, {name: rates[name][-1]})
    first = measured[config.steps[0]]
    rows = []
    for name, model in models.items():
        found = compare(name, first, measured[name], context.seed)
        sizes = {
            "bytes": model.stat().st_size,
            "packed_bytes": packed_bytes(model),
            "type": inputs[name].metrics["type"],
            "beside": name in config.beside,
        }
        rows.append({**found, **sizes, "tokens_per_second": median(rates[name])})
    picture(out / PICTURE, rows)
    write_text(out / "report.md", page(rows, len(examples)))
    last = rows[len(config.steps) - 1]
    context.progress(total, total, {name: last[name] for name in ("kept", "perplexity_kept")})
    return {
        "questions": len(examples),
        "steps": {row["step"]: row for row in rows},
        "kept": last["kept"],
        "perplexity_kept": last["perplexity_kept"],
        "size_ratio": last["bytes"] / rows[0]["bytes"],
        "packed_ratio": last["packed_bytes"] / rows[0]["bytes"],
        "speedup": last["tokens_per_second"] / rows[0]["tokens_per_second"],
    }
