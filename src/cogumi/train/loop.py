"""The training loop (SPEC C1): schedule, validation, early stopping and exact resume, on one process or several.

Data order is a function of the step (`batches.Order`), and `checkpoint` saves all other state. So a run that is killed
and resumed ends with the same bytes as an uninterrupted one. Under `accelerate launch` every process computes a share
of each batch, weighted so that the sum is the gradient of the whole batch.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from cogumi.core.errors import TrainingError
from cogumi.core.stage import CHECKPOINT, Context
from cogumi.train.autocast import Precision, computing
from cogumi.train.batches import Order, collate
from cogumi.train.checkpoint import Checkpoint, Progress, identity, restore, trained
from cogumi.train.muon import Muon

SHOWN_EVERY = 10
"""Steps between two recorded losses."""

Loss: TypeAlias = Callable[[Any, Any], tuple[Tensor, dict[str, float]]]
"""loss(model, batch) -> mean loss of the batch, and figures to log, including `loss`."""
Apply: TypeAlias = Callable[[Callable[[Any, Any], Any], Any], Any]
"""apply(function, batch) -> function(model, batch), on the model's device, without gradients and dropout."""


class Item(Protocol):
    """One training item: a row or an episode."""

    @property
    def size(self) -> int:
        """Number of tokens: items of similar size share a batch."""

    @property
    def weight(self) -> float:
        """Weight in a mean over items."""


