"""Stage `sft`: supervised training of a whole model, from nothing or from given weights (SPEC C1)."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from cogumi.artifact import sha256
from cogumi.data.examples import read_examples, split_path
from cogumi.models.build import Shape, build, load, locate, parameters, save
from cogumi.models.text import HFTokenizer
from cogumi.stage import Context
from cogumi.train.batches import make_rows
from cogumi.train.loop import LoopConfig, mean_loss, train
from cogumi.train.losses import answer_loss
from cogumi.types import Artifact, Example

VERSION = 1
KIND = "model"


class Config(BaseModel):
    """`init` is `scratch`, a model folder, or a Hub id.

    An example is seen as many times per epoch as the product of its `weights` says; a key is a domain, a difficulty, or
    `domain/difficulty`.
    """

    model_config = ConfigDict(extra="forbid")
    init: str = "scratch"
    shape: Shape = Shape()
    weights: dict[str, float] = Field(default_factory=dict)
    loop: LoopConfig = LoopConfig()


def weighted(examples: Sequence[Example], weights: Mapping[str, float], seed: int) -> list[Example]:
    """Every example floor(weight) times, and once more with the chance of the rest; seeded."""
    rng = random.Random(seed)
    result: list[Example] = []
    for example in examples:
        level = str(example.difficulty)
        weight = math.prod(weights.get(key, 1.0) for key in (example.domain, level, f"{example.domain}/{level}"))
        result += [example] * (int(weight) + (rng.random() < weight % 1))
    return result


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples` (and `tokenizer`, when training from scratch) -> a model folder."""
    torch.set_num_threads(context.threads)
    if config.init == "scratch":
        folder = inputs["tokenizer"].path
        model = build(config.shape, HFTokenizer.load(folder), context.seed)
    else:
        folder = locate(config.init, context.root)
        model = load(folder)
    tokenizer = HFTokenizer.load(folder)
    room = model.config.max_position_embeddings
    data = inputs["examples"].path
    examples = weighted(read_examples(split_path(data, "train")), config.weights, context.seed)
    rows = make_rows(examples, tokenizer, room)
    selection = make_rows(read_examples(split_path(data, "selection")), tokenizer, room)
    at = train(
        model, rows, answer_loss, config.loop, out, context, lambda m: mean_loss(m, selection, answer_loss)
    )  # fmt: skip
    save(model, folder, out)
    return {
        "parameters": parameters(model),
        "rows": len(rows),
        "steps": at.step,
        "best_step": at.best_step,
        "tokens": at.tokens,
        "selection_nats_per_token": at.best,
        "curve": {"training": at.losses, "selection": at.validations},
        "model_sha256": sha256(out / "model.safetensors"),
    }
