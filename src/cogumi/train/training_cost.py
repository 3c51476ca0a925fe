"""Cost of training with `train.loop`, estimated in advance for every stage that trains (SPEC D1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cogumi.core.estimate import Cost, Estimate, Given
from cogumi.core.facts import ModelFacts, Rows, TokenizerFacts, model_at
from cogumi.core.footprint import FP32, Footprint, Training, footprint
from cogumi.models.folders import Quantize, Shape
from cogumi.models.lora import LoraShape, unknown_targets
from cogumi.models.upper_layers import too_many
from cogumi.train.loop import LoopConfig
from cogumi.train.trunk_cache import TYPES, CacheType
from cogumi.train.validation import TOKENS


@dataclass(frozen=True, slots=True)
class Upper:
    """Training of the upper `layers` only, on the cached states of the others with this precision, or without cache."""

    layers: int
    cache: CacheType | None


ASSUMED = Rows(0, 512, 512, 512)
"""Rows of unknown length."""


def model_to_train(init: str, shape: Shape, tokenizer: TokenizerFacts | None, root: Path) -> ModelFacts | None:
    """The model named by `init`: a folder, a Hub id, or `scratch` for `shape` (None if the tokenizer is unknown).

    Raises `ArtifactError` for a model that is neither a folder nor known.
    """
    if init != "scratch":
        return model_at(init, root)
    if tokenizer is None:
        return None
    return ModelFacts(shape.of_vocabulary(tokenizer.vocabulary), tokenizer.name, tokenizer.own)


def training_estimate(
    given: Given,
    model: ModelFacts,
    loop: LoopConfig,
    lora: LoraShape | None = None,
    quantize: Quantize = None,
    *,
    merged: bool = True,
    whole_rows: bool = False,
    upper: Upper | None = None,
) -> Estimate:
    """Cost, notes and problems of training a model on the input `examples`; the stage adds the facts.

    Without `lora` all weights are trained, with `upper` that LoRA is on the upper layers only. `merged`: the output is
    the whole model, not only an adapter. `whole_rows`: the loss includes questions.
    """
    shape, known = model.shape, given.rows("examples", model)
    rows = known or ASSUMED
    if upper and (problem := too_many(upper.layers, shape.layers)):
        return Estimate(problems=(problem,))
    training = Training(
        shape,
        rows=math.ceil(loop.batch / (loop.accumulate * given.hardware.gpus)),
        length=rows.longest,
        answer=rows.longest if whole_rows else rows.answer,
        judged=max(TOKENS // rows.longest, 1),
        ranks={name: rank for name, rank in lora.by_target.items() if name in shape.linear} if lora else None,
        nf4=quantize == "nf4",
        bf16=loop.precision != "fp32",
        recompute=loop.gradient_checkpointing,
        parts=loop.accumulate,
        gpus=given.hardware.gpus,
        muon=loop.muon_lr is not None,
        upper=upper.layers if upper else None,
    )
    memory = footprint(training)
    return Estimate(
        cost=_cost(training, memory, loop, rows, merged, upper.cache if upper else None),
        notes=() if known else (f"rows of unknown length: {ASSUMED.longest} tokens assumed",),
        problems=(*(unknown_targets(lora, shape.linear) if lora else ()), *too_large(given, memory, training)),
    )


def _cost(t: Training, memory: Footprint, loop: LoopConfig, rows: Rows, merged: bool, cache: CacheType | None) -> Cost:
    """The cost of a run over rows; `cache` holds the states of the layers below those that are trained."""
    tokens = int(loop.steps * loop.batch * rows.mean)
    layer, below = t.shape.matrices // t.shape.layers, t.shape.layers - t.layers
    upper = 4 + (2 if t.ranks is None else 0) + (2 if t.recompute else 0)
    flops = upper * (t.layers * layer + t.shape.head_weights) * tokens
    distinct = min(tokens, int(rows.count * rows.mean)) if rows.count else tokens
    flops += 2 * below * layer * (distinct if cache else tokens)
    trained = FP32 * t.trained
    states = distinct * t.shape.hidden * np.dtype(TYPES[cache]).itemsize if cache else 0
    return Cost(
        method="full" if t.ranks is None else "QLoRA nf4" if t.nf4 else "LoRA",
        shape=t.shape,
        parameters=t.shape.parameters,
        trained=t.trained,
        steps=loop.steps,
        tokens=tokens,
        flops=float(flops),
        memory=memory,
        output=FP32 * t.shape.parameters if merged else trained,
        checkpoint=2 * (trained + memory.optimizer * t.gpus) + (1 + loop.keep) * trained + states,
        needs_gpu=t.nf4,
    )


def too_large(given: Given, memory: Footprint, training: Training) -> list[str]:
    """A line with possible remedies if training does not fit the available GPUs."""
    limit = given.hardware.memory
    if limit is None or memory.peak <= limit:
        return []
    ways = {
        "gradient_checkpointing": not training.recompute,
        "more `accumulate`": training.rows > 1,
        "a `lora`": not training.ranks,
        "quantize: nf4": bool(training.ranks) and not training.nf4,
        "more --gpus": not training.nf4,
    }
    if memory.weights + memory.optimizer + memory.validation == memory.peak:
        ways = {"shorter rows": True}
    return [
        f"takes {memory.peak / 1e9:.1f} GB on each GPU, and there are {limit / 1e9:.1f}; "
        f"try {' or '.join(way for way, helps in ways.items() if helps) or 'a smaller model'}"
    ]