class LoopConfig(BaseModel):
    """Training budgets are steps, never seconds. `lr` is AdamW's; with `muon_lr`, Muon trains the weight matrices.

    A step takes `batch` items in total over all processes; each process splits its share into `accumulate` parts, of
    which one at a time is in memory. Training stops early after `patience` validations without improvement by
    `min_delta`; with `plateau`, also if perplexity changes by less than that share over `patience` validations; with
    `gradient_floor`, also if the mean gradient norm since the last validation is below it.
    """

    model_config = ConfigDict(extra="forbid")
    steps: int = Field(500, ge=1)
    batch: int = Field(64, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(2e-3, gt=0)
    muon_lr: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(20, ge=0)
    schedule: Literal["cosine", "linear"] = "cosine"
    final_lr: float = Field(0.05, ge=0, le=1, description="share of the learning rate at the last step")
    clip: float = Field(1.0, gt=0)
    evaluate_every: int = Field(100, ge=1)
    patience: int = Field(5, ge=1)
    min_delta: float = Field(0.001, ge=0)
    plateau: float | None = Field(None, gt=0)
    gradient_floor: float | None = Field(None, gt=0)
    keep: int = Field(1, ge=1, description="number of best weights to keep; others as `best/<step>.safetensors`")
    checkpoint_every: int = Field(100, ge=1)
    precision: Precision = Field("fp32", description="of the computation; weights keep their type")
    gradient_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile; pays on GPUs")


class _FunctionModule(nn.Module):
    """A module whose forward pass is any function of the model, so that data-parallel and sharding wrappers apply."""

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.model: Any = model
        self.precision = precision

    def forward(self, function: Callable[[Any, Any], Any], batch: Any) -> Any:
        with computing(self.precision, next(self.model.parameters()).device.type):
            return function(self.model, batch)


def learning_rate(step: int, config: LoopConfig) -> float:
    """Factor on the learning rate at a step (from 0): linear warm-up, then the schedule down to `final_lr`."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    done = min((step - config.warmup) / max(1, config.steps - config.warmup), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.final_lr + (1 - config.final_lr) * left


def _optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    weights = trained(model)
    if not weights:
        raise TrainingError("this model has no trainable weights; check the adapter's targets")
    matrices = [
        p for n, p in weights.items() if config.muon_lr and p.ndim == 2 and "embed" not in n and "head" not in n
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for p in weights.values() if id(p) not in chosen]
    result: list[torch.optim.Optimizer] = []
    if config.muon_lr and matrices:
        result.append(Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay))
    if rest:
        result.append(torch.optim.AdamW(rest, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98)))
    return result


def _checkpoint_gradients(model: nn.Module) -> None:
    """Recompute activations in the backward pass instead of storing them."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return


class _Run:
    """One run of `train`: model and optimizers wrapped by `accelerate`, and the checkpoint."""

    def __init__(
        self, model: nn.Module, rows: Sequence[Item], loss: Loss, config: LoopConfig, collate: Any, out: Path, seed: int
    ) -> None:
        from accelerate import Accelerator

        torch.manual_seed(seed)
        self.model, self.rows, self.loss, self.config, self.collate = model, rows, loss, config, collate
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        if config.gradient_checkpointing:
            _checkpoint_gradients(model)
        optimizers = _optimizers(model, config)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        writes = self.accelerator.is_main_process
        self.checkpoint = Checkpoint(out / CHECKPOINT, identity(model), writes)
        self.at, state = self.checkpoint.resume(model)
        module = _FunctionModule(model, config.precision)
        wrapped, *self.optimizers = self.accelerator.prepare(module, *optimizers)
        restore(self.optimizers, state)
        self.wrapped: Any = torch.compile(wrapped) if config.compile else wrapped
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.rates = rates
        self.norm = 0.0

    def apply(self, function: Callable[[Any, Any], Any], batch: Any) -> Any:
        """See `Apply`."""
        self.wrapped.eval()
        with torch.no_grad():
            return self.wrapped(function, batch.to(self.accelerator.device))

    def step(self, index: Sequence[int]) -> dict[str, float]:
        """Train on the rows of one batch; returns this process's share of the figures, weighted by rows."""
        config, accelerator = self.config, self.accelerator
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate * learning_rate(self.at.step, config)
        self.wrapped.train()
        parts, processes = config.accumulate * accelerator.num_processes, accelerator.num_processes
        whole = sum(self.rows[i].weight for i in index)
        mine = [index[k::parts] for k in range(accelerator.process_index, parts, processes)]
        shown: dict[str, float] = {}
        for k, part in enumerate(mine):
            share = sum(self.rows[i].weight for i in part) / whole
            part = part or index[:1]  # a process without rows must still synchronize; its share is 0
            last = k == len(mine) - 1
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                value, figures = self.wrapped(self.loss, self.collate(self.rows, part).to(accelerator.device))
                if not torch.isfinite(value):
                    self._refuse(f"loss is {value.item()}", part)
                accelerator.backward(value * (share * processes))  # gradients are averaged over processes
            for name, figure in figures.items():
                shown[name] = shown.get(name, 0.0) + figure * share
        norm = float(accelerator.clip_grad_norm_(self.wrapped.parameters(), config.clip))
        if not math.isfinite(norm):
            self._refuse(f"the gradient's norm is {norm}", index)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.at.step += 1
        self.at.tokens += sum(self.rows[i].size for i in index)
        self.at.norms += norm
        self.norm = norm
        return shown

    def _refuse(self, problem: str, index: Sequence[int]) -> None:
        names = [getattr(self.rows[i], "id", "") or f"row {i}" for i in index[:8]]
        more = f" and {len(index) - 8} more" if len(index) > 8 else ""
        raise TrainingError(
            f"{problem} at step {self.at.step} on {', '.join(names)}{more}; lower the learning rate or check these rows"
        )

    def everywhere(self, figures: dict[str, float]) -> dict[str, float]:
        """Figures of a step, summed over all processes."""
        if self.accelerator.num_processes == 1:
            return figures
        values = torch.tensor([figures[name] for name in sorted(figures)], device=self.accelerator.device)
        summed = self.accelerator.reduce(values, "sum").tolist()
        return dict(zip(sorted(figures), summed, strict=True))

    def judge(self, figures: Mapping[str, float], stop: str) -> None:
        """Record a validation: keep the weights if they are among the best, and decide whether to stop."""
        at, config = self.at, self.config
        at.validations.append((at.step, {name: float(value) for name, value in figures.items()}))
        if stop:
            at.stopped = stop
            return
        loss = figures["loss"]
        at.stale = 0 if loss < at.best - config.min_delta else at.stale + 1
        if loss < at.best:
            at.best, at.best_step = loss, at.step
        if loss <= at.best or config.keep > 1:
            self.checkpoint.keep(self.model, at, config.keep)
        at.stopped = reason_to_stop(at, config)
        at.norms = 0.0

    def finish(self, out: Path) -> None:
        """Load the best weights into the model, and write those of the other kept steps to `best/`."""
        self.accelerator.wait_for_everyone()
        self.checkpoint.restore_best(self.model, self.at)
        for _, step in self.at.kept[1:]:
            if self.accelerator.is_main_process:
                (out / "best").mkdir(exist_ok=True)
                shutil.copyfile(self.checkpoint.best(step), out / "best" / f"{step}.safetensors")
        self.accelerator.wait_for_everyone()  # other processes may still read the files


def reason_to_stop(at: Progress, config: LoopConfig) -> str:
    """Reason to stop training now, or an empty string."""
    losses = [figures["loss"] for _, figures in at.validations]
    if at.stale >= config.patience:
        return f"no improvement in {config.patience} validations"
    if config.plateau and len(losses) > config.patience:
        recent = [math.exp(min(loss, 700.0)) for loss in losses[-config.patience - 1 :]]
        if max(recent) - min(recent) < config.plateau * min(recent):
            return f"perplexity changed by less than {config.plateau:.2%} in {config.patience} validations"
    since = at.step - (at.validations[-2][0] if len(at.validations) > 1 else 0)
    if config.gradient_floor and at.norms / since < config.gradient_floor:
        return f"the mean gradient norm is below {config.gradient_floor}"
    return ""


def train(
    model: nn.Module,
    rows: Sequence[Item],
    loss: Loss,
    config: LoopConfig,
    out: Path,
    context: Context,
    validate: Callable[[Apply], Mapping[str, float]] | None = None,
    collate: Callable[[Sequence[Any], Sequence[int]], Any] = collate,
    stop: Callable[[Mapping[str, float]], str] | None = None,
    after_step: Callable[[], None] | None = None,
) -> Progress:
    """Train `model` in place; it ends with the weights of the lowest `validate(apply)["loss"]`, or the last without.

    `stop(figures)` ends training after a validation by returning a reason; the weights of that validation are not
    kept, while the initial weights count as candidates. `after_step()` may correct the weights after every step.
    Raises `TrainingError` at the first loss or gradient that is not finite, with the step and its rows, and for a
    checkpoint of another model.
    """
    run = _Run(model, rows, loss, config, collate, out, context.seed)
    at = run.at
    order = Order(tuple(row.size for row in rows), config.batch, context.seed)
    log = _log(context, at.step) if run.accelerator.is_main_process else None
    if stop and validate and at.step == 0:
        run.judge(validate(run.apply), "")
    epoch, batches = -1, []
    began, read = time.perf_counter(), at.tokens
    while at.step < config.steps and not at.stopped:
        if at.step // order.per_epoch != epoch:
            epoch = at.step // order.per_epoch
            batches = order.epoch(epoch)
        figures = run.step(batches[at.step % order.per_epoch])
        if after_step:
            after_step()
        if at.step % SHOWN_EVERY == 0:
            figures = run.everywhere(figures)
            at.losses.append((at.step, {name: round(value, 5) for name, value in figures.items()}))
            _write(log, "training", figures | {"norm": run.norm, "rate": run.groups[0]["lr"]}, at.step)
        speed = (at.tokens - read) / (time.perf_counter() - began)
        context.progress(at.step, config.steps, {"loss": figures["loss"], "tokens/s": speed})
        if validate and (at.step % config.evaluate_every == 0 or at.step == config.steps):
            found = validate(run.apply)
            run.judge(found, stop(found) if stop else "")
            _write(log, "selection", at.validations[-1][1], at.step)
        if at.step % config.checkpoint_every == 0:
            run.checkpoint.save(model, run.optimizers, at)
    run.finish(out)
    if log:
        log.close()
    return at


def _log(context: Context, step: int) -> Any:
    """A TensorBoard writer; a resumed run continues at its step."""
    if context.logs is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    if step == 0 and context.logs.exists():
        shutil.rmtree(context.logs)
    return SummaryWriter(context.logs, purge_step=step)


def _write(log: Any, group: str, figures: Mapping[str, float], step: int) -> None:
    if log:
        for name, value in figures.items():
            log.add_scalar(f"{group}/{name}", value, step)
