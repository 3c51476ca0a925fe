"""Stage `depth_report`: speed and quality with skipped layers (Mixture of Depths) (SPEC C7).

The torch engine with routers is compared with the same engine without them. Speed: single stream, both engines in turn
on each prompt, seconds per token after the first, the best of several repeats, to reduce the influence of other load.
Quality: held-out questions, answered greedily by both. The curve over other thresholds is measured on the selection
split.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from cogumi.confidence.metrics import bootstrap_gain
from cogumi.core.files import write_text
from cogumi.core.pictures import legend_below, new_figure
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example, Reply, Request
from cogumi.data.examples import read_examples, split_path
from cogumi.engine.protocol import final_reply, replies
from cogumi.engine.torch import TorchEngine
from cogumi.grading.graders import grade_all
from cogumi.models.depth_routers import FILE, Routers

VERSION = 1
KIND = "report"
INPUTS = {"examples": "examples", "model": "model", "depth": "depth"}
PICTURE = "depth.png"


class Config(BaseModel):
    """`rows`: number of held-out questions (None: all); speed is measured on `prompts` of them, `repeats` times each.

    Each point of the curve uses `curve_prompts` selection questions, at the threshold where a share of `shares` skips.
    """

    model_config = ConfigDict(extra="forbid")
    rows: int | None = Field(None, ge=1)
    prompts: int = Field(100, ge=1)
    curve_prompts: int = Field(30, ge=1)
    repeats: int = Field(5, ge=1)
    shares: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.95)
    max_tokens: int = Field(64, ge=1)


@dataclass(slots=True)
class CountingDepth:
    """`Depth` of routers that counts decisions (one per token and span) as (all, skipped), for prompts and decoding."""

    routers: Routers
    prompt: tuple[int, int] = (0, 0)
    decoding: tuple[int, int] = (0, 0)

    def __call__(self, first: int, hidden: torch.Tensor) -> torch.Tensor:
        """The tokens that use the span."""
        taken = self.routers.takes(first, hidden)
        total, skipped = taken.numel(), taken.numel() - int(taken.sum())
        if taken.shape[1] == 1:
            self.decoding = self.decoding[0] + total, self.decoding[1] + skipped
        else:
            self.prompt = self.prompt[0] + total, self.prompt[1] + skipped
        return taken


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per decoded token and of all answers, each (plain, skipping); shares of decisions to skip."""

    decode: tuple[float, float]
    answers: tuple[float, float]
    skipped: float
    skipped_prompt: float

    @property
    def speedup(self) -> float:
        """Speed-up of decoding."""
        return self.decode[0] / self.decode[1]


@dataclass(frozen=True, slots=True)
class EnginePair:
    """The engine without routers and the one whose routers `count` records."""

    plain: TorchEngine
    skipping: TorchEngine
    count: CountingDepth

    def timing(self, requests: Sequence[Request], repeats: int) -> Timing:
        """Both engines answer each request alone, in turn, `repeats` times; the best time of each counts."""
        engines = (self.plain, self.skipping)
        self.count.prompt = self.count.decoding = (0, 0)
        answers, decode, tokens = [0.0, 0.0], [0.0, 0.0], [0, 0]
        for request in requests:
            runs = [[final_reply(engine.generate(request)) for engine in engines] for _ in range(repeats)]
            for k in (0, 1):
                times = [(run[k].signals["seconds"], run[k].signals["first_token_seconds"]) for run in runs]
                answers[k] += min(whole for whole, _ in times)
                decode[k] += min(whole - first for whole, first in times)
                tokens[k] += len(runs[0][k].tokens) - 1
        shares = [skipped / max(total, 1) for total, skipped in (self.count.decoding, self.count.prompt)]
        return Timing((decode[0] / max(tokens[0], 1), decode[1] / max(tokens[1], 1)), (answers[0], answers[1]), *shares)

    def quality(self, examples: Sequence[Example], requests: Sequence[Request], seed: int) -> dict[str, Any]:
        """Accuracy of both, points lost with 95% bounds (paired bootstrap), and agreement of the answers."""
        before, after = (list(replies(engine, requests, len(requests))) for engine in (self.plain, self.skipping))
        right = [
            np.array([v.correct for v in grade_all([(e, a.text) for e, a in zip(examples, found, strict=True)])], float)
            for found in (before, after)
        ]
        gain, low, high = bootstrap_gain(right[0], right[1], seed)
        return {
            "n": len(examples),
            "accuracy": float(right[0].mean()),
            "accuracy_skipping": float(right[1].mean()),
            "points_lost": -100 * gain,
            "points_lost_95": [-100 * high, -100 * low],
            "token_agreement": agreement(before, after),
            "same_answers": float(np.mean([a.text == b.text for a, b in zip(before, after, strict=True)])),
        }


def agreement(one: Sequence[Reply], two: Sequence[Reply]) -> float:
    """Share of answer tokens equal at the same position; the surplus tokens of a longer answer count as different."""
    same = sum(a.id == b.id for x, y in zip(one, two, strict=True) for a, b in zip(x.tokens, y.tokens, strict=False))
    return same / sum(max(len(x.tokens), len(y.tokens)) for x, y in zip(one, two, strict=True))


