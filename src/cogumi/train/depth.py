"""Stage `depth`: train routers that let easy tokens skip layers of a frozen base (SPEC C7; `models.depth_routers`).

A token is easy if the full model predicts the next token with high probability. The routers are trained on the hidden
states of a model whose tokens actually skip. The threshold `bar` of the routers is chosen on the selection split: most
tokens skip while at most the permitted share of answers is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from cogumi.core.estimate import Estimate, Given, uncounted
from cogumi.core.facts import ModelFacts
from cogumi.core.files import sha256
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.examples import read_examples, split_path
from cogumi.models.depth_routers import FILE, Routers, skipping, spans_of
from cogumi.models.folders import load, parameters
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.batches import IGNORE, Batch, collate, make_rows
from cogumi.train.loop import Apply, LoopConfig, train
from cogumi.train.validation import applied, judge_answers, passes

VERSION = 1
KIND = "depth"
INPUTS = {"examples": "examples", "model": "model"}
TRAINS = True

_SHARES = tuple(round(0.05 * k, 2) for k in range(1, 20))  # candidate shares of answer tokens that skip


class Config(BaseModel):
    """`layers` (from 0) that tokens may skip, at most half of all; consecutive layers share one decision.

    A token is easy if the full model gives the next token at least the probability `sure`. At most the share `share` of
    answer tokens skip, and at most `points` percentage points of exact selection answers are lost.
    """

    model_config = ConfigDict(extra="forbid")
    layers: tuple[int, ...]
    sure: float = Field(0.95, gt=0, lt=1)
    share: float = Field(0.75, gt=0, le=1)
    points: float = Field(0.5, ge=0)
    loop: LoopConfig = LoopConfig(steps=300, batch=32, lr=2e-3, evaluate_every=100)


class RoutedModel(nn.Module):
    """A frozen language model with trainable routers."""

    def __init__(self, language_model: Any, routers: Routers) -> None:
        super().__init__()
        self.lm = language_model.requires_grad_(False)
        self.lm.config.use_cache = False
        self.routers = routers

    @torch.no_grad()
    def nats(self, ids: Tensor) -> Tensor:
        """Nats of each next token under the full model: `[rows, positions]` -> `[rows, positions - 1]`."""
        logits = self.lm(input_ids=ids).logits[:, :-1]
        return cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")

    def scores(self, ids: Tensor) -> Tensor:
        """Log-odds of easy at the input of each span while tokens skip: -> `[spans, rows, positions - 1]`."""
        log_odds: list[Tensor] = []

        def depth(first: int, hidden: Tensor) -> Tensor:
            log_odds.append(self.routers.easy(first, hidden))
            return ~(log_odds[-1].detach() > self.routers.bar)

        with skipping(self.lm.get_decoder(), depth, self.routers.spans):
            self.lm.get_decoder()(input_ids=ids)
        return torch.stack(log_odds)[:, :, :-1]


def tokens_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Masks of the positions before a token of the row, and before an answer token: `[rows, positions - 1]`."""
    answer = batch.labels[:, 1:] != IGNORE
    return answer.flip(1).cumsum(1).flip(1) > 0, answer


def router_loss(model: RoutedModel, batch: Batch, most: float) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy of "easy" (at most `most` nats) over the tokens of a batch and all spans."""
    read, _ = tokens_of(batch)
    easy = (model.nats(batch.ids) <= most)[read].float()
    scores = model.scores(batch.ids)[:, read]
    loss = binary_cross_entropy_with_logits(scores, easy.expand_as(scores))
    accuracy = ((scores > 0) == (easy > 0.5)).float().mean()
    return loss, {"loss": float(loss.detach()), "accuracy": float(accuracy)}


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Router `scores` [spans, n] of n tokens; `easy` and `answer` [n] are boolean labels."""

    scores: Tensor
    easy: Tensor
    answer: Tensor

    @property
    def figures(self) -> dict[str, float]:
        """Loss, accuracy on all tokens and on answer tokens, and the shares of easy tokens."""
        right = ((self.scores > 0) == self.easy).float()
        return {
            "loss": float(binary_cross_entropy_with_logits(self.scores, self.easy.float().expand_as(self.scores))),
            "token_accuracy": float(right.mean()),
            "answer_token_accuracy": float(right[:, self.answer].mean()),
            "easy_tokens": float(self.easy.float().mean()),
            "easy_answer_tokens": float(self.easy[self.answer].float().mean()),
        }


