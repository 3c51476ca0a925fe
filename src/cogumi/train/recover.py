"""Stage `recover`: win back what compression cost a model (SPEC C8).

A conservative LoRA on the training questions that the damaged model finds hardest, stopped the moment the selection
split is answered no better than before, and merged. Where the loss rose much and the uncompressed model is at hand, its
distribution is learned instead of the bare answers (Hinton et al., 1503.02531, at temperature 1). A model is never
given back worse than it came: what the adapter could not better is returned as it was.
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
from cogumi.models.lora import LoraShape, attach, merged
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
"""What `train.validation.judge_answers` tells: `loss` and `exact`."""


class Conservative(LoopConfig):
    """The documents' rates. Training ends with the first validation that is no better."""

    lr: float = Field(8e-7, gt=0)
    clip: float = Field(0.3, gt=0)
    batch: int = Field(16, ge=1)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0)
    evaluate_every: int = Field(16, ge=1)
    patience: int = Field(1, ge=1)
    min_delta: float = Field(0.0, ge=0)


class Config(BaseModel):
    """`share` of the training questions, the hardest, are learned for `epochs`, though for no more than `loop.steps`.
    Hardest `by` perplexity, or by how much more they surprise the damaged model than the original one. The original
    teaches where the loss rose by more than the share `distil_above`.

    `mask: keep` holds weights that are exactly 0 (pruned) at 0, in training and after. Without `merge` the model is
    written as it came, with the adapter beside it in `adapter/`.
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


def surprise(apply: Apply, rows: Sequence[Row]) -> NDArray[np.float64]:
    """Nats per answer token of each row `[rows]`: the logarithm of its perplexity."""
    nats = np.zeros(len(rows))
    for index in passes(rows):
        nats[index] = apply(answer_figures, collate(rows, index))[0].cpu().numpy()
    per_token: NDArray[np.float64] = nats / np.array([row.weight for row in rows])
    return per_token


def hardest(surprise: NDArray[np.float64], share: float) -> list[int]:
    """Rows of the highest surprise, at least one, hardest first."""
    order = np.argsort(-surprise, kind="stable")
    return [int(i) for i in order[: max(1, round(share * len(order)))]]


def hold_zeros(model: Any) -> dict[str, Tensor]:
    """Keep the adapter of a peft model from moving weights that are 0; returns where they are, by layer."""
    dead = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            dead[name] = layer.get_base_layer().weight == 0
            layer.register_forward_hook(_undo_on(dead[name]))
    return dead


def _undo_on(zero: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that takes the update of the weights in `zero` off a layer's output."""

    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output - linear(inputs[0], layer.get_delta_weight("default") * zero.to(output.device))

    return hook


def merge(model: Any, dead: Mapping[str, Tensor]) -> Any:
    """The plain model with its adapter in its weights; those in `dead` are 0 again."""
    layers = dict(model.named_modules())
    weights = [(layers[name].get_base_layer().weight, zero) for name, zero in dead.items()]
    plain = merged(model)
    with torch.no_grad():
        for weight, zero in weights:
            weight[zero.to(weight.device)] = 0.0
    return plain


def _teacher(folder: Path, tokenizer: HFTokenizer) -> Any:
    if HFTokenizer.load(folder).raw.get_vocab() != tokenizer.raw.get_vocab():
        raise TrainingError(f"{folder} has another vocabulary than the model to recover; give what that was made from")
    return load(folder).eval()


def better(found: Figures, before: Figures) -> bool:
    """Less loss and no fewer exact answers: a lower loss alone may only mean that wrong answers are less sure."""
    return found["loss"] < before["loss"] and found["exact"] >= before["exact"]


def zeros(model: nn.Module) -> int:
    """Weights that are exactly 0."""
    return sum(int((p == 0).sum()) for p in model.parameters())


def needs(config: Config, roles: Collection[str]) -> dict[str, str]:
    """The uncompressed model, to compare with."""
    return OPTIONAL if config.by == "rise" else {}


def estimate(config: Config, given: Given) -> Estimate:
    """The same model, and what its training takes."""
    model = given.find("model", ModelFacts)
    if model is None:
        return Estimate()
    return replace(training_estimate(given, model, config.loop, config.lora), facts=(model,))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`model` (the damaged one), `examples`, optionally `original` -> a model folder."""
    if config.mask and not config.merge:
        raise TrainingError("mask: keep holds zeros in merged weights; drop it, or set merge: true")
    if config.by == "rise" and "original" not in inputs:
        raise TrainingError("by: rise compares with the uncompressed model; give it as the input `original`")
    torch.set_num_threads(context.threads)
    folder, data = inputs["model"].path, inputs["examples"].path
    tokenizer, model = HFTokenizer.load(folder), load(folder)
    room = model.config.max_position_embeddings
    rows, selection = (make_rows(read_examples(split_path(data, s)), tokenizer, room) for s in ("train", "selection"))
    before = judge_answers(applied(model), selection)
    teacher: Any = _teacher(inputs["original"].path, tokenizer) if "original" in inputs else None
    original = judge_answers(applied(teacher), selection) if teacher else None
    distils = original is not None and before["loss"] > (1 + config.distil_above) * original["loss"]
    hardness = surprise(applied(model), rows)
    if config.by == "rise":
        hardness -= surprise(applied(teacher), rows)
    chosen = hardest(hardness, config.share)
    hard = [rows[i] for i in chosen]
    zero = zeros(model)
    adapted = attach(model, config.lora, context.seed)
    dead = hold_zeros(adapted) if config.mask else {}
    loop = _within(config, hard)

    def validate(apply: Apply) -> dict[str, float]:
        """What is no better than the damaged model has an infinite loss: already the first look can end training."""
        seen = judge_answers(apply, selection)
        return {**seen, "loss": seen["loss"] if better(seen, before) else math.inf, "nats": seen["loss"]}

    at = train(adapted, hard, distillation(teacher) if distils else answer_loss, loop, out, context, validate)
    if not config.merge and math.isfinite(at.best):
        (out / "adapter").mkdir(exist_ok=True)
        save_adapter(adapted, out / "adapter")
    model = merge(adapted, dead)
    after = judge_answers(applied(model), selection)
    won = better(after, before)
    save(model if won and config.merge else load(folder), folder, out)
    return {
        "hardest": {"rows": len(hard), "by": config.by, "nats_from": float(hardness[chosen[-1]])},
        "distilled": distils,
        "steps": at.step,
        "steps_planned": loop.steps,
        "best_step": at.best_step if won else 0,
        "stopped": at.stopped,
        "returned": "recovered" if won else "damaged",
        "zeros": {"before": zero, "after": zeros(model) if won else zero},
        **_quality(original, before, after if won else before),
        "curve": {
            "training": at.losses,
            "selection": [(step, figures["nats"], figures["exact"]) for step, figures in at.validations],
        },
        "model_sha256": sha256(out / "model.safetensors"),
    }


def _within(config: Config, rows: Sequence[Row]) -> LoopConfig:
    per_epoch = Order(tuple(row.size for row in rows), config.loop.batch, 0).per_epoch
    return config.loop.model_copy(update={"steps": min(config.loop.steps, config.epochs * per_epoch)})


def _quality(original: Figures | None, damaged: Figures, recovered: Figures) -> dict[str, Any]:
    """Selection figures of all three; `won_back` is the share of the lost nats, the ratios are to the original's.

    `quality_ratio` compares perplexities, `exact_ratio` exact answers; all three are None without an original.
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
