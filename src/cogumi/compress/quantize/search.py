"""What stages `awq` and `gptq` share: four bits a weight on average, through llm-compressor (SPEC D4).

The most sensitive linear maps are rounded finer and the least sensitive coarser; settings are tried from hard to gentle
until the rounded model answers nearly as well as the one that came in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from cogumi.compress.calibration_rows import Draw, draw_rows
from cogumi.compress.gguf.layout import Llama
from cogumi.compress.gguf.type_mixture import OVERRIDES
from cogumi.compress.quantize.precision import (
    BITS,
    Level,
    Setting,
    bits_per_weight,
    check_group,
    config_groups,
    gguf_types,
    levels,
    linears,
    rounded,
    sensitivities,
)
from cogumi.compress.quantize.quantize_report import report
from cogumi.core.files import sha256, write_json
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.examples import read_examples, split_path
from cogumi.models.folders import load, save
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.batches import make_rows
from cogumi.train.losses import distillation
from cogumi.train.validation import applied, judge_answers, mean_figures

Figures: TypeAlias = Mapping[str, float]
Modifiers: TypeAlias = Callable[[dict[str, Any]], Sequence[Any]]
"""llm-compressor's modifiers for a mixture, given as its `config_groups`."""
Calibrate: TypeAlias = Callable[[Any, dict[str, Any]], None]
"""Applies them to a model, which is left rounding its weights in its forward pass, if they are not rounded already."""


class Quantization(BaseModel):
    """`draw` says which training rows calibrate; the first `probe` of them tell each linear map's sensitivity.

    `settings` are tried in order, each on the model as it came, until both the perplexity and the exact answers of the
    rounded model are at least the share `least` of the input's. Where none is that good, the best is kept, and a gate
    of the recipe stops the build.
    """

    model_config = ConfigDict(extra="forbid")
    draw: Draw = Draw()
    probe: int = Field(256, ge=1)
    settings: tuple[Setting, ...] = Field(
        (Setting(), Setting(group=64, coarser=0.0), Setting(group=32, finer=0.3, coarser=0.0)), min_length=1
    )
    least: float = Field(0.97, gt=0, le=1)


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """What one setting gave: its mixture, the `weights` that llm-compressor left, and figures of the model rounded by
    them and, for comparison, rounded plainly: each weight to its nearest neighbour on the same grid.
    """

    setting: Setting
    level: Mapping[str, Level]
    bits: float
    weights: Mapping[str, Tensor]
    figures: Figures
    plain: Figures


def open_model(folder: Path) -> Any:
    """The model of a folder, in evaluation; `ExportError` for one that could not be shipped as GGUF."""
    Llama.load(folder)
    return load(folder).eval()


def round_linears(model: nn.Module, level: Mapping[str, Level], setting: Setting) -> nn.Module:
    """The model, every linear map rounded to its level in place: each weight to its nearest neighbour on the grid."""
    for name, layer in linears(model).items():
        layer.weight.data = rounded(layer.weight.data, BITS[level[name]], setting.group_of(level[name]))
    return model


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """Measures a model on the selection `rows` of these `domains`, also against the `original`."""

    original: Any
    rows: Sequence[Row]
    domains: Sequence[str]

    @classmethod
    def load(cls, original: Any, examples: Path, tokenizer: HFTokenizer) -> Judge:
        """Of the selection split of an `examples` artifact."""
        found = read_examples(split_path(examples, "selection"))
        rows = make_rows(found, tokenizer, original.config.max_position_embeddings)
        domain = {example.id: example.domain for example in found}
        return cls(original, rows, [domain[row.id] for row in rows])

    def __call__(self, model: nn.Module) -> Figures:
        """What `judge_answers` tells by domain, and the `divergence` from the original in nats per token."""
        apply = applied(model)
        diverged = mean_figures(apply, self.rows, distillation(self.original))["loss"]
        return {**judge_answers(apply, self.rows, self.domains), "divergence": diverged}


def attempt(folder: Path, setting: Setting, costs: Mapping[str, float], calibrate: Calibrate, judge: Judge) -> Attempt:
    """Quantize the model of `folder` at one setting; `costs` are the linear maps' sensitivities."""
    model = load(folder).eval()
    names, sizes = set(model.state_dict()), {name: layer.weight.numel() for name, layer in linears(model).items()}
    level = levels(costs, sizes, setting)
    plain = judge(round_linears(copy.deepcopy(model), level, setting))
    calibrate(model, config_groups(level, setting))
    weights = {name: value for name, value in model.state_dict().items() if name in names}
    return Attempt(setting, level, bits_per_weight(level, sizes, setting), weights, judge(model), plain)


