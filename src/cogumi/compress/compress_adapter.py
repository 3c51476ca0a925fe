"""Stage `compress_adapter`: a LoRA adapter with a lower rank and fewer nonzero values (SPEC D7).

The truncated SVD of an update b @ a is its best approximation of a given rank (Eckart and Young 1936). Rank 32 fills
the blocks of q8_0 and q4_0, the types in which stage `gguf` can write both factors (`adapter_type`); an adapter of
lower rank is padded with zeros. Pruning sets single values to zero, which saves bytes only in an archive (zstd). A
short training on the questions that the adapter was trained for can recover the loss in quality.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import ArtifactError, DataError, RecipeError, TrainingError
from cogumi.core.estimate import Estimate, Given, uncounted
from cogumi.core.facts import AdapterFacts, ModelFacts
from cogumi.core.model_fingerprint import model_fingerprint
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example
from cogumi.data.examples import read_examples, split_path
from cogumi.data.responses import read_responses
from cogumi.models.folders import load
from cogumi.models.lora import save, with_adapter
from cogumi.models.lora_factors import Adapter, Factors, read_adapter, write_adapter
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.batches import make_rows
from cogumi.train.loop import LoopConfig, train
from cogumi.train.losses import answer_loss
from cogumi.train.shared_update import Span
from cogumi.train.validation import applied, judge_answers

VERSION = 1
KIND = "adapter"
INPUTS = {"examples": "examples", "model": "model", "adapter": "adapter"}
OPTIONAL = {"responses": "responses"}
TRAINS = True


BLOCK = 32
"""Values in a block of q8_0 and q4_0; ranks are padded to a multiple of it."""


class Config(BaseModel):
    """`rank` of every update, and the share of values to `prune` after truncation. With `loop`, the remaining values
    are trained on the questions that the base answered wrongly (input `responses`).
    """

    model_config = ConfigDict(extra="forbid")
    rank: int = Field(32, ge=1)
    prune: float = Field(0.0, ge=0, lt=1)
    loop: LoopConfig | None = None


def reduced(update: Factors, rank: int) -> Factors:
    """The best approximation of that rank, padded with zeros; both factors carry the root of the singular values."""
    span = Span.of([update])
    return span.factors(span.cores[0], rank)


def pruned(update: Factors, share: float) -> Factors:
    """Set a `share` of the values of both factors to 0: those whose removal, each alone, changes the update least.

    Removing a[i, j] changes the update by |a[i, j]| times the norm of b's column i, and vice versa.
    """
    a, b = update.a, update.b
    cost_a, cost_b = a.abs() * b.norm(dim=0)[:, None], b.abs() * a.norm(dim=1)
    order = torch.cat([cost_a.flatten(), cost_b.flatten()]).argsort(stable=True)
    kept = torch.ones(len(order))
    kept[order[: round(share * len(order))]] = 0
    return Factors(a * kept[: a.numel()].view_as(a), b * kept[a.numel() :].view_as(b))


def energy_kept(before: Adapter, after: Adapter) -> float:
    """1 - |W - W'|^2 / |W|^2 over all updates W; 1 if nothing changed. `ArtifactError` if every update is zero."""
    lost = whole = 0.0
    for layer, update in before.items():
        was, now = Span.of([update, after[layer]]).cores
        lost += float((was - now).square().sum())
        whole += float(was.square().sum())
    if not whole:
        raise ArtifactError("every update of the adapter is zero, so there is nothing to compress; train it first")
    return 1 - lost / whole


def _checked(adapter: Artifact, base: Artifact) -> Adapter:
    """The adapter's updates. `ArtifactError` if it was trained on another base, or holds NaN or infinity."""
    trained_on = adapter.metrics.get("base_sha256")
    if trained_on and trained_on != model_fingerprint(base):
        raise ArtifactError(
            f"the adapter {adapter.path} was not trained on {base.path}; give the base it was trained on"
        )
    updates = read_adapter(adapter.path)
    for layer, update in updates.items():
        if not (update.a.isfinite().all() and update.b.isfinite().all()):
            raise ArtifactError(f"{adapter.path}: {layer} holds NaN or infinity; train the adapter again")
    return updates


