"""The context that a step's engines need: as long as its longest question and answer, before anything is generated.

A recipe's plan estimates tokens from bytes (`core.facts.BYTES_PER_TOKEN`), so that a row that it accepts may have up
to that many times more. Such a row is still read, beyond the context that the model was trained for: badly, but the
build ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from cogumi.core.errors import DataError
from cogumi.core.facts import BYTES_PER_TOKEN
from cogumi.core.types import Example, Request
from cogumi.engine.llama.binding.model import Model

STEP = 64
"""Contexts are multiples of this many tokens."""
LARGEST = 1 << 20
"""The largest context of a model whose file names none."""


def context_for(models: Sequence[Path], examples: Iterable[Example], max_tokens: int, given: int | None) -> int:
    """The context for questions and answers of up to `max_tokens` tokens to GGUF `models`.

    `given` (a config's `context`) replaces it. Raises `DataError` with the longest row if that does not fit, or exceeds
    the context of a model by more than a plan can miss.
    """
    vocabularies = [Model(path, vocabulary_only=True) for path in models]
    trained = [model.trained_context for model in vocabularies if model.trained_context]
    most = given or int(BYTES_PER_TOKEN * min(trained, default=LARGEST))
    longest, of = 0, ""
    for example in examples:
        request = Request(messages=example.messages)
        tokens = max(len(model.tokenizer.render(request)) for model in vocabularies)
        if tokens > longest:
            longest, of = tokens, example.source or example.id
    if longest + max_tokens > most:
        limit = f"`context: {most}`" if given else f"the model's context of {min(trained, default=LARGEST)}"
        ways = ["shorten that row"] + ["raise `context`"] * bool(given) + ["lower `max_tokens`"] * bool(max_tokens)
        answer = f" and an answer up to {max_tokens} (`max_tokens`)" if max_tokens else ""
        raise DataError(f"the question {of} has {longest} tokens{answer}, more than {limit}: {' or '.join(ways)}")
    return given or -(-(longest + max_tokens) // STEP) * STEP
