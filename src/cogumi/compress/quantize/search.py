"""Search for a quantization of about four bits per weight, shared by stages `awq` and `gptq` (SPEC D4).

The most sensitive linear layers get more bits and the least sensitive ones fewer. Settings are tried from the strongest
compression to the weakest, until the rounded model answers nearly as well as the original.
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
"""Applies them to a model. Weights that are not rounded in place are then rounded in its forward pass."""


class Quantization(BaseModel):
    """`draw` selects the calibration rows; the sensitivity of linear layers is measured on the first `probe` of them.

    `settings` are tried in order, each on the input model, until perplexity(before) / perplexity and the ratio of exact
    answers both reach `least`. If none does, the setting with the lowest loss is kept; a gate of the recipe can then
    stop the build.
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
    """Result of one setting: its mixture, the `weights` after llm-compressor, the figures of the model rounded from
    them and, for comparison, of the `plain` model: original weights rounded to nearest on the same grid.
    """

    setting: Setting
    level: Mapping[str, Level]
    bits: float
    weights: Mapping[str, Tensor]
    figures: Figures
    plain: Figures


def open_model(folder: Path) -> Any:
    """The model of a folder, in evaluation mode; `ExportError` if it cannot be exported as GGUF."""
    Llama.load(folder)
    return load(folder).eval()


def round_linears(model: nn.Module, level: Mapping[str, Level], setting: Setting) -> nn.Module:
    """Round every linear layer of the model to its level, in place, by rounding to nearest; returns the model."""
    for name, layer in linears(model).items():
        layer.weight.data = rounded(layer.weight.data, BITS[level[name]], setting.group_of(level[name]))
    return model


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """Measures a model on the selection `rows` with their `domains`, and its divergence from the `original`."""

    original: Any
    rows: Sequence[Row]
    domains: Sequence[str]

    @classmethod
    def load(cls, original: Any, examples: Path, tokenizer: HFTokenizer) -> Judge:
        """A judge on the selection split of an `examples` artifact."""
        found = read_examples(split_path(examples, "selection"))
        rows = make_rows(found, tokenizer, original.config.max_position_embeddings)
        domain = {example.id: example.domain for example in found}
        return cls(original, rows, [domain[row.id] for row in rows])

    def __call__(self, model: nn.Module) -> Figures:
        """The figures of `judge_answers` by domain, and the `divergence` from the original in nats per token."""
        apply = applied(model)
        diverged = mean_figures(apply, self.rows, distillation(self.original))["loss"]
        return {**judge_answers(apply, self.rows, self.domains), "divergence": diverged}


def attempt(folder: Path, setting: Setting, costs: Mapping[str, float], calibrate: Calibrate, judge: Judge) -> Attempt:
    """Quantize the model of `folder` with one setting; `costs` are the sensitivities of the linear layers in nats."""
    model = load(folder).eval()
    names, sizes = set(model.state_dict()), {name: layer.weight.numel() for name, layer in linears(model).items()}
    level = levels(costs, sizes, setting)
    plain = judge(round_linears(copy.deepcopy(model), level, setting))
    calibrate(model, config_groups(level, setting))
    weights = {name: value for name, value in model.state_dict().items() if name in names}
    return Attempt(setting, level, bits_per_weight(level, sizes, setting), weights, judge(model), plain)


def ratios(before: Figures, after: Figures) -> dict[str, float | None]:
    """`quality_ratio`: perplexity before over after; `exact_ratio`: exact answers after over before, or None."""
    return {
        "quality_ratio": math.exp(before["loss"] - after["loss"]),
        "exact_ratio": after["exact"] / before["exact"] if before["exact"] else None,
    }


def search(
    config: Quantization, folder: Path, before: Figures, costs: Mapping[str, float], calibrate: Calibrate, judge: Judge
) -> tuple[Attempt, list[dict[str, Any]]]:
    """The first attempt that is good enough, else the one with the lowest loss; and the metrics of every attempt."""
    attempts: list[Attempt] = []
    metrics: list[dict[str, Any]] = []
    for setting in config.settings:
        latest = attempt(folder, setting, costs, calibrate, judge)
        kept = ratios(before, latest.figures)
        enough = all(ratio is None or ratio >= config.least for ratio in kept.values())
        metrics.append(
            {**setting.model_dump(), "bits_per_weight": latest.bits, **_figures(latest.figures), **kept}
            | {"enough": enough}
        )
        if enough:
            return latest, metrics
        attempts = [min([*attempts, latest], key=lambda a: a.figures["loss"])]
    return attempts[0], metrics


def quantize(
    config: Quantization,
    inputs: Mapping[str, Artifact],
    out: Path,
    context: Context,
    modifiers: Modifiers,
    keep_rounding: bool,
) -> dict[str, Any]:
    """`model`, `examples` -> a model folder, types.json, report.md and sensitivity.png.

    With `keep_rounding` the weights written are rounded to nearest, for `modifiers` that do not round them.
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
        "before": _figures(before),
        "rounded": _figures(best.figures),
        "rounded_plainly": _figures(best.plain),
        "written": _figures(judge(model)),
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


def _figures(figures: Figures) -> dict[str, float]:
    """Nats per answer token, perplexity, exact answers, and the divergence from the original model in nats."""
    kept = {name: figures[name] for name in ("exact", "divergence")}
    return {"nats": figures["loss"], "perplexity": math.exp(figures["loss"]), **kept}


def _domains(before: Figures, after: Figures) -> dict[str, dict[str, float | None]]:
    """Exact answers by domain: arithmetic and multi-step tasks degrade first, which an average hides."""
    names = sorted(key for key in before if key.startswith("exact/"))
    return {
        name.removeprefix("exact/"): {
            "before": before[name],
            "after": after[name],
            "ratio": after[name] / before[name] if before[name] else None,
        }
        for name in names
    }
