"""Memory of an opened bundle, and the upper bound of its decoding speed (SPEC D1).

Weights are memory-mapped, and after a few tokens all their pages are resident. llama.cpp copies the matrices of some
types into a layout that the processor multiplies faster (`REPACKED`): decoding is faster, and these weights are in
memory twice. Each token reads all weights and the cache once, so memory bandwidth limits the speed.
"""

from __future__ import annotations

from dataclasses import dataclass

from cogumi.compress.pack.bundle_parts import Parts
from cogumi.core.errors import RecipeError
from cogumi.core.registry import nearest
from cogumi.core.shapes import ModelShape

REPACKED = ("Q4_0", "Q4_K", "IQ4_NL")
"""Types that llama.cpp repacks on processors with AVX2; on others none, or more (with AMX also Q4_1, Q6_K)."""
CACHES = {"f16": (2.0, 2.0), "q8_0": (34 / 32, 34 / 32), "q4_0": (18 / 32, 18 / 32)}
"""Cache type -> bytes per element of the keys and of the values."""
PROGRAM = 65_000_000
"""Measured bytes of Python with the libraries needed for answering."""
COPIES = 2
"""Copies of the small nets in memory: the file's content and the session's weights."""


@dataclass(frozen=True, slots=True)
class Serving:
    """How a bundle is opened: `slots` simultaneous requests of up to `context` tokens, with a cache of type `cache`.

    `cache` None is the engine's default: q8_0 if the head width allows it, else f16.
    """

    context: int = 2048
    slots: int = 1
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.cache is not None and self.cache not in CACHES:
            raise RecipeError(f"unknown cache type '{self.cache}'; {nearest(self.cache, CACHES)}")

    def cache_bytes(self, shape: ModelShape) -> int:
        """Cache bytes per token of a model."""
        kind = self.cache or ("q8_0" if shape.head % 32 == 0 else "f16")
        return int(shape.layers * shape.key * sum(CACHES[kind]))


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes. `repacked` counts only if llama.cpp may repack; `adapters` includes their caches."""

    weights: int
    repacked: int
    cache: int
    buffers: int
    adapters: int
    nets: int
    program: int = PROGRAM

    def total(self, repack: bool) -> int:
        """The sum, with or without repacking."""
        rest = self.weights + self.cache + self.buffers + self.adapters + self.nets + self.program
        return rest + (self.repacked if repack else 0)


def memory(parts: Parts, serving: Serving) -> Memory:
    """Memory of a bundle after every model in it has been used; less before that.

    Each adapter has its own context. The draft has two, for reading questions and for drafting; without a draft, the
    base reads questions.
    """
    base, draft = parts.base, parts.draft
    reads = draft is None and bool(parts.small)
    models = [base, draft] if draft else [base]
    opened = [(base, reads)] + ([(draft, False), (draft, True)] if draft else [])
    tokens = serving.slots * serving.context
    caches = [tokens * serving.cache_bytes(weights.shape) for weights, _ in opened]
    buffers = [_buffers(weights.shape, serving, whole) for weights, whole in opened]
    beside = caches[0] + _buffers(base.shape, serving, whole=False)
    files = parts.models
    return Memory(
        weights=sum(weights.file.bytes for weights in models),
        repacked=sum(weights.file.of_types(REPACKED) for weights in models),
        cache=sum(caches),
        buffers=sum(buffers),
        adapters=sum(files[name].bytes + beside for name in parts.adapters),
        nets=COPIES * sum(bytes for name, bytes in parts.files.items() if name not in files),
    )


def _buffers(shape: ModelShape, serving: Serving, whole: bool) -> int:
    """Compute buffers of one context: the widest intermediate values of a batch, and two copies of the logits (computed
    and returned), for the next tokens of answers or, when a model reads questions, for the `whole` batch.
    """
    from cogumi.engine.llama.binding.context import MAX_LOGITS
    from cogumi.engine.llama.engine import BATCH
    from cogumi.engine.llama.speculative.latency_model import MAX_DRAFT

    batch = max(BATCH, serving.slots * (MAX_DRAFT + 1))
    outputs = max(min(batch, MAX_LOGITS // shape.vocabulary), min(batch, 64), serving.slots)
    used = outputs if whole else min(outputs, serving.slots * (MAX_DRAFT + 1))
    return 4 * (2 * used * shape.vocabulary + batch * (2 * shape.feed_forward + 4 * shape.hidden))


def bytes_per_token(parts: Parts, serving: Serving) -> int:
    """Bytes that the base reads to generate one token, with its context half full."""
    return parts.base.file.read + serving.context // 2 * serving.cache_bytes(parts.base.shape)
