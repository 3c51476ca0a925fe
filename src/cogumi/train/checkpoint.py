"""Checkpoints of a training run, from which a killed run resumes with the same bits (SPEC C1).

A checkpoint is one safetensors file: trained weights, optimizer states, random generators, and progress. It is written
atomically, so that a full disk leaves the previous one. The best weights so far are in separate files beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cogumi.core.errors import TrainingError
from cogumi.models.folders import save_tensors

FILE = "checkpoint.safetensors"
_SAMPLE = 4096


@dataclass(slots=True)
class Progress:
    """Progress of a run, stored in the checkpoint.

    `losses` are figures of training steps and `validations` those of the selection rows, each with its step; `best` is
    the lowest validation loss, `stale` the number of validations without improvement, `kept` (loss, step) of weights
    on disk, best first; `norms` is the sum of gradient norms since the last validation, `stopped` the reason for early
    stopping.
    """

    step: int = 0
    best: float = math.inf
    best_step: int = 0
    stale: int = 0
    tokens: int = 0
    stopped: str = ""
    norms: float = 0.0
    kept: list[tuple[float, int]] = field(default_factory=list)
    losses: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    validations: list[tuple[int, dict[str, float]]] = field(default_factory=list)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable weights, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def identity(model: nn.Module) -> str:
    """Hash that identifies a checkpoint's model: names and shapes of all weights, and a sample of the frozen values."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        if not weight.requires_grad:
            sample = weight.detach().flatten()[:_SAMPLE].contiguous().view(torch.uint8)
            digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()


class Checkpoint:
    """The files of one run. `writes` is True on one process only; the others take part in gathering tensors."""

    def __init__(self, folder: Path, model_identity: str, writes: bool = True) -> None:
        self._folder, self._identity, self._writes = folder, model_identity, writes
        self.path = folder / FILE

    def best(self, step: int) -> Path:
        """File of the weights of a validated step."""
        return self._folder / f"best-{step}.safetensors"

    def save(self, model: nn.Module, optimizers: Sequence[Any], at: Progress) -> None:
        """Write the complete state on which the next step depends."""
        tensors = {f"model/{name}": _whole(p) for name, p in trained(model).items()}
        for o, optimizer in enumerate(optimizers):
            for p, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{o}/{p}/{key}": _whole(value) for key, value in state.items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        self._write(self.path, tensors, {"progress": json.dumps(asdict(at)), "identity": self._identity})

    def keep(self, model: nn.Module, at: Progress, count: int) -> None:
        """Write the weights of this step, and delete files beyond the `count` best."""
        self._write(self.best(at.step), {name: _whole(p) for name, p in trained(model).items()}, {})
        at.kept = sorted([*at.kept, (at.validations[-1][1]["loss"], at.step)])
        for _, step in at.kept[count:]:
            if self._writes:
                self.best(step).unlink(missing_ok=True)
        at.kept = at.kept[:count]

    def restore_best(self, model: nn.Module, at: Progress) -> None:
        """Load the best weights into the model, if any were kept."""
        if at.kept:
            _fill(trained(model), load_file(self.best(at.kept[0][1])))

    def resume(self, model: nn.Module) -> tuple[Progress, dict[str, Tensor]]:
        """Load weights in place; returns the progress and the tensors for `restore`, empty without a checkpoint.

        Raises `TrainingError` for a file that is damaged or belongs to another model.
        """
        if not self.path.exists():
            return Progress(), {}
        try:
            with safe_open(self.path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
            at = Progress(**json.loads(metadata["progress"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise TrainingError(
                f"checkpoint {self.path} cannot be read ({error}); delete it to start this step again"
            ) from error
        if metadata.get("identity") != self._identity:
            raise TrainingError(
                f"checkpoint {self.path} belongs to another model, or to an adapter on another base; "
                "delete it to start this step again, or give the model with which it was written"
            )
        _fill(trained(model), {key.removeprefix("model/"): v for key, v in tensors.items() if key.startswith("model/")})
        at.kept = [(loss, step) for loss, step in at.kept]
        return at, tensors

    def _write(self, path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        if self._writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({key: value.contiguous() for key, value in tensors.items()}, path, metadata)


def restore(optimizers: Sequence[Any], tensors: Mapping[str, Tensor]) -> None:
    """Restore optimizer states and random generators as saved by `Checkpoint.save`."""
    for o, optimizer in enumerate(optimizers):
        content = optimizer.state_dict()
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        for key, value in tensors.items():
            if key.startswith(f"optimizer/{o}/"):
                _, _, p, name = key.split("/")
                content["state"].setdefault(int(p), {})[name] = _like(value, weights[int(p)])
        optimizer.load_state_dict(content)
    if tensors:
        torch.set_rng_state(tensors["random/cpu"])
        if torch.cuda.is_available() and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"])


@torch.no_grad()
def _fill(weights: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(_like(values[name].to(weight.device), weight))


def _whole(value: Tensor) -> Tensor:
    """The full tensor of one that may be sharded over processes; every process must call this."""
    whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().cpu()


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """A value sharded over processes like the weight, if it has the weight's shape."""
    if isinstance(weight, DTensor) and value.shape == weight.shape:
        return distribute_tensor(value, weight.device_mesh, weight.placements)
    return value
