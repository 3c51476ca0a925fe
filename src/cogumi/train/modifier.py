"""Stage `modifier`: a LoRA on the frozen base for one domain, trained on the questions that the base failed (SPEC C6).

The metrics report its gain on the domain's selection questions and its loss on all others; a gate of the recipe can
reject it by these figures.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import TrainingError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import AdapterFacts, ModelFacts
from cogumi.core.model_fingerprint import model_fingerprint
from cogumi.core.stage import CHECKPOINT, Context
from cogumi.core.types import Artifact, Example
from cogumi.data.examples import read_examples, split_path
from cogumi.data.responses import read_responses
from cogumi.models.folders import Quantize, load
from cogumi.models.lora import LoraShape, attach, check_targets, merged, save
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.models.upper_layers import layers_below, only
from cogumi.train.batches import Order, collate, make_rows
from cogumi.train.checkpoint import Progress
from cogumi.train.failed_questions import with_rehearsal, with_usual_abstentions
from cogumi.train.loop import Apply, LoopConfig, train
from cogumi.train.losses import answer_loss
from cogumi.train.training_cost import Upper, training_estimate
from cogumi.train.trunk_cache import CacheType, Collate, TrunkCache
from cogumi.train.validation import applied, judge_answers
from cogumi.train.validation_size import Budget, LayerCost, sample, used, validations

VERSION = 3
KIND = "adapter"
INPUTS = {"examples": "examples", "responses": "responses", "model": "model"}
TRAINS = True
_ELSEWHERE = 2  # passes over the rows of other domains: before and after training
MEMORISED = 0.9
"""A base that fails no training question but has a lower accuracy on selection questions has memorised the former."""


class Config(BaseModel):
    """`rows: random` is the control, trained on as many random questions of the domain as `rows: failures` would be.

    `rehearsal` is the share of rows that the base answered correctly. Trained on failures alone, an adapter unlearns
    easy questions: SmolLM2 failed few one-step programs; afterwards 19 of 29 had a second step.

    With `layers` only that many upper layers are trained. The hidden states after the others are computed once and
    cached in half precision (`fp16`, 2 bytes per token and channel), exactly (`fp32`), or not at all (null). At most
    `validation_rows` selection questions of the domain and `elsewhere_rows` of the others are judged; by default as
    many as cost a tenth of the training.
    """

    model_config = ConfigDict(extra="forbid")
    domain: str
    rows: Literal["failures", "random"] = "failures"
    rehearsal: float = Field(0.0, ge=0, lt=1)
    lora: LoraShape = LoraShape()
    layers: int | None = Field(None, ge=1)
    cache: CacheType | None = "fp16"
    validation_rows: int | None = Field(None, ge=1)
    elsewhere_rows: int | None = Field(None, ge=0)
    quantize: Quantize = None
    loop: LoopConfig = LoopConfig()


class _Selection(NamedTuple):
    """Selection rows that are judged: of the domain, of the others, and their numbers before sampling."""

    own: list[Row]
    others: list[Row]
    of: tuple[int, int]


def _judged(config: Config, own: list[Row], others: list[Row], budget: Budget, seed: int) -> _Selection:
    """The sample that the budget allows: as many rows of the domain as of all others."""
    passes = validations(config.loop) + (2 if config.quantize is None else 1)  # also before training, and merged
    share = passes / (passes + _ELSEWHERE)
    most = config.validation_rows or budget.affordable(own, passes, share)
    most_others = config.elsewhere_rows
    if most_others is None:
        most_others = budget.affordable(others, _ELSEWHERE, 1 - share)
    return _Selection(sample(own, most, seed), sample(others, most_others, seed), (len(own), len(others)))


def estimate(config: Config, given: Given) -> Estimate:
    """The adapter, and the cost of its training."""
    adapter, model = AdapterFacts(config.lora.by_target, layers=config.layers), given.find("model", ModelFacts)
    if model is None:
        return Estimate((adapter,))
    upper = Upper(config.layers, config.cache) if config.layers else None
    found = training_estimate(given, model, config.loop, config.lora, config.quantize, merged=False, upper=upper)
    return replace(found, facts=(adapter,))


def _nothing_failed(domain: str, questions: Sequence[Example], base: Path, data: Path) -> str:
    """The message for a base that fails no training question: it knows the domain, or it memorised the questions."""
    if not questions:
        return f"no training question of '{domain}' was answered; choose a domain of the data, or more `rows` to answer"
    selection = [e for e in read_examples(split_path(data, "selection")) if e.domain == domain]
    model = load(base)
    rows = make_rows(selection, HFTokenizer.load(base), model.config.max_position_embeddings)
    right = judge_answers(applied(model), rows)["exact"] if rows else None
    found = f"the base answers all {len(questions)} training questions of '{domain}' correctly"
    if right is None or right >= MEMORISED:
        return f"{found}, so it needs no modifier for it"
    return (
        f"{found}, but {right:.1%} of {len(rows)} selection questions: it memorised its training rows. Train the base "
        "for fewer steps or on more rows, so that its failures show"
    )


def _chosen(config: Config, inputs: Mapping[str, Artifact], seed: int) -> tuple[list[Example], dict[str, int]]:
    """The questions to train on, and the numbers of questions of the domain that were asked and failed."""
    responses = read_responses(inputs["responses"].path)
    questions = read_examples(split_path(inputs["examples"].path, "train"))
    questions = [e for e in questions if e.domain == config.domain and e.id in responses]
    failed = [e for e in questions if not responses[e.id].correct]
    if not failed:
        raise TrainingError(_nothing_failed(config.domain, questions, inputs["model"].path, inputs["examples"].path))
    chosen = with_usual_abstentions(failed, questions, seed)
    chosen = with_rehearsal(chosen, [e for e in questions if responses[e.id].correct], config.rehearsal, seed)
    rehearsed = sum(responses[e.id].correct for e in chosen)
    if config.rows == "random":
        chosen = random.Random(seed).sample(questions, len(chosen))
    return chosen, {"asked": len(questions), "failed": len(failed), "rehearsed": rehearsed}


class _Run:
    """A model with its rows, which are fed as token ids or, with a cache, as states into its upper layers."""

    def __init__(
        self, config: Config, model: Any, below: int, rows: list[Row], judged: _Selection, out: Path, context: Context
    ) -> None:
        self.model, self.below, self.rows, self.judged = model, below, rows, judged
        self.precision = config.loop.precision
        self.cached = bool(below and config.cache)
        self.own: Collate = collate
        self.others: Collate = collate
        self.trained: Collate = collate
        if below and config.cache:
            everything = [*judged.own, *judged.others, *rows]
            first = len(judged.own) + len(judged.others)
            index = [*range(first), *(first + i for i in used(_order(config, rows, context), config.loop.steps))]
            cache = TrunkCache(out / CHECKPOINT / "trunk", everything, below, model.config.hidden_size, config.cache)
            cache.fill(model, context, index, config.loop.precision)
            self.own, self.others = cache.collate_from(0), cache.collate_from(len(judged.own))
            self.trained = cache.collate_from(first)

    def part(self, model: Any) -> AbstractContextManager[Any]:
        """Reduces a model to the layers that the rows are fed into."""
        return only(model, self.below) if self.cached else nullcontext()

    def judge(self, model: Any) -> dict[str, float]:
        """Figures on the domain's selection rows."""
        with self.part(model):
            return judge_answers(applied(model, self.precision), self.judged.own, collate=self.own)

    def elsewhere(self, model: Any) -> float | None:
        """Share of exact answers on the rows of other domains; None if there are none."""
        if not self.judged.others:
            return None
        with self.part(model):
            return judge_answers(applied(model, self.precision), self.judged.others, collate=self.others)["exact"]

    def train(self, model: Any, config: LoopConfig, out: Path, context: Context) -> Progress:
        """Train the adapter of a peft model."""

        def validate(apply: Apply) -> dict[str, float]:
            return judge_answers(apply, self.judged.own, collate=self.own)

        with self.part(model):
            return train(model, self.rows, answer_loss, config, out, context, validate, self.trained)