def _of_domain(examples: list[Example], domain: str | None) -> list[Example]:
    """The examples of `domain`; all if it is None."""
    return [e for e in examples if domain in (None, e.domain)]


def _heal(
    config: LoopConfig, model: Any, inputs: Mapping[str, Artifact], selection: list[Row], out: Path, context: Context
) -> int:
    """Train the adapter's nonzero values on the questions that the base answered wrongly; returns the steps taken."""
    responses = read_responses(inputs["responses"].path)
    domain = inputs["adapter"].metrics.get("domain")
    questions = _of_domain(read_examples(split_path(inputs["examples"].path, "train")), domain)
    failed = [e for e in questions if e.id in responses and not responses[e.id].correct]
    if not failed:
        raise TrainingError("the base answers all questions of the adapter's domain correctly; leave out 'loop'")
    nonzero = {parameter: parameter != 0 for name, parameter in model.named_parameters() if "lora_" in name}
    for parameter in model.parameters():
        parameter.requires_grad = parameter in nonzero

    @torch.no_grad()
    def hold_zeros() -> None:
        for parameter, kept in nonzero.items():
            parameter.mul_(kept.to(parameter.device))

    rows = make_rows(failed, HFTokenizer.load(inputs["model"].path), model.config.max_position_embeddings)
    judge = partial(judge_answers, rows=selection)
    return train(model, rows, answer_loss, config, out, context, judge, after_step=hold_zeros).step


def needs(config: Config, roles: Collection[str]) -> dict[str, str]:
    """The base's responses, for training on the questions that it failed."""
    return OPTIONAL if config.loop else {}


def estimate(config: Config, given: Given) -> Estimate:
    """The adapter with its new rank, and the steps of its training."""
    adapter = given.find("adapter", AdapterFacts)
    if adapter:
        adapter = replace(adapter, ranks=dict.fromkeys(adapter.ranks, config.rank))
    if config.loop is None:
        return Estimate((adapter,))
    return uncounted(adapter, model=given.find("model", ModelFacts), steps=config.loop.steps)


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`adapter`, the `model` it was trained on and `examples`; for `loop` also `responses` -> a PEFT folder."""
    torch.set_num_threads(context.threads)
    base, adapter = inputs["model"].path, inputs["adapter"]
    before = _checked(adapter, inputs["model"])
    most = BLOCK * math.ceil(max(len(update.a) for update in before.values()) / BLOCK)
    if config.rank > most:
        raise RecipeError(f"rank: {config.rank} would only add zeros to {adapter.path}; use {most} at most")
    after = {layer: pruned(reduced(update, config.rank), config.prune) for layer, update in before.items()}
    kept = energy_kept(before, after)
    domain = adapter.metrics.get("domain")
    examples = _of_domain(read_examples(split_path(inputs["examples"].path, "selection")), domain)
    if not examples:
        raise DataError(f"no selection question of domain '{domain}' to measure the loss in quality on; add some")
    model = load(base)
    selection = make_rows(examples, HFTokenizer.load(base), model.config.max_position_embeddings)
    figures = {"base": judge_answers(applied(model), selection)}
    figures["before"] = judge_answers(applied(with_adapter(model, adapter.path)), selection)
    write_adapter(after, adapter.path, out)
    model = with_adapter(load(base), out)
    figures["compressed"] = judge_answers(applied(model), selection)
    steps = _heal(config.loop, model, inputs, selection, out, context) if config.loop else 0
    if steps:
        save(model, out)
        figures["healed"] = judge_answers(applied(model), selection)
    values = [value for update in read_adapter(out).values() for value in (update.a, update.b)]
    gain = {name: figures[name]["exact"] - figures["base"]["exact"] for name in list(figures)[1:]}
    return {
        **({"domain": domain} if domain else {}),
        "rank": config.rank,
        "parameters": sum(value.numel() for value in values),
        "zeros": sum(int((value == 0).sum()) for value in values),
        "parameters_before": sum(u.a.numel() + u.b.numel() for u in before.values()),
        "likeness": kept,
        "steps": steps,
        "selection": figures,
        "gain": gain,
        "gain_kept": list(gain.values())[-1] / gain["before"] if gain["before"] > 0 else None,
        "base_sha256": model_fingerprint(inputs["model"]),
    }
