"""Engine factories for a cascade; the default is llama.cpp with the bundle's GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

from cogumi.bundle.unpack import BundleFiles
from cogumi.core.registry import engine
from cogumi.engine.few_shot import ADAPTER
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import Engine


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """`slots`: parallel requests, of `context` tokens each (None: see `LlamaEngine`). `threads` per model and type of
    the key-value `cache`: None lets the engine choose. Without `repack`, models are slower and need as little as half
    the memory. Idle modifiers are freed while modifiers take more than `adapter_memory` bytes (None: no limit).
    """

    slots: int = 8
    context: int | None = None
    threads: int | None = None
    cache: str | None = None
    repack: bool = True
    adapter_memory: int | None = None


class Engines(NamedTuple):
    """`base` answers and holds the modifiers; `draft` reads questions, None if the base reads them."""

    base: Engine
    draft: Engine | None


EngineFactory: TypeAlias = Callable[[BundleFiles, EngineOptions], Engines]
"""Opens the engines of a bundle; the cascade closes them."""


def llama_engines(files: BundleFiles, options: EngineOptions) -> Engines:
    """Open the bundle's own models. Raises `BundleError` for an unusable file."""
    bundle = files.bundle
    adapters = bundle.modifiers | ({ADAPTER: bundle.fewshot} if bundle.fewshot else {})
    with ExitStack() as opened:
        draft = _draft(files, options, opened)
        base = LlamaEngine(
            bundle.base,
            draft=draft,
            adapters={name: partial(files.file, path) if files.lazy else path for name, path in adapters.items()},
            head=bundle.head,
            base_sha256=bundle.base_fingerprint,
            **asdict(options),
        )
        opened.pop_all()
    return Engines(base, draft)


def remote_base(url: str, model: str) -> EngineFactory:
    """Factory whose base is `model` on a server with OpenAI's API; the bundle's draft runs locally.

    The server gives no hidden states, so no answer is accepted, and the bundle's modifiers are not used. Token ids and
    scores refer to the bundle's vocabulary. `url` ends in `/v1`.
    """

    def opened(files: BundleFiles, options: EngineOptions) -> Engines:
        with ExitStack() as open_engines:
            draft = _draft(files, options, open_engines)
            base = engine("remote")(url, model, tokenizer=files.bundle.base, workers=options.slots)
            open_engines.pop_all()
        return Engines(base, draft)

    return opened


def _draft(files: BundleFiles, options: EngineOptions, opened: ExitStack) -> LlamaEngine | None:
    """Open the bundle's draft, if there is one; `opened` closes it."""
    if not files.bundle.draft:
        return None
    draft = LlamaEngine(files.bundle.draft, lookup=False, **asdict(options))
    opened.callback(draft.close)
    return draft
