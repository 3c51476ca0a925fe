"""Pruning in phases: sparsity rises in equal steps, each followed by training with the zeros held (SPEC D2).

After Zhu and Gupta (1710.01878), with equal steps. Finished phases are saved: a killed run resumes with the same bytes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open

from cogumi.compress.gguf.layout import Llama
from cogumi.compress.prune.masks import Pruner, held, reached
from cogumi.core.errors import TrainingError
from cogumi.core.stage import Context
from cogumi.models.folders import load, save_tensors
from cogumi.models.tokenization import Row
from cogumi.train.loop import Apply, LoopConfig, train
from cogumi.train.losses import answer_loss
from cogumi.train.validation import applied, judge_answers


class PhaseTraining(LoopConfig):
    """Training between phases; `steps` are the total over all phases. The learning rate is low, as for fine-tuning."""

    steps: int = Field(2000, ge=1)
    batch: int = Field(16, ge=1)
    lr: float = Field(1e-5, gt=0)


class Gradual(BaseModel):
    """The specification's four phases (of 16.25% each for an overall 65%) and 2,000 steps. Training follows every
    phase, including the last: the model at full sparsity needs it most.
    """

    model_config = ConfigDict(extra="forbid")
    phases: int = Field(4, ge=1)
    loop: PhaseTraining = PhaseTraining()

    @model_validator(mode="after")
    def _steps_for_all(self) -> Gradual:
        if self.loop.steps % self.phases:
            raise ValueError(f"{self.loop.steps} steps cannot be shared by {self.phases} phases; give a multiple")
        return self


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pruning to try: name, method, and the share to prune of each part."""

    name: str
    pruner: Pruner
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PhaseRunner:
    """Prunes candidates: the dense model's `folder`, rows for calibration, training and selection, and the folder
    `checkpoints` of finished phases. Without `gradual` there is one phase and no training.
    """

    folder: Path
    llama: Llama
    calibration: Sequence[Row]
    rows: Sequence[Row]
    selection: Sequence[Row]
    gradual: Gradual | None
    checkpoints: Path
    context: Context

    def judge(self, model: Any) -> dict[str, float]:
        """Figures of a model on the selection split."""
        found = judge_answers(applied(model), self.selection)
        return {"nats": found["loss"], "perplexity": math.exp(found["loss"]), "exact": found["exact"]}

    def prune(self, candidate: Candidate, number: int = 0, of: int = 1) -> tuple[Any, list[dict[str, Any]]]:
        """The pruned model and a record of each phase; `number` of `of` candidates, for the progress."""
        phases = self.gradual.phases if self.gradual else 1
        model, checkpoint = load(self.folder), self.checkpoints / candidate.name / "pruned.safetensors"
        done = _resume(model, checkpoint)
        for k in range(len(done), phases):
            shares = {part: share * (k + 1) / phases for part, share in candidate.shares.items()}
            candidate.pruner.prune(model, self.llama, shares, self.calibration, self.context)
            record: dict[str, Any] = {"asked": shares, "reached": reached(model), "cut": self.judge(model)}
            folder = checkpoint.parent / str(k)
            if self.gradual:
                context = self._of_phase(k, number * phases + k, of * phases, candidate.name)
                record |= self._train(model, self.gradual, folder, context)
            done.append(record)
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            weights = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
            save_tensors(weights, checkpoint, {"phases": json.dumps(done)})
            shutil.rmtree(folder, ignore_errors=True)
        return model, done

    def _train(self, model: Any, gradual: Gradual, folder: Path, context: Context) -> dict[str, Any]:
        loop = gradual.loop.model_copy(update={"steps": gradual.loop.steps // gradual.phases})

        def validate(apply: Apply) -> dict[str, float]:
            return judge_answers(apply, self.selection)

        with held(model) as after_step:
            at = train(model, self.rows, answer_loss, loop, folder, context, validate, after_step=after_step)
        model.cpu()  # a resumed run loads it on the CPU too
        curve = {"training": at.losses, "selection": at.validations}
        return {"trained": self.judge(model), "steps": at.step, "stopped": at.stopped, "curve": curve}

    def _of_phase(self, k: int, before: int, of: int, name: str) -> Context:
        """Context of a phase with its own seed and log; progress assumes that all phases are equally long."""
        context = self.context

        def progress(step: int, total: int | None, figures: Mapping[str, float]) -> None:
            context.progress(before * (total or 0) + step, total and of * total, figures)

        logs = context.logs and context.logs / f"{name}-{k}"
        return replace(context, seed=context.seed + k, progress=progress, logs=logs)


def _resume(model: Any, checkpoint: Path) -> list[dict[str, Any]]:
    """Load the weights of the last finished phase into a model; returns the records of the finished phases."""
    if not checkpoint.exists():
        return []
    try:
        with safe_open(checkpoint, "pt") as file, torch.no_grad():
            done: list[dict[str, Any]] = json.loads(file.metadata()["phases"])
            for name, weight in model.named_parameters():
                weight.copy_(file.get_tensor(name))
    except (SafetensorError, OSError, ValueError) as error:
        raise TrainingError(f"{checkpoint} cannot be read ({error}); delete its folder to prune again") from error
    return done
