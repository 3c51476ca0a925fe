"""Planned GGUF files: those that stage `gguf` will write, from shapes alone (SPEC D1).

The records hold the parameters of the files. Sizes are computed on first use, because they need llama.cpp's quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cogumi.core.errors import ExportError
from cogumi.core.facts import ModelFacts
from cogumi.core.shapes import ModelShape

if TYPE_CHECKING:
    from cogumi.compress.gguf.file_sizes import GgufFile
    from cogumi.compress.gguf.gguf_header import Header

TYPE = "q4_k_m"
"""The default type of a model."""


@dataclass(frozen=True)
class Weights:
    """A model as a GGUF file; `vocabulary` is the size of its tokenizer's keys in bytes.

    `type`, `types` and `importance` are settings of stage `gguf`.
    """

    shape: ModelShape
    type: str
    vocabulary: int
    types: tuple[tuple[str, str], ...] = ()
    importance: bool = False

    @cached_property
    def file(self) -> GgufFile:
        """The file with its sizes."""
        from cogumi.compress.gguf.file_sizes import model_file

        return model_file(self.shape, self.type, self.vocabulary, dict(self.types), self.importance)

    def with_ids(self, ids: int) -> Weights:
        """The same with a vocabulary of `ids`, with the same bytes per id."""
        keys = self.vocabulary * ids // self.shape.vocabulary
        return replace(self, shape=replace(self.shape, vocabulary=ids), vocabulary=keys)


@dataclass(frozen=True)
class Adapter:
    """A LoRA as a GGUF file: ranks by target, tensor type, and its number of layers (None: all)."""

    ranks: Mapping[str, int]
    type: str = "f32"
    layers: int | None = None

    def file(self, shape: ModelShape) -> GgufFile:
        """The file with its sizes, for a base of that shape."""
        from cogumi.compress.gguf.file_sizes import adapter_file

        return adapter_file(shape, self.ranks, self.type, self.layers)

    def reduced(self, rank: int, type: str) -> Adapter:
        """The same with another rank and type, unless that is larger."""
        from cogumi.compress.gguf.file_sizes import bits

        smaller = replace(self, ranks=dict.fromkeys(self.ranks, rank), type=type)
        before, after = (sum(one.ranks.values()) * bits(one.type) for one in (self, smaller))
        return smaller if after < before else self


def planned_weights(model: ModelFacts, type: str = TYPE) -> Weights:
    """The file of a model; the vocabulary of a folder is measured, any other is estimated from its family."""
    from cogumi.compress.gguf.file_sizes import typical_vocabulary, vocabulary_bytes
    from cogumi.compress.gguf.gguf_vocabulary import Vocabulary
    from cogumi.compress.gguf.layout import Llama

    shape, folder = model.shape, Path(model.folder)
    if not model.folder:
        return Weights(shape, type, typical_vocabulary("own" if model.own else shape.kind, shape.vocabulary))
    llama = Llama.load(folder)
    if (folder / "tokenizer.json").is_file():
        keys = vocabulary_bytes(Vocabulary.load(folder), llama.vocabulary)
    else:
        keys = typical_vocabulary(llama.kind, llama.vocabulary)
    planned = {figure.name: getattr(shape, figure.name) for figure in fields(ModelShape)}
    return replace(Weights(llama, type, keys).with_ids(shape.vocabulary), shape=replace(llama, **planned))


def known_weights(shape: ModelShape) -> Weights:
    """The file of a model of known shape, with a vocabulary typical of its family."""
    return planned_weights(ModelFacts(shape, ""))


def weights_of_folder(model: ModelFacts) -> Weights:
    """The file of a model folder, with the types of its matrices if stage `awq` or `gptq` wrote them to the folder."""
    from cogumi.compress.gguf.layout import read_json
    from cogumi.compress.gguf.type_mixture import OVERRIDES

    path, weights = Path(model.folder, OVERRIDES), planned_weights(model)
    return replace(weights, types=tuple(read_json(path).items())) if model.folder and path.exists() else weights


def weights_of_gguf(path: Path) -> Weights:
    """The plan that corresponds to an existing GGUF file."""
    from cogumi.compress.gguf.gguf_header import read_header

    return weights_of_header(read_header(path))


def weights_of_header(header: Header) -> Weights:
    """The same for a file whose header was read; the matrices have the types that they have there."""
    planned = Weights(header.layout, header.type, header.key_bytes, importance=header.type.startswith("iq"))
    try:
        planned.file  # noqa: B018
    except ExportError:  # a mixture without a name, or one that this llama.cpp cannot make
        planned = Weights(header.layout, "f32", header.key_bytes)
    chosen = {tensor.name: tensor.type for tensor in planned.file.tensors if len(tensor.shape) == 2}
    stored = {name: header.tensors[name].tensor_type for name in chosen.keys() & header.tensors.keys()}
    other = sorted((name, type.name.lower()) for name, type in stored.items() if type != chosen[name])
    return replace(planned, types=tuple(other))
