"""Stage `sft`: supervised training from scratch or from given weights, of all weights or of a LoRA (SPEC C1, C11).

A LoRA is merged into the model at the end; the metrics compare the merged model with base and separate adapter.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import TrainingError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import TokenizerFacts
from cogumi.core.files import sha256
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example
from cogumi.data.examples import read_examples, split_path
from cogumi.models.folders import Quantize, Shape, build, load, locate, parameters, save
from cogumi.models.lora import LoraShape, attach, merged
from cogumi.models.tokenization import HFTokenizer
from cogumi.train.batches import make_rows
from cogumi.train.loop import Apply, LoopConfig, train
from cogumi.train.losses import answer_loss
from cogumi.train.training_cost import model_to_train, training_estimate
from cogumi.train.validation import applied, judge_answers

VERSION = 1
KIND = "model"
INPUTS = {"examples": "examples"}
OPTIONAL = {"tokenizer": "tokenizer"}
TRAINS = True


class Config(BaseModel):
    """`init` is `scratch`, a model folder, or a Hub id. With `lora` only an adapter is trained; with `quantize` (`nf4`)
    the frozen weights are held in 4 bits on a GPU (QLoRA).

    The number of times that an example occurs per epoch is the product of its `weights`; a key is a domain, a
    difficulty, or `domain/difficulty`.
    """

    model_config = ConfigDict(extra="forbid")
    init: str = "scratch"
    shape: Shape = Shape()
    weights: dict[str, float] = Field(default_factory=dict)
    lora: LoraShape | None = None
    quantize: Quantize = None
    loop: LoopConfig = LoopConfig()


def weighted(examples: Sequence[Example], weights: Mapping[str, float], seed: int) -> list[Example]:
    """Every example floor(weight) times, and once more with the fractional part as probability; seeded."""
    rng = random.Random(seed)
    result: list[Example] = []
    for example in examples:
        level = str(example.difficulty)
        weight = math.prod(weights.get(key, 1.0) for key in (example.domain, level, f"{example.domain}/{level}"))
        result += [example] * (int(weight) + (rng.random() < weight % 1))
    return result


def needs(config: Config, roles: Collection[str]) -> dict[str, str]:
    """A tokenizer, for training from scratch."""
    return OPTIONAL if config.init == "scratch" else {}


def estimate(config: Config, given: Given) -> Estimate:
    """The trained model, and the cost of its training."""
    model = model_to_train(config.init, config.shape, given.find("tokenizer", TokenizerFacts), given.root)
    if model is None:
        return Estimate()
    return replace(training_estimate(given, model, config.loop, config.lora, config.quantize), facts=(model,))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples` (and `tokenizer`, when training from scratch) -> a model folder."""
    torch.set_num_threads(context.threads)
    if config.quantize and config.lora is None:
        raise TrainingError("weights in 4 bits cannot be trained; set 'lora' beside 'quantize'")
    if config.init == "scratch":
        folder = inputs["tokenizer"].path
        model = build(config.shape, HFTokenizer.load(folder), context.seed)
    else:
        folder = locate(config.init, context.root)
        model = load(folder, config.quantize)
    tokenizer = HFTokenizer.load(folder)
    room = model.config.max_position_embeddings
    data = inputs["examples"].path
    examples = weighted(read_examples(split_path(data, "train")), config.weights, context.seed)
    rows = make_rows(examples, tokenizer, room)
    selection_examples = read_examples(split_path(data, "selection"))
    domain = {e.id: e.domain for e in selection_examples}
    selection = make_rows(selection_examples, tokenizer, room)

    def validate(apply: Apply) -> dict[str, float]:
        return judge_answers(apply, selection, [domain[row.id] for row in selection])

    if config.lora:
        model = attach(model, config.lora, context.seed)
    at = train(model, rows, answer_loss, config.loop, out, context, validate)
    figures: dict[str, Any] = {}
    if config.lora:
        attached = validate(applied(model))
        model = merged(model, None if config.quantize is None else folder)
        figures = {"attached": attached, "merged": validate(applied(model))}
    save(model, folder, out)
    return {
        "parameters": parameters(model),
        "rows": len(rows),
        "too_long": len(examples) - len(rows),
        "steps": at.step,
        "best_step": at.best_step,
        "stopped": at.stopped,
        "tokens": at.tokens,
        "selection_nats_per_token": at.best,
        **figures,
        "curve": {"training": at.losses, "selection": at.validations},
        "model_sha256": sha256(out / "model.safetensors"),
    }
