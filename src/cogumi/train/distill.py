"""Stage `distill`: train a model on the questions it failed, without forgetting the others (SPEC C3).

Training starts from a finished model and uses the reference answers of the failed questions, mixed with a share of
questions that the model answered correctly (rehearsal; Robins 1995). Validation measures two groups of selection
questions: those that the initial model failed, and those that it answered correctly. Training stops if more of the
second group is forgotten than permitted; the best weights are chosen by a weighted sum of both losses.
"""

from __future__ import annotations

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
from cogumi.models.lora import LoraShape, attach, check_targets, merged
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.batches import collate, make_rows
from cogumi.train.curves import curves_picture
from cogumi.train.failed_questions import with_rehearsal
from cogumi.train.loop import Apply, LoopConfig, train
from cogumi.train.losses import answer_figures, answer_loss
from cogumi.train.training_cost import training_estimate
from cogumi.train.validation import applied, judge_answers, passes

VERSION = 1
KIND = "model"
INPUTS = {"examples": "examples", "responses": "responses", "model": "model"}
TRAINS = True


class Config(BaseModel):
    """`rehearsal`: share of rows that the model answered correctly; `forget`: share of the correctly answered selection
    questions that may be lost; `special`: weight of the failed questions' loss in the choice of the best weights.

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


def questions_to_learn(
    questions: Sequence[Example], correct: Mapping[str, bool], config: Config, seed: int
) -> list[Example]:
    """The failed questions, and a seeded sample of correctly answered ones as the share `rehearsal`.

    Raises `TrainingError` if no question was failed.
    """
    failed = [e for e in questions if not correct[e.id] and config.domain in (None, e.domain)]
    if not failed:
        where = f" of '{config.domain}'" if config.domain else ""
        raise TrainingError(f"the model failed no training question{where}: there is nothing to distil")
    right = [e for e in questions if correct[e.id]]
    return with_rehearsal(failed, right, config.rehearsal, seed)


def known(apply: Apply, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows that a model answers exactly, and the others."""
    right: list[Row] = []
    wrong: list[Row] = []
    for index in passes(rows):
        for i, good in zip(index, apply(answer_figures, collate(rows, index))[1].tolist(), strict=True):
            (right if good else wrong).append(rows[i])
    return right, wrong


def estimate(config: Config, given: Given) -> Estimate:
    """The same model, and the cost of its training."""
    model = given.find("model", ModelFacts)
    if model is None:
        return Estimate()
    return replace(training_estimate(given, model, config.loop, config.lora, config.quantize), facts=(model,))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples`, `responses` and `model` -> a model folder."""
    torch.set_num_threads(context.threads)
    folder, data = inputs["model"].path, inputs["examples"].path
    responses = read_responses(inputs["responses"].path)
    questions = [e for e in read_examples(split_path(data, "train")) if e.id in responses]
    chosen = questions_to_learn(questions, {e.id: responses[e.id].correct for e in questions}, config, context.seed)
    tokenizer = HFTokenizer.load(folder)
    model = load(folder, config.quantize)
    if config.lora:
        check_targets(model, config.lora)
    room = model.config.max_position_embeddings
    rows = make_rows(chosen, tokenizer, room)
    selection = read_examples(split_path(data, "selection"))
    of_domain = make_rows([e for e in selection if config.domain in (None, e.domain)], tokenizer, room)
    everything = make_rows(selection, tokenizer, room)
    special, general = known(applied(model), of_domain)[1], known(applied(model), everything)[0]
    if not special or not general:
        raise TrainingError(
            "distilling needs selection questions that the model fails and others that it answers right"
        )
    weight = {"failed": config.special, "known": 1 - config.special}

    def validate(apply: Apply) -> dict[str, float]:
        figures = {"failed": judge_answers(apply, special), "known": judge_answers(apply, general)}
        by_group = {f"{name}/{key}": value for name, found in figures.items() for key, value in found.items()}
        return {"loss": sum(weight[name] * found["loss"] for name, found in figures.items()), **by_group}

    def stop(figures: Mapping[str, float]) -> str:
        lost = 1 - figures["known/exact"]
        return f"forgot {lost:.1%} of the questions it answered before" if lost > config.forget else ""

    if config.lora:
        model = attach(model, config.lora, context.seed)
    at = train(model, rows, answer_loss, config.loop, out, context, validate, stop=stop)
    if config.lora:
        model = merged(model, None if config.quantize is None else folder)
    end = validate(applied(model))
    save(model, folder, out)
    curves_picture(out / "curves.png", at.validations, ("failed/exact", "known/exact"), "share of exact answers")
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
