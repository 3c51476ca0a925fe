"""Pico models as Hugging Face folders and GGUF files, made once per test session, and helpers to query them."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cogumi.compress.gguf.export import export_adapter, export_model
from cogumi.core.types import Message
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply
from support.pico import make_adapter, make_model

ROOT = TemporaryDirectory(prefix="cogumi-pico-")
"""Is removed when the process ends."""
CHAT = (Message("system", "Be short."), Message("user", "What is 48 plus 57?"))


@dataclass(frozen=True)
class Pico:
    """Folders for torch, files for llama.cpp. The draft is the base with a little noise; `other` matches neither."""

    base: Path
    adapter: Path
    base_f32: Path
    base_q8: Path
    draft_q8: Path
    other_q8: Path
    adapter_gguf: Path
    other_adapter_gguf: Path


@cache
def pico() -> Pico:
    """Make all models; takes about a second."""
    root = Path(ROOT.name)
    base = make_model(root / "base")
    draft = make_model(root / "draft", perturb=0.02)
    other = make_model(root / "other", hidden=128, vocab=400, seed=5)
    adapter = make_adapter(root / "adapter", base, rank=6)  # not divisible by 4: see Model.load_adapter
    other_adapter = make_adapter(root / "other-adapter", other)
    made = Pico(
        base=base,
        adapter=adapter,
        base_f32=root / "base-f32.gguf",
        base_q8=root / "base.gguf",
        draft_q8=root / "draft.gguf",
        other_q8=root / "other.gguf",
        adapter_gguf=root / "adapter.gguf",
        other_adapter_gguf=root / "other-adapter.gguf",
    )
    export_model(base, made.base_f32, "f32")
    for folder, file in ((base, made.base_q8), (draft, made.draft_q8), (other, made.other_q8)):
        export_model(folder, file, "q8_0")
    export_adapter(adapter, base, made.adapter_gguf)
    export_adapter(other_adapter, other, made.other_adapter_gguf)
    return made


def opened(**options):
    """A llama engine with a draft, an adapter and four slots."""
    files = pico()
    given = {"threads": 1, "draft": files.draft_q8, "adapters": {"a": files.adapter_gguf}, "slots": 4}
    return LlamaEngine(files.base_q8, **given | options)


def ids(n, seed=0):
    return tuple(np.random.default_rng(seed).integers(5, 512, n).tolist())


def ask(engine, request):
    return final_reply(engine.generate(request))


def plain(reply):
    """The tokens without the fields that only speculation sets."""
    return [replace(token, draft_agreed=None) for token in reply.tokens]
