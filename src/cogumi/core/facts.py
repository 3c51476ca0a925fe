"""What is known of an artifact before it is there: records that one stage's `estimate` leaves and another's reads.

A stage may leave records of any frozen type; those that stages of several packages share are here (SPEC D1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogumi.core.errors import ArtifactError
from cogumi.core.files import sha256
from cogumi.core.shapes import ModelShape, find_shape, known

BYTES_PER_TOKEN = 3.0
"""Cautious: the tiny recipe's vocabulary of 1,024 has 3.2 on its own data, larger ones more on English and code."""
OWN_TEMPLATE, TEMPLATE = 6, 40
"""Tokens that the template of stage `tokenizer` adds to a question, and the most that those of known models do."""
FP32_PACKED = 0.93
"""Share that zstd (level 10) leaves of fp32 weights drawn from a normal distribution."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens of a model's training rows: the longest whole row, the longest answer, a row on average. `count` rows."""

    count: int
    longest: int
    answer: int
    mean: float


@dataclass(frozen=True, slots=True)
class RowFacts:
    """Bytes of training rows, `longest` and `mean` of question and answer together."""

    count: int
    longest: int
    answer: int
    mean: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]], count: int) -> RowFacts:
        """From a sample of `count` rows: bytes of (question, answer) of each."""
        whole = [question + answer for question, answer in pairs]
        return cls(count, max(whole), max(answer for _, answer in pairs), sum(whole) / len(whole))

    def rows(self, template: int, length: int | None = None) -> Rows:
        """The same in tokens, with the `template` tokens of each row; `length` replaces the estimate of the longest."""
        longest = length or template + math.ceil(self.longest / BYTES_PER_TOKEN)
        answer = min(longest, 1 + math.ceil(self.answer / BYTES_PER_TOKEN))
        return Rows(self.count, longest, answer, min(longest, template + self.mean / BYTES_PER_TOKEN))


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """A tokenizer: `name` is equal for equal vocabularies, `vocabulary` counts ids, `own` if the recipe trains it."""

    name: str
    vocabulary: int
    own: bool = True


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model: `tokenizer` is equal for equal vocabularies; `own` if the recipe trains that, `bytewise` if it works
    on bytes. `folder` is where its weights lie, or "" if they do not exist yet.
    """

    shape: ModelShape
    tokenizer: str
    own: bool = False
    bytewise: bool = True
    folder: str = ""

    @property
    def template(self) -> int:
        """The most tokens that its chat template adds to a row."""
        return OWN_TEMPLATE if self.own else TEMPLATE


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """A LoRA: its rank by target, and the rank of its part on the output head (0: none)."""

    ranks: Mapping[str, int]
    head: int = 0


@dataclass(frozen=True, slots=True)
class FileSize:
    """Bytes of a file, and the share of them that zstd leaves."""

    bytes: int
    packed: float = FP32_PACKED


@dataclass(frozen=True, slots=True)
class FileFacts:
    """Files that a bundle takes over as they are, by their names there."""

    sizes: Mapping[str, FileSize]


def model_at(name: str, root: Path) -> ModelFacts:
    """The model of a folder (relative paths start at `root`) or of a Hub id of known shape; else `ArtifactError`."""
    shape, path = find_shape(name, root), root / name / "tokenizer.json"
    if not (root / name).is_dir():
        return ModelFacts(shape, str(known(name)).split("-")[0])
    if not path.is_file():
        raise ArtifactError(f"{path.parent} has no tokenizer.json; give a full model folder")
    document = json.loads(path.read_text("utf-8"))
    around = json.dumps([document.get("pre_tokenizer"), document.get("decoder")])
    return ModelFacts(shape, f"{name} ({sha256(path)[:8]})", bytewise="ByteLevel" in around, folder=str(root / name))
