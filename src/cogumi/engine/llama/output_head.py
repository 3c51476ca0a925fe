"""A LoRA on the output head, kept outside llama.cpp and adapted to few-shot examples (SPEC C9; ANIL, arXiv 1909.09157).

Pure numpy in float32. logits = W h + scale b (a h), with h the hidden state after the final norm. The model computes
W h, so only `a` [rank, width] and `b` [vocabulary, rank] are stored here. The loaded arrays are never modified:
adaptation makes new arrays, so the head of the next request starts from the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.core.errors import BundleError

Floats = NDArray[np.float32]

BLOCK = 1 << 22
"""Logits per block of a gradient computation (16 MiB), which bounds its memory."""
MAX_STEPS = 100


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """`a` [rank, width] and `b` [vocabulary, rank]; they add `scale` times b a h to the logits."""

    a: Floats
    b: Floats
    scale: float

    def apply(self, logits: Floats, hidden: Floats) -> Floats:
        """New logits (n, vocabulary) from those of the frozen head and the hidden states (n, width)."""
        adapted: Floats = np.dot(hidden @ self.a.T, self.b.T)
        adapted *= self.scale
        adapted += logits
        return adapted

    def gradients(self, hidden: Floats, targets: NDArray[np.integer], logits: Floats) -> tuple[Floats, Floats]:
        """Gradients of the mean nats of `targets` (n,) by a and b; hidden states and frozen logits of n positions.

        With p the adapted distribution, G = (p - onehot) / n and u = h a^T:  db = scale G^T u,  da = scale (G b)^T h.
        """
        of_a, of_b = np.zeros_like(self.a), np.zeros_like(self.b)
        rows = max(BLOCK // logits.shape[1], 1)
        for at in range(0, len(targets), rows):
            here = slice(at, at + rows)
            h, labels = hidden[here], targets[here]
            p = self.apply(logits[here], h)
            p -= p.max(axis=1, keepdims=True)
            np.exp(p, out=p)
            p /= p.sum(axis=1, keepdims=True)
            p[np.arange(len(labels)), labels] -= 1
            p *= self.scale / len(targets)
            of_b += p.T @ (h @ self.a.T)
            of_a += (p @ self.b).T @ h
        return of_a, of_b


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The initial weights `start`, and the adaptation: `steps` steps of plain gradient descent with rate `lr`."""

    start: LowRank
    lr: float
    steps: int

    def step(self, now: LowRank, hidden: Floats, targets: NDArray[np.integer], logits: Floats) -> LowRank:
        """One gradient step; see `LowRank.gradients`."""
        of_a, of_b = now.gradients(hidden, targets, logits)
        return LowRank(now.a - self.lr * of_a, now.b - self.lr * of_b, now.scale)

    def adapt(self, hidden: Floats, targets: NDArray[np.integer], logits: Floats) -> LowRank:
        """The head adapted to hidden states (n, width), target ids (n,) and frozen logits (n, vocabulary)."""
        now = self.start
        for _ in range(self.steps):
            now = self.step(now, hidden, targets, logits)
        return now


def load_head(path: Path, *, width: int, vocabulary: int, base_sha256: str | None = None) -> Head:
    """Load a head from `head.safetensors`, for a model with this width and vocabulary.

    `base_sha256` is the fingerprint of the base's weights, if known. Raises `BundleError` if the file is not a valid
    head, or was trained on another base.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            a, b = (np.ascontiguousarray(file.get_tensor(name), np.float32) for name in ("a", "b"))
            known: Mapping[str, Any] = json.loads((file.metadata() or {})["head"])
        head = Head(LowRank(a, b, float(known["scale"])), float(known["lr"]), int(known["steps"]))
        trained_on = str(known["base_sha256"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is not a few-shot head ({error}); build the bundle again") from error
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or (a.shape[1], len(b)) != (width, vocabulary):
        raise BundleError(
            f"{path} has a {list(a.shape)} and b {list(b.shape)}, but its model has width {width} and {vocabulary} "
            "ids; use the head that was trained on it"
        )
    valid = math.isfinite(head.start.scale) and 0 < head.lr < math.inf and 1 <= head.steps <= MAX_STEPS
    if not (valid and np.isfinite(a).all() and np.isfinite(b).all()):
        raise BundleError(f"{path} contains invalid numbers; build the bundle again")
    if base_sha256 is not None and trained_on != base_sha256:
        raise BundleError(
            f"{path} was trained on another base ({trained_on[:12]}, here {base_sha256[:12]}); train it on this base"
        )
    for array in (a, b):
        array.setflags(write=False)
    return head