def ratios(before: Figures, after: Figures) -> dict[str, float | None]:
    """What is left: `quality_ratio` of perplexities, `exact_ratio` of exact answers (None if there were none)."""
    return {
        "quality_ratio": math.exp(before["loss"] - after["loss"]),
        "exact_ratio": after["exact"] / before["exact"] if before["exact"] else None,
    }


def search(
    config: Quantization, folder: Path, before: Figures, costs: Mapping[str, float], calibrate: Calibrate, judge: Judge
) -> tuple[Attempt, list[dict[str, Any]]]:
    """The first attempt that is good enough, else the one of least loss; and what is told of each."""
    made: list[Attempt] = []
    told: list[dict[str, Any]] = []
    for setting in config.settings:
        made.append(attempt(folder, setting, costs, calibrate, judge))
        figures, left = made[-1].figures, ratios(before, made[-1].figures)
        enough = all(ratio is None or ratio >= config.least for ratio in left.values())
        told.append(
            {**setting.model_dump(), "bits_per_weight": made[-1].bits, **_told(figures), **left, "enough": enough}
        )
        if enough:
            return made[-1], told
        made = [min(made, key=lambda m: m.figures["loss"])]
    return made[0], told


def quantize(
    config: Quantization,
    inputs: Mapping[str, Artifact],
    out: Path,
    context: Context,
    modifiers: Modifiers,
    keep_rounding: bool,
) -> dict[str, Any]:
    """`model`, `examples` -> a model folder, types.json, report.md and sensitivity.png.

    `modifiers` either round the weights themselves or leave them to be rounded: `keep_rounding` does so in the folder.
    """
    from cogumi.compress.oneshot import calibrated

    torch.set_num_threads(context.threads)
    folder, examples = inputs["model"].path, inputs["examples"].path
    original, tokenizer = open_model(folder), HFTokenizer.load(folder)
    for setting in config.settings:
        check_group(original, setting.group)
    rows = draw_rows(examples, tokenizer, original.config.max_position_embeddings, config.draw, context.seed)
    judge = Judge.load(original, examples, tokenizer)

    def calibrate(model: Any, groups: dict[str, Any]) -> None:
        calibrated(model, modifiers(groups), rows, context)

    before, found = judge(original), sensitivities(original, rows[: config.probe], config.settings[0].group, context)
    costs = {name: sensitivity.divergence for name, sensitivity in found.items()}
    best, tried = search(config, folder, before, costs, calibrate, judge)
    model = load(folder)
    model.load_state_dict(best.weights)
    if keep_rounding:
        round_linears(model, best.level, best.setting)
    save(model, folder, out)
    types = gguf_types(folder, best.level)
    write_json(out / OVERRIDES, types)
    metrics = {
        "rows": len(rows),
        "tokens": sum(row.size for row in rows),
        "before": _told(before),
        "rounded": _told(best.figures),
        "rounded_plainly": _told(best.plain),
        "written": _told(judge(model)),
        **ratios(before, best.figures),
        "domains": _domains(before, best.figures),
        "bits_per_weight": best.bits,
        "attempts": tried,
        "sensitivity": {name: {**asdict(found[name]), "level": best.level[name]} for name in found},
        "types": types,
        "model_sha256": sha256(out / "model.safetensors"),
    }
    report(metrics, out)
    kept = ratios(before, best.figures)["quality_ratio"]
    context.progress(1, 1, {"bits per weight": best.bits, "quality": kept or 0.0})
    return metrics


def _told(figures: Figures) -> dict[str, float]:
    """Nats per answer token, perplexity, exact answers, and the divergence in nats from the model as it came."""
    kept = {name: figures[name] for name in ("exact", "divergence")}
    return {"nats": figures["loss"], "perplexity": math.exp(figures["loss"]), **kept}


def _domains(before: Figures, after: Figures) -> dict[str, dict[str, float | None]]:
    """Exact answers by domain: arithmetic and tasks of several steps suffer first, and an average hides it."""
    names = sorted(key for key in before if key.startswith("exact/"))
    return {
        name.removeprefix("exact/"): {
            "before": before[name],
            "after": after[name],
            "ratio": after[name] / before[name] if before[name] else None,
        }
        for name in names
    }
