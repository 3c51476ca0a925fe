"""Stage `recover`: recover the quality that a model lost by compression (SPEC C8).

A LoRA with low learning rates is trained on the training questions that are hardest for the compressed ("damaged")
model, until the selection split shows no improvement, and merged. If the loss rose much and the uncompressed model is
given, its distribution is learned instead of the reference answers (Hinton et al., 1503.02531, temperature 1). If the
result is not better, the output is the unchanged model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import linear

from cogumi.core.errors import TrainingError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import ModelFacts
from cogumi.core.files import sha256
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.examples import read_examples, split_path
from cogumi.models.folders import load, save
from cogumi.models.lora import LoraShape, attach, check_targets, merged
from cogumi.models.lora import save as save_adapter
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.batches import Order, collate, make_rows
from cogumi.train.loop import Apply, LoopConfig, train
from cogumi.train.losses import answer_figures, answer_loss, distillation
from cogumi.train.training_cost import training_estimate
from cogumi.train.validation import applied, judge_answers, passes

VERSION = 1
KIND = "model"
INPUTS = {"examples": "examples", "model": "model"}
OPTIONAL = {"original": "model"}
TRAINS = True

Figures: TypeAlias = Mapping[str, float]
"""Figures of `train.validation.judge_answers`: `loss` and `exact`."""


class Conservative(LoopConfig):
    """The specification's rates. Training ends at the first validation without improvement."""

    lr: float = Field(8e-7, gt=0)
    clip: float = Field(0.3, gt=0)
    batch: int = Field(16, ge=1)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0)
    evaluate_every: int = Field(16, ge=1)
    patience: int = Field(1, ge=1)
    min_delta: float = Field(0.0, ge=0)


class Config(BaseModel):
    """The hardest `share` of the training questions are learned for `epochs`, but at most for `loop.steps`. Questions
    are ranked `by` perplexity, or by its rise from the original to the damaged model. The original is the teacher if
    the loss rose by more than the share `distil_above`.

    `mask: keep` holds weights that are exactly 0 (pruned) at 0, in training and in the output. Without `merge` the
    output is the unchanged model and the adapter in `adapter/`.
    """

    model_config = ConfigDict(extra="forbid")
    share: float = Field(0.02, gt=0, le=1)
    by: Literal["perplexity", "rise"] = "perplexity"
    epochs: int = Field(2, ge=1)
    distil_above: float = Field(0.1, ge=0)
    mask: Literal["keep"] | None = None
    merge: bool = True
    lora: LoraShape = LoraShape()
    loop: Conservative = Conservative()


def log_perplexity(apply: Apply, rows: Sequence[Row]) -> NDArray[np.float64]:
    """Nats per answer token of each row `[rows]`."""
    nats = np.zeros(len(rows))
    for index in passes(rows):
        nats[index] = apply(answer_figures, collate(rows, index))[0].cpu().numpy()
    per_token: NDArray[np.float64] = nats / np.array([row.weight for row in rows])
    return per_token


def hardest(hardness: NDArray[np.float64], share: float) -> list[int]:
    """The `share` of rows with the largest `hardness` [rows], at least one, hardest first."""
    order = np.argsort(-hardness, kind="stable")
    return [int(i) for i in order[: max(1, round(share * len(order)))]]


def hold_zeros(model: Any) -> dict[str, Tensor]:
    """Exclude weights that are 0 from the adapter of a peft model; returns masks of these weights by layer."""
    masks = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            masks[name] = layer.get_base_layer().weight == 0
            layer.register_forward_hook(_undo_on(masks[name]))
    return masks


