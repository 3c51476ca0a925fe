"""How much memory training takes, by arithmetic on a model's shape (SPEC D1).

Pure counting: what autograd keeps of one layer for each token, what AdamW and Muon keep of each weight, what NF4 packs
(Dettmers et al. 2023, arXiv 2305.14314). `tests/core/test_footprint.py` holds it to what real training takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cogumi.core.shapes import ModelShape

FP32, BF16 = 4, 2
"""Bytes of a value."""
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight: 4 bits, a scale of a byte for each 64 weights, and a scale of 256 such scales in fp32."""


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained and how. `ranks` are a LoRA's by target, or empty: all weights are trained.

    A step reads its rows in `parts`, each of `rows` rows of `length` tokens on one device, the last `answer` of which
    are learned; validation reads `judged` rows at once. `gpus` share weights, gradients and optimizer (fully sharded),
    but weights in NF4 lie on each whole. `fused`: the optimizer treats all weights at once, as it does on GPUs.
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

    @property
    def trained(self) -> int:
        """Number of weights that training changes."""
        return self.shape.adapter_parameters(self.ranks) if self.ranks else self.shape.parameters


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on one device. Weights and optimizer stay, the others come and go; `peak` is the most at any time."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    validation: int
    peak: int


def footprint(t: Training) -> Footprint:
    """The memory of a training run on each of its devices.

    Three moments may be the fullest. On the way back all activations lie there with the head's gradient, then ever
    fewer of them with ever more gradients; with several parts, the gradients of those before too. At the optimizer's
    step there are all gradients and its scratch. At validation there are no gradients, but more rows.
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
    """Frozen and trained weights, and the bf16 copies that computing in bf16 makes of those in fp32."""
    shape, adapter = t.shape, FP32 * t.trained if t.ranks else 0
    if t.nf4:
        return int(NF4 * shape.matrices) + BF16 * (shape.parameters - shape.matrices) + adapter
    copies = BF16 * (shape.matrices + shape.head_weights) if t.bf16 and not (t.ranks and t.recompute) else 0
    return FP32 * shape.parameters + copies + adapter


def _by_muon(t: Training) -> int:
    """How many weights Muon trains: the matrices of all layers; AdamW has the rest."""
    if not t.muon:
        return 0
    return t.trained if t.ranks else t.shape.matrices


def _optimizer(t: Training) -> int:
    """AdamW keeps two moments of a weight, Muon one."""
    return FP32 * (2 * t.trained - _by_muon(t))


def _scratch(t: Training) -> int:
    """What a step computes beside its state: AdamW a root of each weight it treats at once (two of one at a time), Muon
    seven matrices for each of the most of one shape, gate and up of all layers.
    """
    shape = t.shape
    adamw = t.trained - _by_muon(t) if t.fused else 2 * min(t.trained, shape.head_weights)
    alike = min(_by_muon(t), 2 * shape.layers * shape.feed_forward * shape.hidden)
    return FP32 * max(adamw, 7 * alike)


def _activations(t: Training) -> int:
    """What a part leaves for the way back.

    Of a token each layer keeps: in, normal form and out of two norms (fp32, and in bf16 what goes on); queries,
    attention before and after its heads are joined, keys, values; gate before and after its activation function, up,
    their product; what lies between A and B of a LoRA. With `recompute` layers keep their input only, and the one at
    work the rest. A learned token keeps log-probabilities over the vocabulary, and on the way back two gradients of
    that size.
    """
    shape, tokens = t.shape, t.rows * t.length
    value = BF16 if t.bf16 else FP32
    norms = 6 * FP32 * shape.hidden + (2 * BF16 * shape.hidden if t.bf16 else 0)
    inner = 3 * shape.query + 2 * shape.key + 4 * shape.feed_forward + sum((t.ranks or {}).values())
    layer = norms + value * inner
    learned = _learned(t, t.rows, 3)
    if t.recompute:
        return tokens * FP32 * shape.hidden * shape.layers + max(tokens * layer, learned)
    return tokens * layer * shape.layers + learned


def _learned(t: Training, rows: int, copies: int) -> int:
    return rows * min(t.answer, t.length) * t.shape.vocabulary * FP32 * copies


def _validation(t: Training) -> int:
    """One layer at a time, nothing kept: hidden states, what lies inside its feed-forward, logits of the answers."""
    shape = t.shape
    return t.judged * t.length * FP32 * (3 * shape.hidden + 3 * shape.feed_forward) + _learned(t, t.judged, 2)
