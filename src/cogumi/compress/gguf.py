"""Stage `gguf`: Llama and Qwen2 Hugging Face folders and PEFT LoRA adapters as GGUF files (SPEC D5).

Tensors are streamed, so that memory holds one at a time, and files are replaced whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, Keys, LlamaFileType
from gguf.quants import quantize as to_blocks
from pydantic import BaseModel, ConfigDict, Field, field_validator
from safetensors import SafetensorError, safe_open

from cogumi.artifact import sha256
from cogumi.compress.layout import F16, F32, Q8_0, Array, Llama, Tensor, read_json, rotary_order
from cogumi.compress.vocabulary import Vocabulary
from cogumi.errors import ExportError
from cogumi.stage import Context
from cogumi.types import Artifact

VERSION = 1
KIND = "gguf"

DIRECT = {
    "f32": (F32, LlamaFileType.ALL_F32),
    "f16": (F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""Types written here; every other type is made from an f32 file by llama.cpp."""
TYPES = ("f32", *(t.name[7:].lower() for t in LlamaFileType if t.name.startswith("MOSTLY_")))
_LARGEST = {F32: np.inf, F16: 65504.0, Q8_0: 127 * 65504.0}  # a block of Q8_0 has an f16 scale and 127 steps

_ADAPTER_OPTIONS = (
    "use_dora",
    "use_rslora",
    "fan_in_fan_out",
    "modules_to_save",
    "lora_bias",
)
_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


class Config(BaseModel):
    """`type` of the weights of a model, named as llama.cpp names it; adapters are always f32.

    `part` is the folder inside the adapter's step, where that made several (`adapter_code` of stage `backbone`).
    """

    model_config = ConfigDict(extra="forbid")
    type: str = "q8_0"
    part: str = Field("", pattern=r"^[A-Za-z0-9_-]*$")

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in TYPES:
            raise ValueError(f"unknown type {value!r}; known: {', '.join(TYPES)}")
        return value


def export_model(folder: Path, out: Path, type: str = "q8_0") -> None:
    """Write model and tokenizer of a Hugging Face folder to `out`, weights as one of `TYPES`, atomically.

    Raises `ExportError` for anything llama.cpp would run differently from torch, and for damaged weights.
    """
    if type not in TYPES:
        raise ExportError(f"unknown GGUF type {type!r}; known: {', '.join(TYPES)}")
    if type not in DIRECT:
        _export_quantized(folder, out, type)
        return
    stored, file_type = DIRECT[type]
    llama = Llama.load(folder)
    writer = GGUFWriter(None, llama.kind)
    writer.add_type(GGUFType.MODEL)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    llama.write(writer)
    Vocabulary.load(folder).write(writer, llama.vocabulary)
    with _open(folder / "model.safetensors") as file:
        unused = frozenset({"lm_head.weight"} if llama.tied else ())
        _write(writer, [t.stored(stored) for t in llama.tensors()], file, out, unused)


def export_adapter(folder: Path, base: Path, out: Path) -> None:
    """Write the PEFT LoRA adapter in `folder`, trained on the model folder `base`, to `out`, atomically.

    Raises `ExportError` for a target without a GGUF name and for kinds of LoRA that llama.cpp does not know.
    """
    config = read_json(folder / "adapter_config.json")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ExportError(f"{folder} is a {kind} adapter; supported: LORA")
    for option in _ADAPTER_OPTIONS:
        if config.get(option):
            raise ExportError(
                f"{folder}/adapter_config.json sets {option}, which llama.cpp does not know; train without"
            )
    llama = Llama.load(base)
    writer = GGUFWriter(None, llama.kind)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    with _open(folder / "adapter_model.safetensors") as file:
        _write(writer, _adapter_tensors(file, folder, llama, config), file, out)


