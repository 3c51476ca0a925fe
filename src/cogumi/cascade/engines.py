"""Where a cascade gets its engines from: a factory, by default llama.cpp over the bundle's GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

from cogumi.bundle.unpack import BundleFiles
from cogumi.engine.few_shot import ADAPTER
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import Engine


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """`slots` requests at a time, `context` tokens each; `threads` per model and the type of their key-value `cache`
    (None: the engine's choice). Without `repack` models answer slower, in up to half the memory.
    """

    slots: int = 8
    context: int = 512
    threads: int | None = None
    cache: str | None = None
    repack: bool = True


class Engines(NamedTuple):
    """`base` answers and carries the modifiers; `draft` reads questions, None if the base does that itself."""

    base: Engine
    draft: Engine | None


EngineFactory: TypeAlias = Callable[[BundleFiles, EngineOptions], Engines]
"""Opens the engines of a bundle; the cascade closes them."""


def llama_engines(files: BundleFiles, options: EngineOptions) -> Engines:
    """The bundle's own models. Raises `BundleError` if a file cannot be used."""
    bundle, size = files.bundle, asdict(options)
    adapters = bundle.modifiers | ({ADAPTER: bundle.fewshot} if bundle.fewshot else {})
    with ExitStack() as opened:
        draft = LlamaEngine(bundle.draft, lookup=False, **size) if bundle.draft else None
        if draft:
            opened.callback(draft.close)
        base = LlamaEngine(
            bundle.base,
            draft=draft,
            adapters={name: partial(files.file, path) if files.lazy else path for name, path in adapters.items()},
            head=bundle.head,
            base_sha256=bundle.base_fingerprint,
            **size,
        )
        opened.pop_all()
    return Engines(base, draft)
