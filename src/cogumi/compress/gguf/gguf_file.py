"""Stage `gguf_file`: the GGUF file that a person has, as the base of a bundle, where it lies (SPEC M1, M2).

The artifact holds a link to the file. Its fingerprint depends on the file's content and not on its place: a file that
was moved changes nothing, a file that was changed is a new base. With a `type`, it holds a new file of that type.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from cogumi.compress.gguf.gguf_header import Header, read_header
from cogumi.compress.gguf.gguf_tokenizer import read_vocabulary, tokenizer_sha256
from cogumi.compress.gguf.planned_files import Weights, weights_of_header
from cogumi.compress.gguf.requantize import requantize, requantized_types
from cogumi.compress.gguf.type_mixture import check_type
from cogumi.core.environment import beyond_memory
from cogumi.core.errors import ExportError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import ModelFacts
from cogumi.core.files import sha256
from cogumi.core.model_files import GGUF, locate_model
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.core.weight_files import check_weight_files
from cogumi.engine.llama.binding.model import Model

VERSION = 1
KIND = "gguf"
LIGHT = True
INPUTS: dict[str, str] = {}
MODEL = "model.gguf"
"""The file of an artifact of this kind."""


class Config(BaseModel):
    """`model` is a short name such as smollm2, or the path of a GGUF file; `copy_file`: a copy instead of a link.

    `type`, in llama.cpp's names: the file is requantized to it (`cogumi plan MODEL --types` measures what that costs);
    None: it stays as it is, byte for byte.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    model: str
    copy_file: bool = False
    type: str | None = None

    @field_validator("type")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                check_type(value)
        except ExportError as error:
            raise ValueError(str(error)) from None
        return value


@dataclass(frozen=True, slots=True)
class Untrainable:
    """A planned file that serves, but whose weights cannot be trained for a `reason`."""

    reason: str


def open_model(name: str, root: Path) -> Header:
    """The header of the GGUF file that `name` stands for.

    Raises `ExportError` if it is a folder or no usable file, or larger than memory; `BundleError` if llama.cpp has no
    such architecture.
    """
    path = locate_model(name, root).resolve()
    if path.is_dir():
        check_weight_files(path)
        raise ExportError(f"{name} is a folder, not a {GGUF} file; make one of it: cogumi convert {name} model.gguf")
    if excess := beyond_memory(path.stat().st_size):
        raise ExportError(f"{path} {excess}; take a smaller model, or a type of fewer bits")
    header = read_header(path)
    Model(path, vocabulary_only=True)
    return header


def identity(config: Config, root: Path) -> Any:
    """The hash of the file, whose header is checked, and its new type, which it must be able to have."""
    header = open_model(config.model, root)
    found = {"sha256": sha256(header.path), "copy_file": config.copy_file}
    if config.type is None:
        return found
    requantized_types(header, config.type)
    return found | {"type": config.type}


def estimate(config: Config, given: Given) -> Estimate:
    """The file and, if it can be trained, its model; from the header alone."""
    header = open_model(config.model, given.root)
    try:
        shape = header.shape
        read_vocabulary(header)
    except ExportError as error:
        return Estimate((Untrainable(str(error)),), notes=(str(error),))
    model = ModelFacts(shape, tokenizer_sha256(header))
    if config.type is not None:
        return Estimate((model, Weights(shape, config.type, header.key_bytes)))
    return Estimate((model, weights_of_header(header)))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """The file -> model.gguf, a link, a copy or a new file; the metrics are what that file says about its model."""
    source, path = open_model(config.model, context.root), out / MODEL
    if config.type is not None:
        requantize(source, path, config.type, context.threads)
    elif config.copy_file:
        shutil.copyfile(source.path, path)
    else:
        path.symlink_to(source.path)
    header = read_header(path)
    figures = {
        "bytes": path.stat().st_size,
        "type": header.type,
        "architecture": header.architecture,
        "parameters": header.parameters,
        "context": header.context,
        "about": header.about,
        "base_fingerprint": sha256(path),
        "tokenizer_sha256": tokenizer_sha256(header),
    }
    if config.type is not None:
        figures["requantized_from"] = {"type": source.type, "sha256": sha256(source.path)}
    return figures
