"""Graded answers of a model to questions on disk, and what the model read in the questions.

`responses.jsonl` has one JSON object per answer; `readings.safetensors` the model's hidden states of the questions, in
the same order, as float32 rows: `last` and `mean` [n, width] (see `core.types.Reading`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cogumi.core.errors import ArtifactError
from cogumi.core.files import write_text

FILE = "responses.jsonl"
READINGS = "readings.safetensors"


@dataclass(frozen=True, slots=True)
class Response:
    """One graded answer; `nats` over its `tokens` generated tokens (end token included)."""

    id: str
    output: str
    correct: bool
    reason: str
    nats: float
    tokens: int
    finished: bool

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats / max(self.tokens, 1))


@dataclass(frozen=True, slots=True, eq=False)
class Readings:
    """Hidden states of n questions after the final norm: of the last position and their mean, each [n, width]."""

    last: NDArray[np.float32]
    mean: NDArray[np.float32]

    @classmethod
    def joined(cls, parts: Iterable[Readings]) -> Readings:
        """The rows of all parts, in order."""
        kept = list(parts)
        return cls(np.concatenate([p.last for p in kept]), np.concatenate([p.mean for p in kept]))


def to_lines(rows: Iterable[Response]) -> str:
    """Responses as JSON lines."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def from_lines(text: str) -> list[Response]:
    """Inverse of `to_lines`; ValueError, TypeError or KeyError for an invalid line."""
    return [Response(**json.loads(line)) for line in text.split("\n") if line]


def write_responses(artifact: Path, rows: Iterable[Response]) -> None:
    """Write the responses of an artifact, atomically."""
    write_text(artifact / FILE, to_lines(rows))


def read_responses(artifact: Path) -> dict[str, Response]:
    """Responses by example id, in the order of the questions."""
    try:
        return {row.id: row for row in from_lines((artifact / FILE).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{artifact / FILE} is not a file of responses ({error}); build the `respond` step again"
        ) from error


def write_readings(path: Path, readings: Readings, lines: str = "") -> None:
    """Write readings atomically; `lines` are kept as metadata (see `read_readings`)."""
    from safetensors.numpy import save_file

    partial = path.with_name(path.name + ".partial")
    save_file({"last": readings.last, "mean": readings.mean}, partial, {"responses": lines})
    partial.replace(path)


def read_readings(path: Path) -> tuple[Readings, str]:
    """Readings and the lines stored with them. Raises `ArtifactError` for a missing or damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return Readings(file.get_tensor("last"), file.get_tensor("mean")), file.metadata()["responses"]
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} holds no readings ({error}); build the `respond` step again") from error
