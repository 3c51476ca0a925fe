"""What an opened bundle takes in memory, and how fast it could at most answer (SPEC D1).

Weights are mapped from their files, and every page of them has been read after a few tokens. llama.cpp copies the
matrices of some types into an order that the processor multiplies faster (`REPACKED`): decoding gains, and their bytes
are there twice. A token reads all weights and the cache once, so memory bandwidth caps the speed.
"""

from __future__ import annotations

from dataclasses import dataclass

from cogumi.compress.pack.bundle_parts import Parts
from cogumi.core.errors import RecipeError
from cogumi.core.registry import nearest
from cogumi.core.shapes import ModelShape

REPACKED = ("Q4_0", "Q4_K", "IQ4_NL")
"""Types that llama.cpp repacks on processors with AVX2; others have kernels for a few more, or none."""
CACHES = {"f16": (2.0, 2.0), "q8_0": (34 / 32, 34 / 32), "q4_0": (18 / 32, 18 / 32)}
"""Bytes of a value among the keys and among the values of each type of cache."""
PROGRAM = 65_000_000
"""Python with the libraries that answering needs, as measured."""
COPIES = 2
"""How often small nets are there: in their session, and as they were read."""


@dataclass(frozen=True, slots=True)
class Serving:
    """How a bundle will be opened: `slots` requests at a time of up to `context` tokens, a `cache` of that type.

    None: the engine's own choice, q8_0 where heads allow.
    """

    context: int = 2048
    slots: int = 1
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.cache is not None and self.cache not in CACHES:
            raise RecipeError(f"unknown cache type '{self.cache}'; {nearest(self.cache, CACHES)}")

    def cache_bytes(self, shape: ModelShape) -> int:
        """Bytes that one token leaves in the cache of a model."""
        kind = self.cache or ("q8_0" if shape.head % 32 == 0 else "f16")
        return int(shape.layers * shape.key * sum(CACHES[kind]))


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes. `repacked` are there only if llama.cpp may repack; `adapters` includes their caches."""

    weights: int
    repacked: int
    cache: int
    buffers: int
    adapters: int
    nets: int
    program: int = PROGRAM

    def total(self, repack: bool) -> int:
        """All of it, with or without repacking."""
        rest = self.weights + self.cache + self.buffers + self.adapters + self.nets + self.program
        return rest + (self.repacked if repack else 0)


def memory(parts: Parts, serving: Serving) -> Memory:
    """What a bundle takes after all that is in it has answered; before, that is less.

    Each adapter has a context of its own. The draft has two, to read questions and to draft for the base; without a
    draft, the base reads them.
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
    """Of one context: the widest values of a batch's tokens, and logits twice, as computed and as handed out: those of
    an answer's next tokens, or of a `whole` batch where a model reads.
    """
    from cogumi.engine.llama.binding.context import MAX_LOGITS
    from cogumi.engine.llama.engine import BATCH
    from cogumi.engine.llama.speculative.latency_model import MAX_DRAFT

    batch = max(BATCH, serving.slots * (MAX_DRAFT + 1))
    outputs = max(min(batch, MAX_LOGITS // shape.vocabulary), min(batch, 64), serving.slots)
    used = outputs if whole else min(outputs, serving.slots * (MAX_DRAFT + 1))
    return 4 * (2 * used * shape.vocabulary + batch * (2 * shape.feed_forward + 4 * shape.hidden))


def bytes_per_token(parts: Parts, serving: Serving) -> int:
    """What one token of the base reads, with its context half full."""
    return parts.base.file.read + serving.context // 2 * serving.cache_bytes(parts.base.shape)
