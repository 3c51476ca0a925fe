"""Opens the models that graders ask, for commands (SPEC B3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cogumi.cascade.opening import open_cascade
from cogumi.core.errors import CogumiError
from cogumi.core.registry import engine
from cogumi.grading.model_graders import Models


def _embed(texts: Sequence[str]) -> NDArray[np.float32]:
    from cogumi.evaluate.suites.minilm import cached_embedder  # needs torch, once

    return cached_embedder().embed(texts)


@contextmanager
def grading_models(judge: str | None, judge_model: str | None) -> Iterator[Models]:
    """A sentence encoder, loaded when a check needs it, and the judge: whatever opens as a bundle, or `judge_model` on
    the server with the address `judge`. Raises `CogumiError` if only one of these is given.
    """
    served = judge is not None and judge.startswith(("http://", "https://"))
    if served != (judge_model is not None):
        raise CogumiError("--judge-model names a model on the server that --judge gives the address of: give both")
    if judge is None:
        yield Models(_embed)
        return
    with closing(engine("remote")(judge, judge_model) if served else open_cascade(Path(judge))) as asked:
        yield Models(_embed, asked)
