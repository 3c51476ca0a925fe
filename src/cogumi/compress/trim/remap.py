"""A model folder with fewer ids: all files that hold ids, and the tensors with a row per id (SPEC A11).

Ids occur in tokenizer.json, tokenizer_config.json, config.json and generation_config.json; a chat template names tokens
by their text. Kept ids are renumbered in their old order; rows of tensors are copied bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cogumi.compress.gguf.layout import read_json
from cogumi.compress.gguf.weights import INDEX, Weights
from cogumi.compress.trim.bpe import renumbering
from cogumi.compress.trim.trimmed_vocabulary import Vocabulary
from cogumi.core.errors import ArtifactError
from cogumi.core.files import write_json
from cogumi.models.folders import save_tensors
from cogumi.models.tokenization import TOKENIZER_FILES
from cogumi.models.tokenizer_settings import copy_templates

CONFIG, GENERATION = "config.json", "generation_config.json"
PER_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors with a row per id."""
_ID_FIELDS = ("_token_id", "suppress_tokens")
"""Suffixes of config fields that hold ids."""


@dataclass(frozen=True, slots=True)
class Model:
    """The parts of a model folder that depend on ids."""

    vocabulary: Vocabulary
    configs: Mapping[str, Mapping[str, Any]]
    weights: Weights

    @classmethod
    def load(cls, folder: Path) -> Model:
        """Read all files, of the weights only the headers.

        Raises `ArtifactError` if configs, weights and tokenizer do not match, `DataError` for a tokenizer that is not a
        byte-level BPE, `ExportError` for files that are missing or truncated.
        """
        vocabulary = Vocabulary.load(folder)
        names = [CONFIG, *(name for name in (GENERATION,) if (folder / name).exists())]
        model = cls(vocabulary, {name: read_json(folder / name) for name in names}, Weights.load(folder))
        model._check_rows(max(vocabulary.bpe.ids.values()))
        if lost := sorted(model.named - set(vocabulary.bpe.ids.values())):
            raise ArtifactError(f"a config of {folder} names the id {lost[0]}, which the tokenizer has no token for")
        return model

    @property
    def folder(self) -> Path:
        """The model folder."""
        return self.vocabulary.folder

    @property
    def context(self) -> int:
        """Context length in tokens."""
        return int(self.configs[CONFIG]["max_position_embeddings"])

    @property
    def bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(path.stat().st_size for path in self.weights.files)

    @property
    def named(self) -> set[int]:
        """The ids that occur in the configs."""
        return {i for config in self.configs.values() for value in _id_fields(config).values() for i in _ids(value)}

    def _check_rows(self, highest: int) -> None:
        size, shapes = self.configs[CONFIG].get("vocab_size"), self.weights.shapes
        if PER_TOKEN[0] not in shapes or not isinstance(size, int):
            raise ArtifactError(f"{self.folder} has no {PER_TOKEN[0]} or no vocab_size; supported are Llama and Qwen2")
        for name in PER_TOKEN:
            rows = shapes.get(name, (size,))[0]
            if rows != size:
                raise ArtifactError(f"{self.folder}: {name} has {rows} rows, config.json says vocab_size {size}")
        if highest >= size:
            raise ArtifactError(
                f"{self.folder}: the tokenizer's highest id is {highest}, but the model has {size} rows; "
                "use the tokenizer with which it was trained"
            )

    def write(self, kept: Collection[int], out: Path) -> None:
        """Write configs and weights with the rows of these ids only, with the same dtypes and file names."""
        new = renumbering(kept)
        rows = torch.tensor(sorted(new))
        total = 0
        for path in self.weights.files:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tensors |= {name: tensors[name][rows] for name in PER_TOKEN if name in tensors}
            save_tensors(tensors, out / path.name, {"format": "pt"})
            total += sum(tensor.nbytes for tensor in tensors.values())
        for name, config in self.configs.items():
            write_json(out / name, with_ids(config, new))
        if len(self.weights.files) > 1:
            write_json(out / INDEX, read_json(self.folder / INDEX) | {"metadata": {"total_size": total}})
        copy_templates(self.folder, out)

    def copy(self, out: Path) -> None:
        """Copy the folder without changes."""
        names = (*self.configs, *TOKENIZER_FILES, INDEX, *(path.name for path in self.weights.files))
        _copy(self.folder, names, out)
        copy_templates(self.folder, out)


def _copy(folder: Path, names: Iterable[str], out: Path) -> None:
    for name in names:
        if (folder / name).exists():
            shutil.copyfile(folder / name, out / name)


def _id_fields(config: Mapping[str, Any]) -> dict[str, int | list[int]]:
    return {name: value for name, value in config.items() if name.endswith(_ID_FIELDS) and value is not None}


def _ids(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]


def with_ids(config: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A config.json or generation_config.json with its ids and, if present, its vocabulary size replaced."""
    found = dict(config)
    for name, value in _id_fields(config).items():
        found[name] = [new[i] for i in value] if isinstance(value, list) else new[value]
    return found | ({"vocab_size": len(new)} if "vocab_size" in config else {})
