"""The one training loop (SPEC C1): steps, schedule, validation, early stopping, exact resume.

A checkpoint is one safetensors file with everything the next step depends on; data order is a function of the step
(`batches.Order`). So a run that is killed and started again ends with the same bytes as one that was not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cogumi.errors import TrainingError
from cogumi.models.build import save_tensors
from cogumi.stage import Context
from cogumi.train.batches import Batch, Order, Row, collate
from cogumi.train.muon import Muon

Loss: TypeAlias = Callable[[Any, Batch], tuple[Tensor, dict[str, float]]]


class LoopConfig(BaseModel):
    """Budgets are steps, never seconds. `lr` is AdamW's; `muon_lr`, if set, trains weight matrices by Muon instead."""

    model_config = ConfigDict(extra="forbid")
    steps: int = Field(500, ge=1)
    batch: int = Field(64, ge=1)
    lr: float = Field(2e-3, gt=0)
    muon_lr: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(20, ge=0)
    final_lr: float = Field(0.05, ge=0, le=1, description="share of the learning rate left at the last step (cosine)")
    clip: float = Field(1.0, gt=0)
    evaluate_every: int = Field(100, ge=1)
    patience: int = Field(5, ge=1, description="evaluations without improvement before stopping")
    min_delta: float = Field(0.001, ge=0)
    checkpoint_every: int = Field(100, ge=1)


@dataclass(slots=True)
class Progress:
    """Where a run stands; kept in the checkpoint."""

    step: int = 0
    best: float = math.inf
    best_step: int = 0
    stale: int = 0
    tokens: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)


def learning_rate(step: int, config: LoopConfig) -> float:
    """Factor on the learning rate at a step (from 0): linear warm-up, then cosine down to `final_lr`."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in trained if config.muon_lr and p.ndim == 2 and "embed" not in n and "head" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in trained if id(p) not in chosen]
    result: list[torch.optim.Optimizer] = []
    if config.muon_lr and matrices:
        result.append(Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay))
    if rest:
        result.append(torch.optim.AdamW(rest, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98)))
    return result


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _save(path: Path, model: nn.Module, optimizers: Sequence[Any], best: dict[str, Tensor], at: Progress) -> None:
    tensors = {f"model/{n}": p.detach() for n, p in _trained(model).items()}
    tensors |= {f"best/{n}": p for n, p in best.items()}
    for o, optimizer in enumerate(optimizers):
        for p, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{o}/{p}/{k}": v for k, v in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors({k: v.contiguous() for k, v in tensors.items()}, path, {"progress": json.dumps(asdict(at))})


def _resume(path: Path, model: nn.Module, optimizers: Sequence[Any], best: dict[str, Tensor]) -> Progress:
    """Load everything back in place; a fresh `Progress` if there is no checkpoint."""
    if not path.exists():
        return Progress()
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            at = Progress(**json.loads(file.metadata()["progress"]))
    except (SafetensorError, KeyError, TypeError) as error:
        raise TrainingError(
            f"checkpoint {path} cannot be read ({error}); delete it to start this step again"
        ) from error
    with torch.no_grad():
        for name, weight in _trained(model).items():
            weight.copy_(tensors[f"model/{name}"])
    best |= {key[5:]: value for key, value in tensors.items() if key.startswith("best/")}
    for o, optimizer in enumerate(optimizers):
        content = optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith(f"optimizer/{o}/"):
                _, _, p, name = key.split("/")
                content["state"].setdefault(int(p), {})[name] = value
        optimizer.load_state_dict(content)
    return at


def train(
    model: nn.Module,
    rows: Sequence[Row],
    loss: Loss,
    config: LoopConfig,
    out: Path,
    context: Context,
    validate: Callable[[nn.Module], float] | None = None,
) -> Progress:
    """Train `model` in place and leave it with its best weights by `validate` (lower is better; last weights without).

    Raises `TrainingError` at the first loss that is not a number, with the step and its rows.
    """
    from accelerate import Accelerator

    torch.manual_seed(context.seed)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    optimizers = _optimizers(model, config)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    checkpoint = out / "checkpoint" / "checkpoint.safetensors"
    best: dict[str, Tensor] = {}
    at = _resume(checkpoint, model, optimizers, best)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    order = Order(tuple(len(row.ids) for row in rows), config.batch, context.seed)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    epoch, batches = -1, []
    while at.step < config.steps and at.stale < config.patience:
        if at.step // order.per_epoch != epoch:
            epoch = at.step // order.per_epoch
            batches = order.epoch(epoch)
        index = batches[at.step % order.per_epoch]
        batch = collate(rows, index)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * learning_rate(at.step, config)
        model.train()
        value, figures = loss(model, batch)
        if not torch.isfinite(value):
            raise TrainingError(
                f"loss is {value.item()} at step {at.step} on rows {index[:8]}...; lower the learning rate"
            )
        accelerator.backward(value)
        accelerator.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        at.step += 1
        at.tokens += batch.ids.numel()
        if at.step % 10 == 0:
            at.losses.append((at.step, round(figures["loss"], 5)))
        context.progress(at.step, config.steps, figures)
        if validate and (at.step % config.evaluate_every == 0 or at.step == config.steps):
            _judge(validate(model), model, best, at, config)
        if at.step % config.checkpoint_every == 0:
            _save(checkpoint, model, optimizers, best, at)
    if best:
        with torch.no_grad():
            for name, weight in _trained(model).items():
                weight.copy_(best[name])
    return at


def _judge(value: float, model: nn.Module, best: dict[str, Tensor], at: Progress, config: LoopConfig) -> None:
    at.validations.append((at.step, value))
    at.stale += 1
    if value < at.best - config.min_delta:
        at.stale = 0
    if value < at.best:
        at.best, at.best_step = value, at.step
        best |= {name: p.detach().clone() for name, p in _trained(model).items()}


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Sequence[Row], loss: Loss, batch: int = 256) -> float:
    """Average loss over rows, batch means weighted by their number of labelled tokens."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    total = weight = 0.0
    for i in range(0, len(order), batch):
        chunk = collate(rows, order[i : i + batch])
        learned = float((chunk.labels >= 0).sum())
        total += float(loss(model, chunk)[0]) * learned
        weight += learned
    return total / weight
