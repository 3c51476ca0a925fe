"""Stage `gguf`: Llama and Qwen2 Hugging Face folders and PEFT LoRA adapters as GGUF files (SPEC D5).

Tensors go from safetensors through llama.cpp's quantizer into the GGUF file, one block of rows at a time: without a
temporary copy, with one tensor in memory in its final type. Output files are replaced atomically.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, Keys
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from cogumi.compress.gguf.gguf_vocabulary import Vocabulary, warn_of_lost_text
from cogumi.compress.gguf.layout import F32, Array, Llama, Tensor, read_json, rotary_order, write_about
from cogumi.compress.gguf.planned_files import Adapter, planned_weights
from cogumi.compress.gguf.type_mixture import (
    FILE_TYPES,
    NONE,
    OVERRIDES,
    TENSOR_TYPES,
    check_overrides,
    check_type,
    stored_tensors,
)
from cogumi.compress.gguf.weights import IMPORTANCE, Weights, read_importance
from cogumi.core.errors import ExportError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import AdapterFacts, ModelFacts
from cogumi.core.model_fingerprint import model_fingerprint
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.engine.llama.binding.quantize import quantize_rows

VERSION = 3
KIND = "gguf"
LIGHT = True
INPUTS = {"model": "model"}
OPTIONAL = {"adapter": "adapter|backbone|model", "importance": "importance", "types": "model"}

BLOCK = 1 << 24
"""Values that a thread reads and quantizes at a time."""
LARGEST = 65504.0
"""The largest f16 value, because the scale of a quantized block is an f16 in every type."""

_ADAPTER_OPTIONS = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "lora_bias",
)
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is; PiSSA, OLoRA and others take a part of it."""
_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


class Config(BaseModel):
    """`type` of a model's weights and `adapter_type` of an adapter's, in llama.cpp's names.

    `types` overrides the type of matrices by patterns of their GGUF names (`blk.0.*`); the first matching pattern
    wins. `part` is a subfolder of the adapter's step, if that step makes several adapters (`adapter_code` of
    `backbone`).
    """

    model_config = ConfigDict(extra="forbid")
    type: str = "q8_0"
    adapter_type: str = "f32"
    types: dict[str, str] = Field(default_factory=dict)
    part: str = Field("", pattern=r"^[A-Za-z0-9_-]*$")

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            check_type(value)
        except ExportError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("adapter_type")
    @classmethod
    def _known_of_adapters(cls, value: str) -> str:
        try:
            check_adapter_type(value)
        except ExportError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("types")
    @classmethod
    def _known_each(cls, value: dict[str, str]) -> dict[str, str]:
        try:
            check_overrides(value)
        except ExportError as error:
            raise ValueError(str(error)) from None
        return value


def export_model(
    folder: Path,
    out: Path,
    type: str = "q8_0",
    types: Mapping[str, str] = NONE,
    importance: Path | None = None,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tensor]:
    """Write model and tokenizer of a Hugging Face folder to `out` as a GGUF file of `type`, atomically.

    `types` and `importance` (a file of stage `importance`) are as in `stored_tensors`. Returns the tensors as stored.
    Raises `ExportError` for a model that llama.cpp would run differently from torch, and for damaged weights.
    """
    llama = Llama.load(folder)
    tensors = stored_tensors(llama, type, types, importance is not None)
    vocabulary, weights = Vocabulary.load(folder), Weights.load(folder)
    warn_of_lost_text(vocabulary)
    columns = read_importance(importance, tensors, weights) if importance else {}
    writer = GGUFWriter(None, llama.kind)
    writer.add_type(GGUFType.MODEL)
    writer.add_file_type(FILE_TYPES[type])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    write_about(writer, folder)
    llama.write(writer)
    vocabulary.write(writer, llama.vocabulary)
    _check(weights, tensors, frozenset({"lm_head.weight"} if llama.tied else ()))
    with writing(writer, tensors, out), ThreadPoolExecutor(threads) as pool:
        for done, tensor in enumerate(tensors):
            writer.write_tensor_data(_encoded(weights, tensor, columns.get(tensor.name), pool))
            progress(done + 1, len(tensors))
    return tensors


