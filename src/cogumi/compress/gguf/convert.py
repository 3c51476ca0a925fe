"""Stage `convert`: the dequantized weights of a GGUF file as a model folder that can be trained (SPEC M2).

The folder keeps the fingerprint of the file, so that adapters trained on it belong to the file itself: a bundle ships
the file's own bytes, and nothing is quantized twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from cogumi.compress.gguf.gguf_file import MODEL
from cogumi.compress.gguf.gguf_header import read_header
from cogumi.compress.gguf.gguf_weights import FP32, write_folder
from cogumi.core.amounts import size
from cogumi.core.environment import total_memory
from cogumi.core.errors import ExportError
from cogumi.core.estimate import Cost, Estimate, Given
from cogumi.core.facts import ModelFacts
from cogumi.core.stage import Context
from cogumi.core.types import Artifact

VERSION = 1
KIND = "model"
INPUTS = {"gguf": "gguf"}


class Config(BaseModel):
    """No options."""

    model_config = ConfigDict(extra="forbid")


def estimate(config: Config, given: Given) -> Estimate:
    """The same model as a folder of fp32 weights."""
    model = given.find("gguf", ModelFacts)
    if model is None:
        return Estimate()
    count = model.shape.parameters
    return Estimate((model,), Cost("convert", shape=model.shape, parameters=count, output=FP32 * count))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`gguf` -> config.json, model.safetensors and the tokenizer files.

    Raises `ExportError` for a model that cannot be trained, or whose weights exceed the memory of this machine.
    """
    source = inputs["gguf"]
    header = read_header((source.path / MODEL).resolve())
    needed, memory = FP32 * header.shape.parameters, total_memory()
    if needed > memory:
        raise ExportError(
            f"{header.path} takes {size(needed)} as fp32 weights, this machine has {size(memory)} of memory; "
            "serve it without training, or use a smaller model"
        )
    vocabulary = write_folder(header, out, lambda done, total: context.progress(done, total, {}))
    return {
        "parameters": header.shape.parameters,
        "missing_bytes": vocabulary.missing_bytes,
        **{name: source.metrics[name] for name in ("base_fingerprint", "tokenizer_sha256")},
    }
