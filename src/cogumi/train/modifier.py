"""Stage `modifier`: a LoRA on the frozen base for one domain, trained on the questions that the base failed (SPEC C6).

The metrics report its gain on the domain's selection questions and its loss on all others; a gate of the recipe can
reject it by these figures.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from cogumi.core.errors import TrainingError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import AdapterFacts, ModelFacts
from cogumi.core.files import sha256
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.examples import read_examples, split_path
from cogumi.data.responses import read_responses
from cogumi.models.folders import Quantize, load
from cogumi.models.lora import LoraShape, attach, check_targets, merged, save
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.batches import make_rows
from cogumi.train.loop import LoopConfig, train
from cogumi.train.losses import answer_loss
from cogumi.train.training_cost import training_estimate
from cogumi.train.validation import applied, judge_answers

VERSION = 1
KIND = "adapter"
INPUTS = {"examples": "examples", "responses": "responses", "model": "model"}
TRAINS = True


class Config(BaseModel):
    """`rows: random` is the control, trained on as many random questions of the domain as the base failed."""

    model_config = ConfigDict(extra="forbid")
    domain: str
    rows: Literal["failures", "random"] = "failures"
    lora: LoraShape = LoraShape()
    quantize: Quantize = None
    loop: LoopConfig = LoopConfig()


def _exact(model: Any, rows: list[Row]) -> float | None:
    return judge_answers(applied(model), rows)["exact"] if rows else None


def estimate(config: Config, given: Given) -> Estimate:
    """The adapter, and the cost of its training."""
    adapter, model = AdapterFacts(config.lora.by_target), given.find("model", ModelFacts)
    if model is None:
        return Estimate((adapter,))
    found = training_estimate(given, model, config.loop, config.lora, config.quantize, merged=False)
    return replace(found, facts=(adapter,))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples`, `responses` and `model` (the base) -> a PEFT folder."""
    torch.set_num_threads(context.threads)
    base = inputs["model"].path
    data = inputs["examples"].path
    responses = read_responses(inputs["responses"].path)
    questions = read_examples(split_path(data, "train"))
    questions = [e for e in questions if e.domain == config.domain and e.id in responses]
    failed = [e for e in questions if not responses[e.id].correct]
    if not failed:
        raise TrainingError(
            f"the base failed no training question of '{config.domain}', so it needs no modifier for it"
        )
    chosen = failed if config.rows == "failures" else random.Random(context.seed).sample(questions, len(failed))
    tokenizer = HFTokenizer.load(base)
    model = load(base, config.quantize)
    check_targets(model, config.lora)
    room = model.config.max_position_embeddings
    selection = read_examples(split_path(data, "selection"))
    own = make_rows([e for e in selection if e.domain == config.domain], tokenizer, room)
    other_examples = [e for e in selection if e.domain != config.domain]
    others = make_rows(other_examples, tokenizer, room) if other_examples else []
    before, elsewhere = _exact(model, own), _exact(model, others)
    model = attach(model, config.lora, context.seed)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = make_rows(chosen, tokenizer, room)
    at = train(model, rows, answer_loss, config.loop, out, context, lambda apply: judge_answers(apply, own))
    save(model, out)
    after = judge_answers(applied(model), own)
    exact_elsewhere = {"before": elsewhere, "after": _exact(model, others)}
    nats = {"attached": after["loss"]}
    if config.quantize is None:
        nats["merged"] = judge_answers(applied(merged(model)), own)["loss"]
    return {
        "domain": config.domain,
        "asked": len(questions),
        "failed": len(failed),
        "trained_on": config.rows,
        "too_long": len(chosen) - len(rows),
        "parameters": parameters,
        "steps": at.step,
        "best_step": at.best_step,
        "stopped": at.stopped,
        "tokens": at.tokens,
        "exact": {"before": before, "after": after["exact"]},
        "exact_elsewhere": exact_elsewhere,
        "gain": after["exact"] - (before or 0.0),
        "selection_nats_per_token": nats,
        "curve": {"training": at.losses, "selection": at.validations},
        "base_sha256": sha256(base / "model.safetensors"),
    }
