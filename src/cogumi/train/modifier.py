"""Stage `modifier`: a LoRA on the frozen base for one domain, from the questions the base really failed (SPEC C6)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from cogumi.artifact import sha256
from cogumi.data.examples import read_examples, split_path
from cogumi.data.responses import read_responses
from cogumi.errors import TrainingError
from cogumi.models.build import load
from cogumi.models.lora import LoraShape, attach, save
from cogumi.models.text import HFTokenizer
from cogumi.stage import Context
from cogumi.train.batches import make_rows
from cogumi.train.loop import LoopConfig, mean_loss, train
from cogumi.train.losses import answer_loss
from cogumi.types import Artifact

VERSION = 1
KIND = "adapter"


class Config(BaseModel):
    """`rows: random` trains the control: as many random questions of the domain as the base failed."""

    model_config = ConfigDict(extra="forbid")
    domain: str
    rows: Literal["failures", "random"] = "failures"
    lora: LoraShape = LoraShape()
    loop: LoopConfig = LoopConfig()


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples`, `responses` and `model` (the base) -> a PEFT folder."""
    torch.set_num_threads(context.threads)
    base = inputs["model"].path
    data = inputs["examples"].path
    responses = read_responses(inputs["responses"].path)
    asked = [e for e in read_examples(split_path(data, "train")) if e.domain == config.domain and e.id in responses]
    failed = [e for e in asked if not responses[e.id].correct]
    if not failed:
        raise TrainingError(f"the base failed no training question of '{config.domain}': it needs no modifier there")
    chosen = failed if config.rows == "failures" else random.Random(context.seed).sample(asked, len(failed))
    tokenizer = HFTokenizer.load(base)
    model = load(base)
    room = model.config.max_position_embeddings
    selection = [e for e in read_examples(split_path(data, "selection")) if e.domain == config.domain]
    judging = make_rows(selection, tokenizer, room)
    model = attach(model, config.lora, context.seed)
    at = train(
        model,
        make_rows(chosen, tokenizer, room),
        answer_loss,
        config.loop,
        out,
        context,
        lambda m: mean_loss(m, judging, answer_loss),
    )
    save(model, out)
    return {
        "domain": config.domain,
        "asked": len(asked),
        "failed": len(failed),
        "trained_on": config.rows,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": at.step,
        "best_step": at.best_step,
        "tokens": at.tokens,
        "curve": {"training": at.losses, "selection": at.validations},
        "base_sha256": sha256(base / "model.safetensors"),
    }