def token_scores(apply: Apply, rows: Sequence[Row], most: float) -> TokenScores:
    """Router scores of every token of the rows while tokens skip; easy is at most `most` nats."""

    def scored(model: RoutedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        read, answer = tokens_of(batch)
        return model.scores(batch.ids)[:, read].cpu(), (model.nats(batch.ids) <= most)[read].cpu(), answer[read].cpu()

    parts = [apply(scored, collate(rows, index)) for index in passes(rows)]
    return TokenScores(*(torch.cat(column, dim=-1) for column in zip(*parts, strict=True)))


def sweep(model: RoutedModel, rows: Sequence[Row], most: float) -> list[dict[str, float]]:
    """Figures for rising shares of answer tokens that skip, from none to nearly all: `bar`, `share`, and of the answers
    `exact` (share of exact ones) and `nats` per token.
    """
    apply, decoder, routers = applied(model), model.lm.get_decoder(), model.routers
    scores = token_scores(apply, rows, most)
    found = []
    for share in (0.0, *_SHARES):
        routers.bar = float(scores.scores[:, scores.answer].quantile(1 - share)) if share else math.inf
        with skipping(decoder, routers.takes, routers.spans):
            answers = judge_answers(applied(model.lm), rows)
        found.append({"bar": routers.bar, "share": share, "exact": answers["exact"], "nats": answers["loss"]})
    return found


def choose(found: Sequence[Mapping[str, float]], share: float, points: float) -> Mapping[str, float]:
    """The last row of a sweep before `share` is exceeded or more than `points` of the first row's answers are lost."""
    least = found[0]["exact"] - points / 100
    bad = (i for i, row in enumerate(found) if row["share"] > share or row["exact"] < least)
    return found[next(bad, len(found)) - 1]


def estimate(config: Config, given: Given) -> Estimate:
    """The steps of training."""
    return uncounted(model=given.find("model", ModelFacts), steps=config.loop.steps)


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples` and `model` (the base) -> depth.safetensors."""
    torch.set_num_threads(context.threads)
    base, data = inputs["model"].path, inputs["examples"].path
    tokenizer, language_model = HFTokenizer.load(base), load(base)
    shape = language_model.config
    spans = spans_of(config.layers, shape.num_hidden_layers)
    torch.manual_seed(context.seed)
    model = RoutedModel(language_model, Routers(spans, shape.hidden_size))
    rows, selection = (
        make_rows(read_examples(split_path(data, split)), tokenizer, shape.max_position_embeddings)
        for split in ("train", "selection")
    )
    most = -math.log(config.sure)
    at = train(
        model,
        rows,
        partial(router_loss, most=most),
        config.loop,
        out,
        context,
        lambda apply: token_scores(apply, selection, most).figures,
    )
    figures = token_scores(applied(model), selection, most).figures
    tried = sweep(model, selection, most)
    chosen = choose(tried, config.share, config.points)
    model.routers.bar = chosen["bar"]
    model.routers.save(out / FILE, base)
    return {
        "spans": spans,
        "parameters": parameters(model.routers),
        "steps": at.step,
        "best_step": at.best_step,
        "tokens": at.tokens,
        **figures,
        "skipped": chosen["share"],
        "points_lost": round(100 * (tried[0]["exact"] - chosen["exact"]), 3),
        "tried": tried,
        "curve": {"training": at.losses, "selection": at.validations},
        "base_sha256": sha256(base / "model.safetensors"),
    }
