"""The tensors of a Llama or Qwen2, and their names, row order and types in GGUF (SPEC D5).

GGUF stores the rows of a Llama's query and key projections in llama.cpp's rotary order: Hugging Face pairs dimension i
of a head with i + d/2, llama.cpp pairs 2i with 2i + 1. The rows of a Qwen2 keep their order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

from cogumi.core.errors import ArtifactError, ExportError
from cogumi.core.shapes import ModelShape, stored_shape
from cogumi.core.weight_files import check_weight_files

Array: TypeAlias = NDArray[Any]

KINDS = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2}
ABOUT = "gguf_metadata"
"""Key of config.json with the `general.*` keys of a GGUF file: the model's name, licence, languages and so on."""
F32, F16, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to export: name in the safetensors file (`source`) and in the GGUF file (`name`), row-major `shape`.

    If `heads` > 0, its rows are that many heads and are put into rotary order. Its values are multiplied by `factor`.
    A tensor with given `values` has no source.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    heads: int = 0
    type: GGMLQuantizationType = F32
    factor: float = 1.0
    values: tuple[float, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the tensor as stored."""
        values, size = GGML_QUANT_SIZES[self.type]
        return prod(self.shape) // int(values) * int(size)

    def announce(self, writer: GGUFWriter) -> None:
        """Add name, shape and type to the header of a file; the data is written later."""
        writer.add_tensor_info(self.name, self.shape, np.dtype(np.float32), self.nbytes, raw_dtype=self.type)

    def stored(self, type: GGMLQuantizationType) -> Tensor:
        """The tensor with llama.cpp's choice of type: `type`, but f32 for vectors, f16 if rows do not fill blocks."""
        if len(self.shape) == 1:
            return replace(self, type=F32)
        return replace(self, type=type if self.shape[-1] % GGML_QUANT_SIZES[type][0] == 0 else F16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama(ModelShape):
    """The settings of a `config.json` that llama.cpp needs; `stretch` `[head / 2]` divides the rotary frequencies of a
    model whose context was extended after pre-training.
    """

    epsilon: float
    theta: float
    stretch: tuple[float, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> Llama:
        """Read `config.json`; `ExportError` for a model that llama.cpp would not run as torch does."""
        config = read_json(folder / "config.json")
        try:
            check_weight_files(folder)
            shape = stored_shape(config, folder, str(folder))
        except ArtifactError as error:
            raise ExportError(str(error)) from error
        if shape.kind == "qwen2" and shape.query != shape.hidden:
            raise ExportError(
                f"{folder}/config.json: {shape.heads} heads of {shape.head} are not hidden_size {shape.hidden} wide; "
                "llama.cpp loads no such Qwen2"
            )
        rope = {"rope_theta": config.get("rope_theta", 10000.0)}
        for name in ("rope_scaling", "rope_parameters"):
            given = config.get(name) or {}
            if not isinstance(given, Mapping):
                raise ExportError(f"{folder}/config.json: {name} is {given!r}, not an object; copy it again")
            rope |= given
        kind = rope.get("rope_type", rope.get("type", "default"))
        plain = {
            "hidden_act": (config.get("hidden_act", "silu"), ("silu",)),
            "attention_bias": (config.get("attention_bias", False), (False,)),
            "mlp_bias": (config.get("mlp_bias", False), (False,)),
            "use_sliding_window": (config.get("use_sliding_window", False), (False,)),
            "rope_type": (kind, ("default", "llama3")),
        }
        for option, (value, supported) in plain.items():
            if value not in supported:
                known = " or ".join(map(repr, supported))
                raise ExportError(f"{folder}/config.json: {option} is {value!r}; supported: {known}")
        try:
            return cls(
                **asdict(shape),
                epsilon=float(config["rms_norm_eps"]),
                theta=float(rope["rope_theta"]),
                stretch=llama3_stretch(shape.head, rope) if kind == "llama3" else (),
            )
        except KeyError as error:
            raise ExportError(f"{folder}/config.json lacks {error}; save the model with save_pretrained") from error
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ExportError(f"{folder}/config.json: a rope or norm value is not a number; copy it again") from error

    def tensors(self) -> list[Tensor]:
        """All tensors of such a model, in file order."""
        names = get_tensor_name_map(KINDS[self.kind], self.layers)
        query, key = self.query, self.key
        heads, kv_heads = (self.heads, self.kv_heads) if self.kind == "llama" else (0, 0)
        layer: dict[str, tuple[tuple[int, ...], int]] = {
            "input_layernorm": ((self.hidden,), 0),
            "self_attn.q_proj": ((query, self.hidden), heads),
            "self_attn.k_proj": ((key, self.hidden), kv_heads),
            "self_attn.v_proj": ((key, self.hidden), 0),
            "self_attn.o_proj": ((self.hidden, query), 0),
            "post_attention_layernorm": ((self.hidden,), 0),
            "mlp.gate_proj": ((self.feed_forward, self.hidden), 0),
            "mlp.up_proj": ((self.feed_forward, self.hidden), 0),
            "mlp.down_proj": ((self.hidden, self.feed_forward), 0),
        }
        modules = {
            "model.embed_tokens": ((self.vocabulary, self.hidden), 0),
            "model.norm": ((self.hidden,), 0),
        }
        if not self.tied:
            modules["lm_head"] = ((self.vocabulary, self.hidden), 0)
        for i in range(self.layers):
            modules |= {f"model.layers.{i}.{module}": value for module, value in layer.items()}
        found = [
            Tensor(f"{module}.weight", f"{names.get_name(module)}.weight", shape, heads)
            for module, (shape, heads) in modules.items()
        ]
        if self.kind == "qwen2":
            for i in range(self.layers):
                for side, width in (("q", query), ("k", key), ("v", key)):
                    source = f"model.layers.{i}.self_attn.{side}_proj.bias"
                    found.append(Tensor(source, f"blk.{i}.attn_{side}.bias", (width,)))
        if self.stretch:
            found.append(Tensor("", "rope_freqs.weight", (len(self.stretch),), values=self.stretch))
        return found

    def write(self, writer: GGUFWriter) -> None:
        """Add the keys of its architecture."""
        writer.add_vocab_size(self.vocabulary)
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.hidden)
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(self.feed_forward)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head)
        writer.add_value_length(self.head)
        writer.add_rope_dimension_count(self.head)
        writer.add_rope_freq_base(self.theta)
        writer.add_layer_norm_rms_eps(self.epsilon)


def llama3_stretch(head: int, rope: Mapping[str, Any]) -> tuple[float, ...]:
    """Divisor of each rotary frequency `[head / 2]` of a Llama 3.1: 1 for wavelengths much shorter than the context of
    pre-training, `factor` for longer ones, interpolated between them.
    """
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    learned = rope["original_max_position_embeddings"]
    found = []
    for i in range(head // 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (2 * i / head)
        share = min(max((learned / wave - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - share) / factor + share))
    return tuple(found)


def rotary_order(rows: Array, heads: int) -> Array:
    """Reorder rows [heads * d, ...] from Hugging Face's halves to llama.cpp's adjacent pairs."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def halves_order(rows: Array, heads: int) -> Array:
    """Reorder rows [heads * d, ...] from llama.cpp's adjacent pairs to Hugging Face's halves: undoes `rotary_order`."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_about(writer: GGUFWriter, folder: Path) -> None:
    """Add the keys that describe the model of a folder, as they were in the GGUF file that it comes from."""
    for key, value in read_json(folder / "config.json").get(ABOUT, {}).items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case [_, *_]:
                writer.add_array(key, value)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; `ExportError` if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing; give a full model or adapter folder") from error
    except ValueError as error:
        raise ExportError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(found, dict):
        raise ExportError(f"{path} is not a JSON object; copy it again")
    return found
