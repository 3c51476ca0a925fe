"""Facts about a planned artifact: records produced by one stage's `estimate` and used by another's (SPEC D1).

A stage may produce records of any frozen type; this module has those shared by several packages.
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
"""Conservative: the tiny recipe's vocabulary of 1,024 has 3.2 on its own data, larger ones more on English and code."""
OWN_TEMPLATE, TEMPLATE = 6, 40
"""Tokens added to a question by the chat template of stage `tokenizer`, and the maximum for known models."""
FP32_PACKED = 0.93
"""Compression ratio of zstd (level 10) on normally distributed fp32 weights: packed size by original size."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Lengths in tokens of a model's `count` training rows: longest row, longest answer, mean row, longest question.

    `where` is the place of the longest row; empty if unknown.
    """

    count: int
    longest: int
    answer: int
    mean: float
    question: int = 0
    where: str = ""


@dataclass(frozen=True, slots=True)
class RowFacts:
    """Lengths in bytes of training rows; `longest` and `mean` include question and answer.

    `question` is the longest question, `where` the place of the longest row (`facts.jsonl:17`; empty if unknown).
    """

    count: int
    longest: int
    answer: int
    mean: float
    question: int = 0
    where: str = ""

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]], count: int, places: Sequence[str] = ()) -> RowFacts:
        """Facts about `count` rows from a sample of byte lengths (question, answer), and the `places` of these rows."""
        whole = [question + answer for question, answer in pairs]
        where = places[whole.index(max(whole))] if places else ""
        answer, question = max(answer for _, answer in pairs), max(question for question, _ in pairs)
        return cls(count, max(whole), answer, sum(whole) / len(whole), question, where)

    def rows(self, template: int, length: int | None = None) -> Rows:
        """Lengths in tokens, with `template` tokens added per row; `length` replaces the estimated longest row."""
        longest = length or template + math.ceil(self.longest / BYTES_PER_TOKEN)
        answer = min(longest, 1 + math.ceil(self.answer / BYTES_PER_TOKEN))
        question = min(longest, template + math.ceil(self.question / BYTES_PER_TOKEN))
        mean = min(longest, template + self.mean / BYTES_PER_TOKEN)
        return Rows(self.count, longest, answer, mean, question, self.where)


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """A tokenizer: `name` is equal for equal vocabularies, `vocabulary` counts ids, `own` if the recipe trains it."""

    name: str
    vocabulary: int
    own: bool = True


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model: `tokenizer` is equal for equal vocabularies; `own` if the recipe trains the tokenizer, `bytewise` if it
    is byte-level. `folder` contains its weights, or is "" if they do not exist yet.
    """

    shape: ModelShape
    tokenizer: str
    own: bool = False
    bytewise: bool = True
    folder: str = ""

    @property
    def template(self) -> int:
        """Maximum number of tokens that the chat template adds to a row."""
        return OWN_TEMPLATE if self.own else TEMPLATE


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """A LoRA: its rank by target, the rank of its part on the output head (0: none), its layers (None: all)."""

    ranks: Mapping[str, int]
    head: int = 0
    layers: int | None = None


@dataclass(frozen=True, slots=True)
class FileSize:
    """Size of a file in bytes, and its zstd compression ratio."""

    bytes: int
    packed: float = FP32_PACKED


@dataclass(frozen=True, slots=True)
class FileFacts:
    """Files that are copied into a bundle unchanged, by their names in it."""

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
