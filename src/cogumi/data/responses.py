"""Graded answers of a model to training questions on disk: one JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from cogumi.core.errors import ArtifactError
from cogumi.core.files import write_text

FILE = "responses.jsonl"


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


def write_responses(artifact: Path, rows: Iterable[Response]) -> None:
    """Write the responses of an artifact, atomically."""
    write_text(artifact / FILE, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))


def read_responses(artifact: Path) -> dict[str, Response]:
    """Responses by example id."""
    try:
        lines = list(filter(None, (artifact / FILE).read_text(encoding="utf-8").split("\n")))
        return {row["id"]: Response(**row) for row in map(json.loads, lines)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{artifact / FILE} is not a file of responses ({error}); build the `respond` step again"
        ) from error
