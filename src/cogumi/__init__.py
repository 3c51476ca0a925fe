"""Small local chat systems with calibrated confidence: draft, base and modifiers behind one cascade.

    import cogumi

    with cogumi.open("runs/smollm2/bundle") as bot:
        reply = bot.ask("What is the capital of France?")
        print(reply.text, reply.p_correct, reply.accepted, reply.tier)

The names in `__all__` are the public interface; `docs/python.md` explains them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cogumi.core.errors import (
    ArtifactError,
    BundleError,
    BusyError,
    CogumiError,
    ContextError,
    DataError,
    ExportError,
    GateError,
    PackageError,
    RecipeError,
    RequestError,
    StateError,
    TrainingError,
)
from cogumi.core.types import Decision, Message, Reply, Request, Revision, Score, Token, Usage
from cogumi.core.version import __version__

if TYPE_CHECKING:
    from cogumi.cascade.asking import Conversation, Stream
    from cogumi.cascade.cascade import Cascade
    from cogumi.cascade.opening import open_cascade as open

__all__ = [
    "ArtifactError",
    "BundleError",
    "BusyError",
    "Cascade",
    "CogumiError",
    "ContextError",
    "Conversation",
    "DataError",
    "Decision",
    "ExportError",
    "GateError",
    "Message",
    "PackageError",
    "RecipeError",
    "Reply",
    "Request",
    "RequestError",
    "Revision",
    "Score",
    "StateError",
    "Stream",
    "Token",
    "TrainingError",
    "Usage",
    "__version__",
    "open",
]

_LATE = {
    "Cascade": ("cogumi.cascade.cascade", "Cascade"),
    "Conversation": ("cogumi.cascade.asking", "Conversation"),
    "Stream": ("cogumi.cascade.asking", "Stream"),
    "open": ("cogumi.cascade.opening", "open_cascade"),
}
"""Names whose modules load llama.cpp: they are imported when first used, so that `import cogumi` stays fast."""


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'cogumi' has no attribute '{name}'")
    module, attribute = _LATE[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
