"""Stage `convert`: the dequantized weights of a GGUF file as a model folder that can be trained (SPEC M2).

`cogumi convert` does the same, and the reverse, without a build.

The folder keeps the fingerprint of the file, so that adapters trained on it belong to the file itself: a bundle ships
the file's own bytes, and nothing is quantized twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from cogumi.bundle.packed import staged
from cogumi.compress.gguf.export import Config as Export
from cogumi.compress.gguf.export import export_model
from cogumi.compress.gguf.gguf_file import MODEL, Untrainable
from cogumi.compress.gguf.gguf_header import read_header
from cogumi.compress.gguf.gguf_vocabulary import Vocabulary
from cogumi.compress.gguf.gguf_weights import FP32, write_folder
from cogumi.core.amounts import size
from cogumi.core.environment import total_memory, usable_threads
from cogumi.core.errors import ExportError
from cogumi.core.estimate import Cost, Estimate, Given
from cogumi.core.facts import ModelFacts
from cogumi.core.files import sha256
from cogumi.core.model_files import GGUF
from cogumi.core.stage import Context
from cogumi.core.types import Artifact

VERSION = 1
KIND = "model"
LIGHT = True
INPUTS = {"gguf": "gguf"}


class Config(BaseModel):
    """No options."""

    model_config = ConfigDict(extra="forbid")


def estimate(config: Config, given: Given) -> Estimate:
    """The same model as a folder of fp32 weights."""
    if found := given.find("gguf", Untrainable):
        return Estimate(problems=(found.reason,))
    model = given.find("gguf", ModelFacts)
    if model is None:
        return Estimate()
    count = model.shape.parameters
    cost = Cost("convert", shape=model.shape, parameters=count, output=FP32 * count)
    return Estimate((model,), cost, problems=tuple(_memory_problems("the model", count)))


def _memory_problems(model: object, parameters: int) -> Iterator[str]:
    """A line if the fp32 weights, which every training step loads, exceed the memory of this machine."""
    needed, memory = FP32 * parameters, total_memory()
    if needed > memory:
        yield (
            f"{model} takes {size(needed)} as fp32 weights, this machine has {size(memory)} of memory; "
            "serve it without training, or use a smaller model"
        )


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`gguf` -> config.json, model.safetensors and the tokenizer files.

    Raises `ExportError` for a model that cannot be trained, or whose weights exceed the memory of this machine.
    """
    source = inputs["gguf"]
    header = read_header((source.path / MODEL).resolve())
    for problem in _memory_problems(header.path, header.shape.parameters):
        raise ExportError(problem)
    vocabulary = write_folder(header, out, lambda done, total: context.progress(done, total, {}))
    return {
        "parameters": header.shape.parameters,
        "missing_bytes": vocabulary.missing_bytes,
        **{name: source.metrics[name] for name in ("base_fingerprint", "tokenizer_sha256")},
    }


def convert_model(model: Path, out: Path, type: str | None, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """A GGUF file -> the new folder `out`, or a model folder -> the new GGUF file `out` of `type` (None: the default).

    Returns `{out, type, parameters, bytes, missing_bytes, sha256}`, the last one of the GGUF file. Raises `ExportError`
    for a model without a counterpart of the other form, and if `out` exists.
    """
    if model.is_dir():
        return _to_file(model, out, type or Export().type, progress)
    if type is not None or out.suffix == GGUF:
        raise ExportError(
            f"{model} is a GGUF file and becomes a folder of fp32 weights, whose path has no {GGUF}; "
            "convert that folder to get a file of another type"
        )
    with staged(out, model) as part:
        header = read_header(model)
        vocabulary = write_folder(header, part, progress)
    written = sum(path.stat().st_size for path in out.iterdir())
    return _figures(out, "f32", header.parameters, written, vocabulary, sha256(model))


def _to_file(folder: Path, out: Path, type: str, progress: Callable[[int, int], None]) -> dict[str, Any]:
    if out.suffix != GGUF:
        raise ExportError(f"{folder} is a model folder and becomes a file: give a path that ends in {GGUF}")
    if out.exists():
        raise ExportError(f"{out} already exists; choose another path, or remove it")
    size_of = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    out.parent.mkdir(parents=True, exist_ok=True)
    tensors = export_model(
        folder, out, type, threads=usable_threads(), progress=lambda done, of: progress(size_of * done // of, size_of)
    )
    parameters = sum(prod(tensor.shape) for tensor in tensors)
    return _figures(out, type, parameters, out.stat().st_size, Vocabulary.load(folder), sha256(out))


def _figures(out: Path, type: str, parameters: int, written: int, vocabulary: Vocabulary, hash: str) -> dict[str, Any]:
    missing = vocabulary.missing_bytes
    figures = {"out": str(out), "type": type, "parameters": parameters, "bytes": written}
    return figures | {"missing_bytes": missing, "sha256": hash}