def export_adapter(folder: Path, base: Path, out: Path, type: str = "f32") -> None:
    """Write the PEFT LoRA adapter in `folder`, trained on the model folder `base`, to `out`, atomically.

    A factor whose rows do not fill the blocks of `type` is stored as f16: B, unless the rank is a multiple of 32.
    Raises `ExportError` for a target without a GGUF name and for LoRA variants that llama.cpp does not support.
    """
    check_adapter_type(type)
    config = read_json(folder / "adapter_config.json")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ExportError(f"{folder} is a {kind} adapter; supported: LORA")
    _check_variant(folder, config)
    llama = Llama.load(base)
    writer = GGUFWriter(None, llama.kind)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_file_type(FILE_TYPES[type])
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    weights = Weights.load(folder, "adapter_model.safetensors")
    tensors = [t.stored(TENSOR_TYPES[type]) for t in _adapter_tensors(weights, folder, llama, config)]
    _check(weights, tensors, frozenset())
    with writing(writer, tensors, out):
        for tensor in tensors:
            values = _read(weights, tensor, 0, tensor.shape[0])
            writer.write_tensor_data(quantize_rows(values, tensor.type.name))


def _check_variant(folder: Path, config: Mapping[str, Any]) -> None:
    """`ExportError` for a LoRA that is more than factors beside the unchanged matrices of its base."""
    for option in _ADAPTER_OPTIONS:
        if config.get(option):
            raise ExportError(
                f"{folder}/adapter_config.json sets {option}, which llama.cpp does not support; train without it"
            )
    if config.get("bias", "none") != "none":
        raise ExportError(
            f"{folder}/adapter_config.json sets bias: {config['bias']}, which llama.cpp does not support; "
            "train with bias: none"
        )
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        raise ExportError(
            f"{folder}/adapter_config.json sets init_lora_weights: {config['init_lora_weights']}, which changes the "
            "base; save it with path_initial_model_for_weight_conversion, or train without it"
        )


def check_adapter_type(type: str) -> None:
    """`ExportError` unless all tensors of a file can have that type."""
    if type not in FILE_TYPES or type not in TENSOR_TYPES:
        known = ", ".join(t for t in FILE_TYPES if t in TENSOR_TYPES)
        raise ExportError(f"an adapter cannot be of type {type!r}; known: {known}")


def _adapter_tensors(weights: Weights, folder: Path, llama: Llama, config: Mapping[str, Any]) -> list[Tensor]:
    """A [rank, in] and B [out, rank] of every adapted projection; B's rows are in the order of the base's.

    llama.cpp reads one alpha per file: B of a projection with another alpha is scaled by the quotient.
    """
    ranks = {config["r"], *(config.get("rank_pattern") or {}).values()}
    alphas = config.get("alpha_pattern") or {}
    found: dict[str, set[str]] = {}
    for key in weights.shapes:
        match = _LORA.fullmatch(key)
        if match is None:
            raise ExportError(f"{folder}: no GGUF name for adapter tensor {key}; adapt linear layers only")
        found.setdefault(f"{match['module']}.weight", set()).add(match["side"])
    names = {source.split(".")[-2] for source in found}
    if unknown := sorted(set(alphas) - names):
        raise ExportError(
            f"{folder}/adapter_config.json: alpha_pattern names '{unknown[0]}'; supported are plain layer names"
        )
    targets = {t.source: t for t in llama.tensors() if len(t.shape) == 2}
    for source, sides in found.items():
        if source not in targets:
            raise ExportError(f"{folder}: adapter target {source} is not a projection of its base; train without it")
        if sides != {"A", "B"}:
            raise ExportError(f"{folder}: adapter target {source} lacks lora_{min({'A', 'B'} - sides)}")
    tensors = []
    for target in (t for t in targets.values() if t.source in found):
        prefix = f"base_model.model.{target.source.removesuffix('.weight')}"
        rank = weights.shapes[f"{prefix}.lora_A.weight"][0]
        if rank not in ranks:
            raise ExportError(f"{folder}: {prefix} has rank {rank}, adapter_config.json says {sorted(ranks)}")
        rows, columns = target.shape
        tensors.append(Tensor(f"{prefix}.lora_A.weight", f"{target.name}.lora_a", (rank, columns)))
        factor = alphas.get(prefix.rsplit(".", 1)[-1], config["lora_alpha"]) / config["lora_alpha"]
        b = Tensor(f"{prefix}.lora_B.weight", f"{target.name}.lora_b", (rows, rank), target.heads, factor=factor)
        tensors.append(b)
    return tensors


def _read(weights: Weights, tensor: Tensor, start: int, stop: int) -> Array:
    """Read, check and reorder rows `start` to `stop`, which must not split an attention head."""
    values: Array = weights.rows(tensor.source, start, stop)
    if tensor.factor != 1:
        values = values * np.float32(tensor.factor)
    largest = np.abs(values).max(initial=0)  # NaN if any is
    if not np.isfinite(largest):
        raise ExportError(f"{tensor.source} holds NaN or infinity; training has diverged, use an earlier checkpoint")
    if tensor.type != F32 and largest > LARGEST:
        raise ExportError(f"{tensor.source} holds values too large for {tensor.type.name.lower()}; export as f32")
    heads = tensor.heads * (stop - start) // tensor.shape[0]
    return np.ascontiguousarray(rotary_order(values, heads) if heads else values)


