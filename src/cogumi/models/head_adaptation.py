"""A LoRA on the output head, adapted on a few examples while the rest of the model stands still (SPEC C2, C9).

Logits are W h + scale * b (a h), with h the hidden state after the final norm. The gradient of the mean nats of a
support set is written out, so that training here and answering elsewhere (numpy, no torch) do the same sums. Only a and
b move, so what an adaptation did is forgotten by forgetting them.

`head.safetensors` holds `a` [rank, width] and `b` [vocabulary, rank] in fp32; its metadata `head` is a JSON text with
`scale`, `lr` and `steps` of the inner loop, and `base_sha256`, the hash of the base's weights.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cogumi.core.errors import ArtifactError
from cogumi.models.folders import save_tensors

FILE = "head.safetensors"


class Rates(BaseModel):
    """The inner loop: `steps` of plain gradient descent at `lr`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    lr: float = Field(gt=0)
    steps: int = Field(ge=1)


@dataclass(frozen=True, slots=True)
class Head:
    """`a` [rank, width], `b` [vocabulary, rank]."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class States:
    """What the head sees of some answer tokens: `hidden` [n, width] before each, its logits without the LoRA `base`
    [n, vocabulary], and the tokens themselves, `targets` [n].
    """

    hidden: Tensor
    base: Tensor
    targets: Tensor

    def where(self, mask: Tensor) -> States:
        """Some of them, by a mask [n] or positions."""
        return States(self.hidden[mask], self.base[mask], self.targets[mask])


def fresh(rank: int, alpha: float, width: int, vocabulary: int, seed: int) -> Head:
    """A head that changes nothing yet: `a` as peft draws it, `b` zero."""
    bound = 1 / math.sqrt(width)
    drawn = torch.rand(rank, width, generator=torch.Generator().manual_seed(seed))
    return Head((2 * drawn - 1) * bound, torch.zeros(vocabulary, rank), alpha / rank)


def logits(head: Head, states: States) -> Tensor:
    """[n, vocabulary]."""
    return states.base + head.scale * (states.hidden @ head.a.T) @ head.b.T


def gradient(head: Head, states: States) -> tuple[Tensor, Tensor]:
    """Of the mean nats with respect to `a` and `b`."""
    slope = logits(head, states).softmax(-1)
    slope[torch.arange(len(slope), device=slope.device), states.targets] -= 1
    slope *= head.scale / len(slope)
    return (slope @ head.b).T @ states.hidden, slope.T @ (states.hidden @ head.a.T)


def adapt(head: Head, support: States, rates: Rates) -> Head:
    """The head after gradient descent on a support set.

    First-order: it has the value of the adapted head and, towards `head`, the gradient of the identity.
    """
    a, b = head.a.detach(), head.b.detach()
    with torch.no_grad():
        for _ in range(rates.steps):
            slope_a, slope_b = gradient(Head(a, b, head.scale), support)
            a, b = a - rates.lr * slope_a, b - rates.lr * slope_b
    return Head(a + (head.a - head.a.detach()), b + (head.b - head.b.detach()), head.scale)


def logit_change(head: Head, support: States, asked: States, rates: Rates) -> float:
    """The furthest that adaptation moves any logit of other answer tokens."""
    return float((logits(adapt(head, support, rates), asked) - logits(head, asked)).abs().max())


def save(head: Head, rates: Rates, base_sha256: str, path: Path) -> None:
    """Write `head.safetensors`, whole or not at all; the notes are one JSON text: several have no fixed order."""
    notes = {"base_sha256": base_sha256, "lr": rates.lr, "scale": head.scale, "steps": rates.steps}
    tensors = {"a": head.a, "b": head.b}
    tensors = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in tensors.items()}
    save_tensors(tensors, path, {"head": json.dumps(notes)})


def load(path: Path) -> tuple[Head, Rates, str]:
    """The head, its rates and the base's hash; `ArtifactError` if the file is none of ours."""
    try:
        with safe_open(path, "pt") as file:
            a, b, notes = file.get_tensor("a"), file.get_tensor("b"), json.loads(file.metadata()["head"])
        rates = Rates(lr=float(notes["lr"]), steps=int(notes["steps"]))
        return Head(a, b, float(notes["scale"])), rates, str(notes["base_sha256"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is no adaptable head ({error}); build the step that makes it again") from error
