"""GGUF files before they are there: what stage `gguf` will write, from shapes alone (SPEC D1).

The records hold what is asked for; counting bytes asks llama.cpp's quantizer, so it waits until somebody wants them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cogumi.core.facts import ModelFacts
from cogumi.core.shapes import ModelShape

if TYPE_CHECKING:
    from cogumi.compress.gguf.file_sizes import GgufFile

TYPE = "q4_k_m"
"""The type of a model that no recipe asks for in another."""


@dataclass(frozen=True)
class Weights:
    """A model as a GGUF file; `vocabulary` bytes are those of its tokenizer's keys.

    `type`, `types` and `importance` are what stage `gguf` is told.
    """

    shape: ModelShape
    type: str
    vocabulary: int
    types: tuple[tuple[str, str], ...] = ()
    importance: bool = False

    @cached_property
    def file(self) -> GgufFile:
        """Its file."""
        from cogumi.compress.gguf.file_sizes import model_file

        return model_file(self.shape, self.type, self.vocabulary, dict(self.types), self.importance)

    def with_ids(self, ids: int) -> Weights:
        """The same with a vocabulary of `ids`, at as many bytes an id."""
        keys = self.vocabulary * ids // self.shape.vocabulary
        return replace(self, shape=replace(self.shape, vocabulary=ids), vocabulary=keys)


@dataclass(frozen=True)
class Adapter:
    """A LoRA as a GGUF file: its ranks by target, and the type it is written in."""

    ranks: Mapping[str, int]
    type: str = "f32"

    def file(self, shape: ModelShape) -> GgufFile:
        """Its file, on a base of that shape."""
        from cogumi.compress.gguf.file_sizes import adapter_file

        return adapter_file(shape, self.ranks, self.type)

    def reduced(self, rank: int, type: str) -> Adapter:
        """The same at another rank and type, unless that has more bits."""
        from cogumi.compress.gguf.file_sizes import bits

        smaller = Adapter(dict.fromkeys(self.ranks, rank), type)
        before, after = (sum(one.ranks.values()) * bits(one.type) for one in (self, smaller))
        return smaller if after < before else self


def planned_weights(model: ModelFacts, type: str = TYPE) -> Weights:
    """The file of a model; a folder's own vocabulary is counted, any other estimated from its family's."""
    from cogumi.compress.gguf.file_sizes import typical_vocabulary, vocabulary_bytes
    from cogumi.compress.gguf.gguf_vocabulary import Vocabulary
    from cogumi.compress.gguf.layout import Llama

    shape, folder = model.shape, Path(model.folder)
    if not model.folder:
        return Weights(shape, type, typical_vocabulary("own" if model.own else shape.kind, shape.vocabulary))
    there = Llama.load(folder)
    if (folder / "tokenizer.json").is_file():
        keys = vocabulary_bytes(Vocabulary.load(folder), there.vocabulary)
    else:
        keys = typical_vocabulary(there.kind, there.vocabulary)
    left = {figure.name: getattr(shape, figure.name) for figure in fields(ModelShape)}
    return replace(Weights(there, type, keys).with_ids(shape.vocabulary), shape=replace(there, **left))


def known_weights(shape: ModelShape) -> Weights:
    """The file of a model of known shape, with a vocabulary like that of its family."""
    return planned_weights(ModelFacts(shape, ""))


def weights_of_folder(model: ModelFacts) -> Weights:
    """The file of a model folder, with the types of its matrices where stage `awq` or `gptq` left them beside it."""
    from cogumi.compress.gguf.layout import read_json
    from cogumi.compress.gguf.type_mixture import OVERRIDES

    path, weights = Path(model.folder, OVERRIDES), planned_weights(model)
    return replace(weights, types=tuple(read_json(path).items())) if model.folder and path.exists() else weights


def weights_of_gguf(path: Path) -> Weights:
    """The model of a GGUF file, as it would be planned from its shape and type."""
    from cogumi.compress.gguf.file_sizes import read_model

    shape, type, vocabulary = read_model(path)
    return Weights(shape, type, vocabulary)