def _order(config: Config, rows: Sequence[Row], context: Context) -> Order:
    return Order(tuple(row.size for row in rows), config.loop.batch, context.seed)


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples`, `responses` and `model` (the base) -> a PEFT folder."""
    torch.set_num_threads(context.threads)
    base = inputs["model"].path
    below = layers_below(base, config.layers) if config.layers else 0
    chosen, counts = _chosen(config, inputs, context.seed)
    tokenizer = HFTokenizer.load(base)
    model = load(base, config.quantize)
    check_targets(model, config.lora)
    room, depth = model.config.max_position_embeddings, model.config.num_hidden_layers
    rows = make_rows(chosen, tokenizer, room)
    selection = read_examples(split_path(inputs["examples"].path, "selection"))
    own = make_rows([e for e in selection if e.domain == config.domain], tokenizer, room)
    other_examples = [e for e in selection if e.domain != config.domain]
    others = make_rows(other_examples, tokenizer, room) if other_examples else []
    cost = LayerCost.of(depth, below, cached=config.cache is not None)
    budget = Budget.of(rows, _order(config, rows, context), config.loop.steps, cost)
    judged = _judged(config, own, others, budget, context.seed)
    work = _Run(config, model, below, rows, judged, out, context)
    before, elsewhere = work.judge(model)["exact"], work.elsewhere(model)
    model = attach(model, config.lora, context.seed, range(below, depth) if below else None)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    at = work.train(model, config.loop, out, context)
    save(model, out)
    after = dict(at.validations).get(at.best_step, at.validations[-1][1])  # of the weights that `train` ends with
    exact_elsewhere = {"before": elsewhere, "after": work.elsewhere(model)}
    nats = {"attached": after["loss"]}
    if config.quantize is None:
        nats["merged"] = work.judge(merged(model))["loss"]
    return {
        "domain": config.domain,
        **counts,
        "trained_on": config.rows,
        "too_long": len(chosen) - len(rows),
        "layers": depth - below,
        "parameters": parameters,
        "steps": at.step,
        "best_step": at.best_step,
        "stopped": at.stopped,
        "tokens": at.tokens,
        "judged": {"own": [len(judged.own), judged.of[0]], "elsewhere": [len(judged.others), judged.of[1]]},
        "exact": {"before": before, "after": after["exact"]},
        "exact_elsewhere": exact_elsewhere,
        "gain": after["exact"] - before,
        "selection_nats_per_token": nats,
        "curve": {"training": at.losses, "selection": at.validations},
        "base_sha256": model_fingerprint(inputs["model"]),
    }
