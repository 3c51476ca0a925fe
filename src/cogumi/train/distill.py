"""Stage `distill`: what a model failed, learned from better answers, without forgetting the rest (SPEC C3).

It goes on from a finished model: the reference answers of the questions it failed, and among them a share of questions
it had right (rehearsal; Robins 1995). Two curves are watched on the selection questions: those the model failed when it
came, and those it had right. Training stops when it has forgotten more of the second than allowed; the weights kept are
best by a weighted sum of both.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import TrainingError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import ModelFacts
from cogumi.core.files import sha256
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example
from cogumi.data.examples import read_examples, split_path
from cogumi.data.responses import read_responses
from cogumi.models.folders import Quantize, load, save
from cogumi.models.lora import LoraShape, attach, merged
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.batches import collate, make_rows
from cogumi.train.curves import curves_picture
from cogumi.train.loop import Apply, LoopConfig, train
from cogumi.train.losses import answer_figures, answer_loss
from cogumi.train.training_cost import training_estimate
from cogumi.train.validation import applied, judge_answers, passes

VERSION = 1
KIND = "model"
INPUTS = {"examples": "examples", "responses": "responses", "model": "model"}
TRAINS = True


class Config(BaseModel):
    """`rehearsal` is the share of rows that the model had right; `forget` the share of the selection questions it had
    right that it may lose; `special` the weight of the failed questions' loss in the choice of the best weights.

    `domain` limits the failures to one domain. Without `lora` all weights are trained.
    """

    model_config = ConfigDict(extra="forbid")
    domain: str | None = None
    rehearsal: float = Field(0.1, ge=0, lt=1)
    forget: float = Field(0.02, ge=0, le=1)
    special: float = Field(0.7, ge=0, le=1)
    lora: LoraShape | None = LoraShape()
    quantize: Quantize = None
    loop: LoopConfig = LoopConfig()


def lessons(asked: Sequence[Example], correct: Mapping[str, bool], config: Config, seed: int) -> list[Example]:
    """The failed questions, and as many of those answered rightly as make the share `rehearsal`; seeded.

    Raises `TrainingError` if nothing was failed.
    """
    failed = [e for e in asked if not correct[e.id] and config.domain in (None, e.domain)]
    if not failed:
        where = f" of '{config.domain}'" if config.domain else ""
        raise TrainingError(f"the model failed no training question{where}: there is nothing to distil")
    right = [e for e in asked if correct[e.id]]
    wanted = round(len(failed) * config.rehearsal / (1 - config.rehearsal))
    return failed + random.Random(seed).sample(right, min(wanted, len(right)))


def known(apply: Apply, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows whose answers a model gives word for word, and the others."""
    right: list[Row] = []
    wrong: list[Row] = []
    for index in passes(rows):
        for i, good in zip(index, apply(answer_figures, collate(rows, index))[1].tolist(), strict=True):
            (right if good else wrong).append(rows[i])
    return right, wrong


def estimate(config: Config, given: Given) -> Estimate:
    """The same model, and what its training takes."""
    model = given.find("model", ModelFacts)
    if model is None:
        return Estimate()
    return replace(training_estimate(given, model, config.loop, config.lora, config.quantize), facts=(model,))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples`, `responses` and `model` -> a model folder."""
    torch.set_num_threads(context.threads)
    folder, data = inputs["model"].path, inputs["examples"].path
    responses = read_responses(inputs["responses"].path)
    asked = [e for e in read_examples(split_path(data, "train")) if e.id in responses]
    chosen = lessons(asked, {e.id: responses[e.id].correct for e in asked}, config, context.seed)
    tokenizer = HFTokenizer.load(folder)
    model = load(folder, config.quantize)
    room = model.config.max_position_embeddings
    rows = make_rows(chosen, tokenizer, room)
    selection = read_examples(split_path(data, "selection"))
    judging = make_rows([e for e in selection if config.domain in (None, e.domain)], tokenizer, room)
    everything = make_rows(selection, tokenizer, room)
    special, general = known(applied(model), judging)[1], known(applied(model), everything)[0]
    if not special or not general:
        raise TrainingError("distilling needs selection questions that the model fails and others that it has right")
    weight = {"failed": config.special, "known": 1 - config.special}

    def validate(apply: Apply) -> dict[str, float]:
        figures = {"failed": judge_answers(apply, special), "known": judge_answers(apply, general)}
        told = {f"{name}/{key}": value for name, found in figures.items() for key, value in found.items()}
        return {"loss": sum(weight[name] * found["loss"] for name, found in figures.items()), **told}

    def stop(figures: Mapping[str, float]) -> str:
        lost = 1 - figures["known/exact"]
        return f"forgot {lost:.1%} of what it knew" if lost > config.forget else ""

    if config.lora:
        model = attach(model, config.lora, context.seed)
    at = train(model, rows, answer_loss, config.loop, out, context, validate, stop=stop)
    if config.lora:
        model = merged(model, None if config.quantize is None else folder)
    end = validate(applied(model))
    save(model, folder, out)
    curves_picture(out / "curves.png", at.validations, ("failed/exact", "known/exact"), "share answered word for word")
    return {
        "failed": len(chosen) - sum(responses[e.id].correct for e in chosen),
        "rehearsed": sum(responses[e.id].correct for e in chosen),
        "too_long": len(chosen) - len(rows),
        "selection": {"failed": len(special), "known": len(general)},
        "steps": at.step,
        "best_step": at.best_step,
        "stopped": at.stopped,
        "tokens": at.tokens,
        "learned": end["failed/exact"],
        "forgotten": 1 - end["known/exact"],
        "curve": {"training": at.losses, "selection": at.validations},
        "model_sha256": sha256(out / "model.safetensors"),
    }
