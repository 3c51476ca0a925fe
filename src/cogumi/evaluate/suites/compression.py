"""Suite `compression`: quality of every GGUF file type (SPEC D5).

The base of a run is exported as each type, with and without an importance matrix, and compared with torch in fp32 on
held-out questions with their reference answers. On the answers' tokens the suite measures how often both predict the
same token, and the perplexity.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cogumi.compress.calibration_rows import Draw
from cogumi.compress.gguf import importance
from cogumi.compress.gguf.export import export_model
from cogumi.compress.gguf.weights import IMPORTANCE
from cogumi.core.environment import usable_threads
from cogumi.core.errors import CogumiError
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Request
from cogumi.data.examples import read_examples, split_path
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import Engine, replies
from cogumi.engine.torch import TorchEngine
from cogumi.evaluate.suite import Figure, Findings, Task
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.batches import make_rows

TYPES = ("f32", "f16", "q8_0", "q5_k_m", "q5_0", "q4_k_m", "q4_0")
UNWEIGHED = ("f32", "f16", "q8_0")
"""Types on which an importance matrix has no effect."""
ROWS, CALIBRATION, SLOTS = 300, 512, 8
"""Held-out questions, training questions for the importance matrix, and concurrent requests."""


@dataclass(frozen=True, slots=True)
class Reading:
    """For every answer token: the most likely token, and the log-probability of the reference token."""

    likeliest: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(-float(np.mean(self.logprobs)))

    def agreement(self, other: Reading) -> float:
        """Share of positions with the same most likely token."""
        return float(np.mean(np.array(self.likeliest) == np.array(other.likeliest)))


def run(task: Task) -> Findings:
    """Measure the folder `base` of the run at `task.data`, by default of the run that contains the bundle."""
    folder = task.data or (task.bundle.parent if task.bundle else None)
    if folder is None or not (folder / "base").is_dir():
        raise CogumiError(
            "the suite 'compression' needs --data: the folder of a finished run, with its base and data (runs/tiny)"
        )
    base, examples = folder / "base", folder / "data"
    rows = make_rows(read_examples(split_path(examples, "heldout"))[:ROWS], HFTokenizer.load(base), 1 << 20)
    length = max(row.size for row in rows)
    torch.set_num_threads(usable_threads())
    with closing(TorchEngine(base)) as engine:
        exact = read_answers(engine, rows)
    figures = []
    with tempfile.TemporaryDirectory() as made:
        weighed = _importance(base, examples, Path(made), task.seed)
        kinds = [(type, matrix) for type in TYPES for matrix in (None, weighed) if not (matrix and type in UNWEIGHED)]
        for done, (type, matrix) in enumerate(kinds):
            path = Path(made) / "model.gguf"
            export_model(base, path, type, importance=matrix, threads=usable_threads())
            with closing(LlamaEngine(path, slots=SLOTS, context=length, lookup=False, cache="f16")) as engine:
                figures += _compared(type + (", importance" if matrix else ""), exact, read_answers(engine, rows), path)
            task.progress(done + 1, len(kinds), {})
    facts = {"answers": len(rows), "tokens": len(exact.logprobs), "perplexity of torch": exact.perplexity}
    return Findings(figures, facts)


def _compared(name: str, exact: Reading, found: Reading, path: Path) -> list[Figure]:
    size = f"{path.stat().st_size:,} bytes"
    return [
        Figure(f"token agreement, {name}", found.agreement(exact), ">= 0.95", note=size),
        Figure(f"perplexity over torch's, {name}", found.perplexity / exact.perplexity, "<= 1.02"),
    ]


def _importance(base: Path, examples: Path, out: Path, seed: int) -> Path:
    inputs = {"model": Artifact("model", base, ""), "examples": Artifact("examples", examples, "")}
    context = Context(seed, usable_threads(), out, lambda done, total, figures: None)
    importance.run(importance.Config(calibration=Draw(rows=CALIBRATION)), inputs, out, context)
    return out / IMPORTANCE


def read_answers(engine: Engine, rows: Sequence[Row]) -> Reading:
    """Predictions of an engine for the tokens of the rows' answers."""
    likeliest: list[int] = []
    logprobs: list[float] = []
    requests = [Request(prompt=row.ids, max_tokens=0, echo=True, logprobs=1) for row in rows]
    for row, reply in zip(rows, replies(engine, requests), strict=True):
        for token in reply.prompt[row.start - 1 :]:  # `reply.prompt` starts with the second token of the row
            likeliest.append(token.top[0][0])
            logprobs.append(token.logprob)
    return Reading(tuple(likeliest), tuple(logprobs))