def _undo_on(zero: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that subtracts the adapter's update of the weights in mask `zero` from a layer's output."""

    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output - linear(inputs[0], layer.get_delta_weight("default") * zero.to(output.device))

    return hook


def merge(model: Any, masks: Mapping[str, Tensor]) -> Any:
    """The model with its adapter merged; weights in `masks` are reset to 0."""
    layers = dict(model.named_modules())
    weights = [(layers[name].get_base_layer().weight, zero) for name, zero in masks.items()]
    plain = merged(model)
    with torch.no_grad():
        for weight, zero in weights:
            weight[zero.to(weight.device)] = 0.0
    return plain


def _teacher(folder: Path, tokenizer: HFTokenizer) -> Any:
    if HFTokenizer.load(folder).raw.get_vocab() != tokenizer.raw.get_vocab():
        raise TrainingError(
            f"{folder} has another vocabulary than the model to recover; give its uncompressed original"
        )
    return load(folder).eval()


def better(found: Figures, before: Figures) -> bool:
    """Lower loss and no fewer exact answers: a lower loss alone may only mean less confident wrong answers."""
    return found["loss"] < before["loss"] and found["exact"] >= before["exact"]


def zeros(model: nn.Module) -> int:
    """Number of weights that are exactly 0."""
    return sum(int((p == 0).sum()) for p in model.parameters())


def needs(config: Config, roles: Collection[str]) -> dict[str, str]:
    """The uncompressed model, for comparison."""
    return OPTIONAL if config.by == "rise" else {}


def estimate(config: Config, given: Given) -> Estimate:
    """The same model, and the cost of its training."""
    model = given.find("model", ModelFacts)
    if model is None:
        return Estimate()
    return replace(training_estimate(given, model, config.loop, config.lora), facts=(model,))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`model` (the damaged one), `examples`, optionally `original` -> a model folder."""
    if config.mask and not config.merge:
        raise TrainingError("mask: keep holds zeros in merged weights; drop it, or set merge: true")
    torch.set_num_threads(context.threads)
    folder, data = inputs["model"].path, inputs["examples"].path
    tokenizer, model = HFTokenizer.load(folder), load(folder)
    check_targets(model, config.lora)
    room = model.config.max_position_embeddings
    rows, selection = (make_rows(read_examples(split_path(data, s)), tokenizer, room) for s in ("train", "selection"))
    before = judge_answers(applied(model), selection)
    teacher: Any = _teacher(inputs["original"].path, tokenizer) if "original" in inputs else None
    original = judge_answers(applied(teacher), selection) if teacher else None
    distils = original is not None and before["loss"] > (1 + config.distil_above) * original["loss"]
    hardness = log_perplexity(applied(model), rows)
    if config.by == "rise":
        hardness -= log_perplexity(applied(teacher), rows)
    chosen = hardest(hardness, config.share)
    hard = [rows[i] for i in chosen]
    zeros_before = zeros(model)
    adapted = attach(model, config.lora, context.seed)
    masks = hold_zeros(adapted) if config.mask else {}
    loop = _limited(config, hard)

    def validate(apply: Apply) -> dict[str, float]:
        """The loss is infinite without improvement over `before`, so that the first validation can end training."""
        found = judge_answers(apply, selection)
        return {**found, "loss": found["loss"] if better(found, before) else math.inf, "nats": found["loss"]}

    at = train(adapted, hard, distillation(teacher) if distils else answer_loss, loop, out, context, validate)
    if not config.merge and math.isfinite(at.best):
        (out / "adapter").mkdir(exist_ok=True)
        save_adapter(adapted, out / "adapter")
    model = merge(adapted, masks)
    after = judge_answers(applied(model), selection)
    improved = better(after, before)
    save(model if improved and config.merge else load(folder), folder, out)
    return {
        "hardest": {"rows": len(hard), "by": config.by, "nats_from": float(hardness[chosen[-1]])},
        "distilled": distils,
        "steps": at.step,
        "steps_planned": loop.steps,
        "best_step": at.best_step if improved else 0,
        "stopped": at.stopped,
        "returned": "recovered" if improved else "damaged",
        "zeros": {"before": zeros_before, "after": zeros(model) if improved else zeros_before},
        **_quality(original, before, after if improved else before),
        "curve": {
            "training": at.losses,
            "selection": [(step, figures["nats"], figures["exact"]) for step, figures in at.validations],
        },
        "model_sha256": sha256(out / "model.safetensors"),
    }


def _limited(config: Config, rows: Sequence[Row]) -> LoopConfig:
    """The loop's config with at most `epochs` over the rows."""
    per_epoch = Order(tuple(row.size for row in rows), config.loop.batch, 0).per_epoch
    return config.loop.model_copy(update={"steps": min(config.loop.steps, config.epochs * per_epoch)})


def _quality(original: Figures | None, damaged: Figures, recovered: Figures) -> dict[str, Any]:
    """Selection figures of all models; `won_back` is the recovered share of the lost nats.

    `quality_ratio` is perplexity(original) / perplexity(recovered), `exact_ratio` exact(recovered) / exact(original);
    all three are None without an original.
    """
    given = {"damaged": damaged, "recovered": recovered} | ({"original": original} if original else {})
    found: dict[str, Any] = {
        name: {"nats": figures["loss"], "perplexity": math.exp(figures["loss"]), "exact": figures["exact"]}
        for name, figures in given.items()
    }
    if original is None:
        return found | {"won_back": None, "quality_ratio": None, "exact_ratio": None}
    lost = damaged["loss"] - original["loss"]
    return found | {
        "won_back": (damaged["loss"] - recovered["loss"]) / lost if lost > 0 else None,
        "quality_ratio": math.exp(original["loss"] - recovered["loss"]),
        "exact_ratio": recovered["exact"] / original["exact"] if original["exact"] else None,
    }