def picture(path: Path, curve: Sequence[Mapping[str, float]], bar: float) -> None:
    """Speed against quality over router thresholds, on the selection split; a star marks the chosen one."""
    figure, axes = new_figure(1)
    axes[0].plot([c["speedup"] for c in curve], [100 * c["exact"] for c in curve], marker="o")
    for point in curve:
        at = (point["speedup"], 100 * point["exact"])
        axes[0].annotate(f"{point['share']:.0%}", at, (4, 4), textcoords="offset points", fontsize=8)
    chosen = [point for point in curve if point["bar"] == bar]
    axes[0].plot(
        [c["speedup"] for c in chosen], [100 * c["exact"] for c in chosen], "*", markersize=14, label="chosen bar"
    )
    axes[0].set(xlabel="decode speed against no skipping", ylabel="exact selection answers, %")
    axes[0].set_title("Speed and quality by share of skipping tokens")
    legend_below(axes[0])
    figure.savefig(path)


def page(figures: Mapping[str, Any]) -> str:
    """report.md."""
    low, high = figures["points_lost_95"]
    layers = ", ".join(str(layer) for span in figures["spans"] for layer in span)
    lines = [
        "# Skipping layers",
        "",
        f"Tokens may skip layers {layers} (from 0) of {figures['layers']}. Held-out questions; the threshold was",
        "chosen on the selection split. Speed is measured in one run, both engines in turn, one answer at a time.",
        "",
        "| figure | value |",
        "|---|---|",
        f"| decode speed against no skipping | {figures['speedup']:.2f}x |",
        f"| whole answers, prompts included | {figures['answer_speedup']:.2f}x |",
        f"| milliseconds per token, without and with | {figures['ms_plain']:.2f}, {figures['ms_skipping']:.2f} |",
        f"| decoded tokens that skip these layers | {figures['skipped']:.1%} |",
        f"| prompt tokens that skip them | {figures['skipped_prompt']:.1%} |",
        f"| token-layers skipped while decoding | {figures['token_layers_skipped']:.1%} |",
        f"| accuracy without and with ({figures['n']} questions) "
        f"| {figures['accuracy']:.1%}, {figures['accuracy_skipping']:.1%} |",
        f"| points lost (95%: paired bootstrap) | {figures['points_lost']:.2f} ({low:.2f} to {high:.2f}) |",
        f"| equal answer tokens | {figures['token_agreement']:.1%} |",
        "",
        f"![speed against quality]({PICTURE})",
    ]
    return "\n".join(lines) + "\n"


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples`, `model` (the base) and `depth` (its routers) -> report.md and a picture."""
    torch.set_num_threads(context.threads)
    base, data, depth = (inputs[name] for name in ("model", "examples", "depth"))
    routers = Routers.load(depth.path / FILE, base.path)
    bar, count = routers.bar, CountingDepth(routers)
    selection = read_examples(split_path(data.path, "selection"))[: config.curve_prompts]
    heldout = read_examples(split_path(data.path, "heldout"))[: config.rows]
    with (
        closing(TorchEngine(base.path)) as plain,
        closing(TorchEngine(base.path, depth=count, spans=routers.spans)) as skipping,
    ):
        pair = EnginePair(plain, skipping, count)
        curve = []
        tried = [row for row in depth.metrics["tried"] if row["share"] in (*config.shares, depth.metrics["skipped"])]
        for row in tried:
            routers.bar = row["bar"]
            curve.append({**row, "speedup": pair.timing(_requests(selection, config), config.repeats).speedup})
            context.progress(len(curve), len(tried) + 2, {"speedup": curve[-1]["speedup"]})
        routers.bar = bar
        speed = pair.timing(_requests(heldout[: config.prompts], config), config.repeats)
        context.progress(len(tried) + 1, len(tried) + 2, {"speedup": speed.speedup})
        found = pair.quality(heldout, _requests(heldout, config), context.seed)
        context.progress(len(tried) + 2, len(tried) + 2, {"points lost": found["points_lost"]})
    layers = json.loads((base.path / "config.json").read_text("utf-8"))["num_hidden_layers"]
    figures = {
        "spans": routers.spans,
        "layers": layers,
        "speedup": speed.speedup,
        "answer_speedup": speed.answers[0] / speed.answers[1],
        "ms_plain": 1e3 * speed.decode[0],
        "ms_skipping": 1e3 * speed.decode[1],
        "skipped": speed.skipped,
        "skipped_prompt": speed.skipped_prompt,
        "token_layers_skipped": speed.skipped * sum(map(len, routers.spans)) / layers,
        **found,
        "curve": curve,
    }
    write_text(out / "report.md", page(figures))
    picture(out / PICTURE, curve, bar)
    return figures


def _requests(examples: Sequence[Example], config: Config) -> list[Request]:
    return [Request(messages=e.messages, max_tokens=config.max_tokens) for e in examples]
