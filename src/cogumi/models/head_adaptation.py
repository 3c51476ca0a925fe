"""A LoRA on the output head, adapted to a few examples while the rest of the model is frozen (SPEC C2, C9).

Logits are W h + scale * b (a h), with h the hidden state after the final norm. The gradient of the mean nats of a
support set is written in closed form, so that training (torch) and inference (numpy) compute the same. An adaptation
changes only a and b and is undone by restoring them.

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
    """The head's inputs for n answer tokens: `hidden` states [n, width] before each token, logits without the LoRA
    (`base`) [n, vocabulary], and the tokens `targets` [n].
    """

    hidden: Tensor
    base: Tensor
    targets: Tensor

    def select(self, mask: Tensor) -> States:
        """The states of some tokens, by a mask [n] or by positions."""
        return States(self.hidden[mask], self.base[mask], self.targets[mask])


def initial_head(rank: int, alpha: float, width: int, vocabulary: int, seed: int) -> Head:
    """A head without effect: `a` initialized as in peft, `b` zero."""
    bound = 1 / math.sqrt(width)
    drawn = torch.rand(rank, width, generator=torch.Generator().manual_seed(seed))
    return Head((2 * drawn - 1) * bound, torch.zeros(vocabulary, rank), alpha / rank)


def logits(head: Head, states: States) -> Tensor:
    """Logits [n, vocabulary] with the head's LoRA."""
    return states.base + head.scale * (states.hidden @ head.a.T) @ head.b.T


def gradient(head: Head, states: States) -> tuple[Tensor, Tensor]:
    """Gradient of the mean nats with respect to `a` and `b`."""
    error = logits(head, states).softmax(-1)
    error[torch.arange(len(error), device=error.device), states.targets] -= 1
    error *= head.scale / len(error)
    return (error @ head.b).T @ states.hidden, error.T @ (states.hidden @ head.a.T)


def adapt(head: Head, support: States, rates: Rates) -> Head:
    """The head after gradient descent on a support set.

    First-order: the derivative of the result with respect to `head` is the identity.
    """
    a, b = head.a.detach(), head.b.detach()
    with torch.no_grad():
        for _ in range(rates.steps):
            gradient_a, gradient_b = gradient(Head(a, b, head.scale), support)
            a, b = a - rates.lr * gradient_a, b - rates.lr * gradient_b
    return Head(a + (head.a - head.a.detach()), b + (head.b - head.b.detach()), head.scale)


def logit_change(head: Head, support: States, query: States, rates: Rates) -> float:
    """The largest change of any logit of the query tokens by adaptation to the support set."""
    return float((logits(adapt(head, support, rates), query) - logits(head, query)).abs().max())


def save(head: Head, rates: Rates, base_sha256: str, path: Path) -> None:
    """Write `head.safetensors` atomically; metadata is one JSON text, because several entries have no fixed order."""
    metadata = {"base_sha256": base_sha256, "lr": rates.lr, "scale": head.scale, "steps": rates.steps}
    tensors = {"a": head.a, "b": head.b}
    tensors = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in tensors.items()}
    save_tensors(tensors, path, {"head": json.dumps(metadata)})


def load(path: Path) -> tuple[Head, Rates, str]:
    """The head, its rates and the base's hash; `ArtifactError` for another kind of file."""
    try:
        with safe_open(path, "pt") as file:
            a, b, metadata = file.get_tensor("a"), file.get_tensor("b"), json.loads(file.metadata()["head"])
        rates = Rates(lr=float(metadata["lr"]), steps=int(metadata["steps"]))
        return Head(a, b, float(metadata["scale"])), rates, str(metadata["base_sha256"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is not an adaptable head ({error}); rerun the step that makes it") from error