def _adapter_tensors(file: Any, folder: Path, llama: Llama, config: Mapping[str, Any]) -> list[Tensor]:
    """A [rank, in] and B [out, rank] of every adapted projection; B's rows are ordered as the base's.

    llama.cpp knows one alpha for all: where a projection has its own, B carries the difference.
    """
    ranks = {config["r"], *(config.get("rank_pattern") or {}).values()}
    alphas = config.get("alpha_pattern") or {}
    found: dict[str, set[str]] = {}
    for key in file.keys():  # noqa: SIM118
        match = _LORA.fullmatch(key)
        if match is None:
            raise ExportError(f"{folder}: no GGUF name for adapter tensor {key}; adapt linear layers only")
        found.setdefault(f"{match['module']}.weight", set()).add(match["side"])
    names = {source.split(".")[-2] for source in found}
    if foreign := sorted(set(alphas) - names):
        raise ExportError(
            f"{folder}/adapter_config.json: alpha_pattern names '{foreign[0]}'; supported are plain layer names"
        )
    weights = {t.source: t for t in llama.tensors() if len(t.shape) == 2}
    for source, sides in found.items():
        if source not in weights:
            raise ExportError(f"{folder}: adapter target {source} is no projection of its base; retrain without it")
        if sides != {"A", "B"}:
            raise ExportError(f"{folder}: adapter target {source} lacks lora_{min({'A', 'B'} - sides)}")
    tensors = []
    for weight in (t for t in weights.values() if t.source in found):
        prefix = f"base_model.model.{weight.source.removesuffix('.weight')}"
        rank = file.get_slice(f"{prefix}.lora_A.weight").get_shape()[0]
        if rank not in ranks:
            raise ExportError(f"{folder}: {prefix} has rank {rank}, adapter_config.json says {sorted(ranks)}")
        rows, columns = weight.shape
        tensors.append(Tensor(f"{prefix}.lora_A.weight", f"{weight.name}.lora_a", (rank, columns)))
        factor = alphas.get(prefix.rsplit(".", 1)[-1], config["lora_alpha"]) / config["lora_alpha"]
        b = Tensor(f"{prefix}.lora_B.weight", f"{weight.name}.lora_b", (rows, rank), weight.heads, factor=factor)
        tensors.append(b)
    return tensors


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A safetensors file, read through torch because numpy has no bfloat16."""
    try:
        file = safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing; sharded checkpoints must be saved again as one file") from error
    except SafetensorError as error:
        raise ExportError(f"{path} is cut short or damaged ({error}); copy it again") from error
    with file:
        yield file


def _load(file: Any, tensor: Tensor) -> Array:
    """Read, check, reorder and encode one tensor."""
    if tensor.values:
        return np.array(tensor.values, np.float32)
    values: Array = file.get_tensor(tensor.source).float().numpy() * np.float32(tensor.factor)
    if not np.isfinite(values).all():
        raise ExportError(f"{tensor.source} holds NaN or infinity; training has diverged, use an earlier checkpoint")
    if np.abs(values).max(initial=0) > _LARGEST[tensor.type]:
        raise ExportError(f"{tensor.source} holds values too large for {tensor.type.name.lower()}; export as f32")
    if tensor.heads:
        values = rotary_order(values, tensor.heads)
    return np.ascontiguousarray(to_blocks(values, tensor.type))


def _check(file: Any, tensors: list[Tensor], unused: frozenset[str]) -> None:
    """`ExportError` unless the file holds exactly these tensors, in these shapes."""
    names = set(file.keys())
    tensors = [tensor for tensor in tensors if not tensor.values]
    for tensor in tensors:
        if tensor.source not in names:
            raise ExportError(f"the weights lack {tensor.source}; save the whole model again")
        shape = tuple(file.get_slice(tensor.source).get_shape())
        if shape != tensor.shape:
            raise ExportError(f"{tensor.source} has shape {shape}, config.json asks for {tensor.shape}")
    unknown = names - unused - {tensor.source for tensor in tensors}
    if unknown:
        raise ExportError(
            f"the weights hold {min(unknown)}, which such a model does not have; GGUF has no place for it"
        )


def _write(
    writer: GGUFWriter, tensors: list[Tensor], file: Any, out: Path, unused: frozenset[str] = frozenset()
) -> None:
    """Stream checked tensors into `out`."""
    _check(file, tensors, unused)
    with writing(writer, tensors, out):
        for tensor in tensors:
            writer.write_tensor_data(_load(file, tensor))


@contextmanager
def writing(writer: GGUFWriter, tensors: Sequence[Tensor], out: Path) -> Iterator[None]:
    """Write the writer's keys and the tensors' places; the body then writes each tensor's data, in their order.

    `out` is there whole after the body, or untouched if it fails. Until then all goes to a file whose name is fixed,
    so that what a killed run left is overwritten by the next.
    """
    for tensor in tensors:
        tensor.announce(writer)
    part = out.with_name(f"{out.name}.part")
    try:
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        yield
        writer.close()
        os.replace(part, out)
    finally:
        writer.close()
        part.unlink(missing_ok=True)


def _export_quantized(folder: Path, out: Path, type: str) -> None:
    """Through an f32 file beside `out`, quantized by llama.cpp itself."""
    from cogumi.runtime.llama.quantize import quantize  # loads llama.cpp: only where it is needed

    whole = out.with_name(f"{out.name}.f32")
    try:
        export_model(folder, whole, "f32")
        quantize(whole, out, type)
    finally:
        whole.unlink(missing_ok=True)


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`model` -> model.gguf, or `adapter` and the `model` it was trained on -> adapter.gguf."""
    base = inputs["model"].path
    if "adapter" in inputs:
        path, type = out / "adapter.gguf", "f32"
        export_adapter(inputs["adapter"].path / config.part, base, path)
    else:
        path, type = out / "model.gguf", config.type
        export_model(base, path, type)
    return {
        "bytes": path.stat().st_size,
        "type": type,
        "base_fingerprint": sha256(base / "model.safetensors"),
        "tokenizer_sha256": Vocabulary.load(base).sha256,
    }
