"""Memory of training, computed from a model's shape (SPEC D1).

Counts the activations that autograd saves per layer and token, the optimizer state of AdamW and Muon, and weights in
NF4 (Dettmers et al. 2023, arXiv 2305.14314). `tests/core/test_footprint.py` compares it with real training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cogumi.core.shapes import ModelShape

FP32, BF16 = 4, 2
"""Bytes of a value."""
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight: 4 bits, a one-byte scale per 64 weights, and an fp32 scale per 256 such scales."""


@dataclass(frozen=True, slots=True)
class Training:
    """A training configuration. `ranks` are a LoRA's by target; if empty, all weights are trained. With `upper` the
    LoRA is on that many upper layers, and no gradient reaches the others.

    A step accumulates gradients over `parts` micro-batches, each of `rows` rows of `length` tokens on one device, whose
    last `answer` tokens contribute to the loss; validation batches have `judged` rows. Weights, gradients and optimizer
    state are fully sharded over `gpus`, except NF4 weights, which are replicated. `fused`: the optimizer updates all
    weights at once, as on GPUs.
    """

    shape: ModelShape
    rows: int
    length: int
    answer: int
    judged: int = 0
    ranks: Mapping[str, int] | None = None
    nf4: bool = False
    bf16: bool = False
    recompute: bool = False
    parts: int = 1
    gpus: int = 1
    muon: bool = False
    fused: bool = True
    upper: int | None = None

    @property
    def layers(self) -> int:
        """Number of layers through which gradients flow."""
        return self.upper or self.shape.layers

    @property
    def trained(self) -> int:
        """Number of weights that training changes."""
        return self.shape.adapter_parameters(self.ranks, self.upper) if self.ranks else self.shape.parameters


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on one device. Weights and optimizer state are permanent, the rest temporary; `peak` is the maximum."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    validation: int
    peak: int


def footprint(t: Training) -> Footprint:
    """Memory per device of a training run.

    The peak is in one of three phases. The backward pass starts with all activations and the head's gradient; then
    activations are freed while gradients grow (with several micro-batches, earlier gradients are present from the
    start). The optimizer step has all gradients and its scratch memory. Validation has no gradients, but more rows.
    """
    share = 1 if t.nf4 else t.gpus
    weights = _weights(t) // share
    gradients = FP32 * t.trained // t.gpus
    optimizer = _optimizer(t) // t.gpus
    activations = _activations(t) + (0 if share == 1 else FP32 * t.shape.matrices // t.shape.layers)  # a gathered layer
    validation = _validation(t)
    head = 0 if t.ranks else FP32 * t.shape.head_weights // t.gpus
    back = head + (activations + gradients if t.parts > 1 else max(activations, gradients))
    peak = weights + optimizer + max(back, gradients + _scratch(t) // t.gpus, validation)
    return Footprint(weights, gradients, optimizer, activations, validation, peak)


def _weights(t: Training) -> int:
    """Frozen and trained weights, and the bf16 copies of fp32 weights for computation in bf16."""
    shape, adapter = t.shape, FP32 * t.trained if t.ranks else 0
    if t.nf4:
        return int(NF4 * shape.matrices) + BF16 * (shape.parameters - shape.matrices) + adapter
    copies = BF16 * (shape.matrices + shape.head_weights) if t.bf16 and not (t.ranks and t.recompute) else 0
    return FP32 * shape.parameters + copies + adapter


def _by_muon(t: Training) -> int:
    """Number of weights trained by Muon: the matrices of all layers; AdamW trains the rest."""
    if not t.muon:
        return 0
    return t.trained if t.ranks else t.shape.matrices


def _optimizer(t: Training) -> int:
    """Optimizer state: two moments per weight for AdamW, one for Muon."""
    return FP32 * (2 * t.trained - _by_muon(t))


def _scratch(t: Training) -> int:
    """Scratch memory of an optimizer step: for AdamW one value per weight (fused) or two per weight of the largest
    tensor; for Muon seven matrices per matrix of the most frequent shape (gate and up projections of all layers).
    """
    shape = t.shape
    adamw = t.trained - _by_muon(t) if t.fused else 2 * min(t.trained, shape.head_weights)
    alike = min(_by_muon(t), 2 * shape.layers * shape.feed_forward * shape.hidden)
    return FP32 * max(adamw, 7 * alike)


def _activations(t: Training) -> int:
    """Activations of a micro-batch saved for the backward pass.

    Per token each layer saves: input, normalised input and output of two norms (fp32; with bf16 also the bf16 outputs);
    queries, attention outputs before and after joining the heads, keys, values; gate before and after its activation
    function, up, their product; the inner values of each LoRA. With `recompute` layers save only their input, and only
    the current layer has the rest. A token in the loss saves log-probabilities over the vocabulary, and in the backward
    pass two gradients of that size.
    """
    shape, tokens = t.shape, t.rows * t.length
    value = BF16 if t.bf16 else FP32
    norms = 6 * FP32 * shape.hidden + (2 * BF16 * shape.hidden if t.bf16 else 0)
    inner = 3 * shape.query + 2 * shape.key + 4 * shape.feed_forward + sum((t.ranks or {}).values())
    layer = norms + value * inner
    learned = _learned(t, t.rows, 3)
    if t.recompute:
        return tokens * FP32 * shape.hidden * t.layers + max(tokens * layer, learned)
    return tokens * layer * t.layers + learned


def _learned(t: Training, rows: int, copies: int) -> int:
    return rows * min(t.answer, t.length) * t.shape.vocabulary * FP32 * copies


def _validation(t: Training) -> int:
    """Validation saves no activations: hidden states and feed-forward values of one layer, logits of the answers."""
    shape = t.shape
    return t.judged * t.length * FP32 * (3 * shape.hidden + 3 * shape.feed_forward) + _learned(t, t.judged, 2)
