"""What a Llama consists of, and under which name, in which order and type GGUF keeps it (SPEC D5).

GGUF stores the rows of the query and key projections in llama.cpp's rotary order: Hugging Face pairs
dimension i of a head with i + d/2, llama.cpp pairs 2i with 2i + 1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

from cogumi.errors import ExportError

Array: TypeAlias = NDArray[Any]

ARCHITECTURES = {"LlamaForCausalLM": "llama"}
"""Architecture -> model type, which is all that a config saved apart from its model says."""
F32, F16, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor's way: `source` name in the safetensors file, `name` in the GGUF file, row-major `shape`.

    `heads` > 0: its rows are that many heads, to be put into rotary order.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    heads: int = 0
    type: GGMLQuantizationType = F32

    @property
    def nbytes(self) -> int:
        """Size of the tensor as stored."""
        values, size = GGML_QUANT_SIZES[self.type]
        return prod(self.shape) // int(values) * int(size)

    def stored(self, type: GGMLQuantizationType) -> Tensor:
        """The same, kept as `type` as llama.cpp would: norms in f32, rows that do not fill blocks in f16."""
        if len(self.shape) == 1:
            return replace(self, type=F32)
        return replace(self, type=type if self.shape[-1] % GGML_QUANT_SIZES[type][0] == 0 else F16)


@dataclass(frozen=True, slots=True)
class Llama:
    """The figures of a `config.json` that llama.cpp needs."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    context: int
    epsilon: float
    theta: float
    tied: bool

    @classmethod
    def load(cls, folder: Path) -> Llama:
        """Read `config.json`; `ExportError` if it is not a plain Llama."""
        config = read_json(folder / "config.json")
        found = (config.get("architectures") or [config.get("model_type")])[0]
        if found not in (*ARCHITECTURES, *ARCHITECTURES.values()):
            raise ExportError(f"{folder} is a {found}; supported: {', '.join(ARCHITECTURES)}")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        plain = {
            "hidden_act": (config.get("hidden_act", "silu"), "silu"),
            "attention_bias": (config.get("attention_bias", False), False),
            "mlp_bias": (config.get("mlp_bias", False), False),
            "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        }
        for option, (value, supported) in plain.items():
            if value != supported:
                raise ExportError(f"{folder}/config.json: {option} is {value!r}; supported: {supported!r}")
        try:
            return cls(
                hidden=config["hidden_size"],
                feed_forward=config["intermediate_size"],
                layers=config["num_hidden_layers"],
                heads=config["num_attention_heads"],
                kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
                head=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
                vocabulary=config["vocab_size"],
                context=config["max_position_embeddings"],
                epsilon=config["rms_norm_eps"],
                theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
                tied=config.get("tie_word_embeddings", False),
            )
        except KeyError as error:
            raise ExportError(f"{folder}/config.json lacks {error}; save the model with save_pretrained") from error

    def tensors(self) -> list[Tensor]:
        """Every tensor such a model has, in file order."""
        names = get_tensor_name_map(MODEL_ARCH.LLAMA, self.layers)
        query, key = self.heads * self.head, self.kv_heads * self.head
        layer: dict[str, tuple[tuple[int, ...], int]] = {
            "input_layernorm": ((self.hidden,), 0),
            "self_attn.q_proj": ((query, self.hidden), self.heads),
            "self_attn.k_proj": ((key, self.hidden), self.kv_heads),
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
        return [
            Tensor(f"{module}.weight", f"{names.get_name(module)}.weight", shape, heads)
            for module, (shape, heads) in modules.items()
        ]

    def write(self, writer: GGUFWriter) -> None:
        """Add the `llama.*` keys."""
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


def rotary_order(rows: Array, heads: int) -> Array:
    """Reorder rows [heads * d, ...] from Hugging Face's halves to llama.cpp's pairs."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `ExportError` if it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing; give a full model or adapter folder") from error
    except ValueError as error:
        raise ExportError(f"{path} is not JSON ({error}); copy it again") from error