def _encoded(
    weights: Weights, tensor: Tensor, importance: NDArray[np.float32] | None, pool: ThreadPoolExecutor
) -> Array:
    """The tensor's values as stored; the threads of `pool` encode blocks of rows."""
    if tensor.values:
        return np.array(tensor.values, np.float32)
    if len(tensor.shape) == 1:
        return _read(weights, tensor, 0, tensor.shape[0])
    rows, width = tensor.shape
    head = rows // tensor.heads if tensor.heads else 1
    step = max(BLOCK // (width * head), 1) * head
    out = np.empty((rows, tensor.nbytes // rows), np.uint8)

    def encode(start: int) -> None:
        stop = min(start + step, rows)
        values = _read(weights, tensor, start, stop)
        out[start:stop] = quantize_rows(values, tensor.type.name, importance)

    for _ in pool.map(encode, range(0, rows, step)):
        pass
    return out


def _check(weights: Weights, tensors: list[Tensor], unused: frozenset[str]) -> None:
    """`ExportError` unless the files hold exactly these tensors with these shapes, and `unused` ones."""
    tensors = [tensor for tensor in tensors if not tensor.values]
    for tensor in tensors:
        if tensor.source not in weights.shapes:
            raise ExportError(f"the weights lack {tensor.source}; save the whole model again")
        shape = weights.shapes[tensor.source]
        if shape != tensor.shape:
            raise ExportError(f"{tensor.source} has shape {shape}, config.json requires {tensor.shape}")
    unknown = set(weights.shapes) - unused - {tensor.source for tensor in tensors}
    if unknown:
        raise ExportError(
            f"the weights hold {min(unknown)}, which this architecture does not have; remove it before the export"
        )


@contextmanager
def writing(writer: GGUFWriter, tensors: Sequence[Tensor], out: Path) -> Iterator[None]:
    """Write the writer's keys and the tensors' headers; the body then writes the data of each tensor, in order.

    After the body `out` is complete; if the body fails, it is untouched. The temporary file has a fixed name, so that
    the next run overwrites the leftover of a killed one.
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


def estimate(config: Config, given: Given) -> Estimate:
    """The file of the model, or the file of the adapter and its model."""
    model = given.find("model", ModelFacts)
    if "adapter" in given.inputs:
        trained = given.find("adapter", AdapterFacts)
        return Estimate((model, Adapter(trained.ranks, config.adapter_type, trained.layers) if trained else None))
    notes = []
    if "types" in given.inputs:
        step = given.inputs["types"].step
        notes.append(f"the types of step '{step}' are known once it ran; planned as if none were given")
    if model is None:
        return Estimate(notes=tuple(notes))
    weights = planned_weights(model, config.type)
    weights = replace(weights, types=tuple(config.types.items()), importance="importance" in given.inputs)
    return Estimate((model, weights), notes=tuple(notes))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`model` -> model.gguf, optionally with `importance` and with the `types` of stage `awq` or `gptq`; or `adapter`
    and the `model` it was trained on -> adapter.gguf.
    """
    base = inputs["model"].path
    common = {"base_fingerprint": model_fingerprint(inputs["model"]), "tokenizer_sha256": Vocabulary.load(base).sha256}
    if "adapter" in inputs:
        path = out / "adapter.gguf"
        export_adapter(inputs["adapter"].path / config.part, base, path, config.adapter_type)
        return {"bytes": path.stat().st_size, "type": config.adapter_type, **common}
    path = out / "model.gguf"
    given = read_json(inputs["types"].path / OVERRIDES) if "types" in inputs else {}
    tensors = export_model(
        base,
        path,
        config.type,
        {**config.types, **given, **config.types},  # the config's patterns are tried first and overrule equal ones
        inputs["importance"].path / IMPORTANCE if "importance" in inputs else None,
        context.threads,
        lambda done, total: context.progress(done, total, {}),
    )
    weights, matrices = sum(np.prod(t.shape) for t in tensors), [t for t in tensors if len(t.shape) == 2]
    bits = 8 * sum(t.nbytes for t in tensors) / int(weights)
    context.progress(len(tensors), len(tensors), {"bits per weight": bits})
    return {
        "bytes": path.stat().st_size,
        "type": config.type,
        "types": dict(Counter(t.type.name.lower() for t in matrices)),
        "bits_per_weight": bits,
        **common,
    }
