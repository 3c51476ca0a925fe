"""Model shapes, from which parameter counts and sizes follow without loading weights (SPEC D1).

The shapes of common models are built in; others are read from `config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogumi.core.errors import ArtifactError
from cogumi.core.registry import nearest
from cogumi.core.weight_files import check_weight_files, has_own_head

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
"""Architecture -> model type. A config saved without its model has only the model type."""
LIMITS = {"layers": 1000} | dict.fromkeys(
    ("hidden", "feed_forward", "heads", "kv_heads", "head", "vocabulary", "context"), 1 << 28
)
"""Maximum accepted values, far above those of any existing model."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder of the Llama family; `head` is the width of one attention head, `context` is in tokens.

    Kind `qwen2` is a Llama with biases on the query, key and value projections.
    """

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    context: int
    tied: bool
    kind: str = "llama"

    @property
    def query(self) -> int:
        """Width of all queries."""
        return self.heads * self.head

    @property
    def key(self) -> int:
        """Width of all keys, and of all values."""
        return self.kv_heads * self.head

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear maps of one layer, (out, in) by name: the possible targets of a LoRA."""
        return {
            "q_proj": (self.query, self.hidden),
            "k_proj": (self.key, self.hidden),
            "v_proj": (self.key, self.hidden),
            "o_proj": (self.hidden, self.query),
            "gate_proj": (self.feed_forward, self.hidden),
            "up_proj": (self.feed_forward, self.hidden),
            "down_proj": (self.hidden, self.feed_forward),
        }

    @property
    def matrices(self) -> int:
        """Weights of the linear maps of all layers, which 4-bit quantization packs."""
        return self.layers * sum(rows * columns for rows, columns in self.linear.values())

    @property
    def head_weights(self) -> int:
        """Weights of the output head, separate or tied to the embedding."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Number of distinct weights."""
        biases = self.query + 2 * self.key if self.kind == "qwen2" else 0
        norms = 2 * self.hidden
        ends = self.head_weights * (1 if self.tied else 2) + self.hidden
        return ends + self.matrices + self.layers * (biases + norms)

    def adapter_parameters(self, ranks: Mapping[str, int], layers: int | None = None) -> int:
        """Weights of a LoRA with these ranks by target: A [rank, in] and B [out, rank] in every one of its layers (all
        if None).
        """
        return (layers or self.layers) * sum(rank * sum(self.linear[target]) for target, rank in ranks.items())

    def cache_values(self) -> int:
        """Values per token in the key-value cache."""
        return 2 * self.layers * self.key


def _llama3(hidden: int, feed_forward: int, layers: int, heads: int, head: int, tied: bool) -> ModelShape:
    return ModelShape(hidden, feed_forward, layers, heads, 8, head, 128_256, 131_072, tied)


def _qwen2(hidden: int, ff: int, layers: int, heads: int, kv_heads: int, head: int, ids: int, tied: bool) -> ModelShape:
    return ModelShape(hidden, ff, layers, heads, kv_heads, head, ids, 32_768, tied, "qwen2")


KNOWN = {
    "Llama-3.1-8B": _llama3(4096, 14336, 32, 32, 128, tied=False),
    "Llama-3.2-1B": _llama3(2048, 8192, 16, 32, 64, tied=True),
    "Llama-3.2-3B": _llama3(3072, 8192, 28, 24, 128, tied=True),
    "Qwen2.5-0.5B": _qwen2(896, 4864, 24, 14, 2, 64, 151_936, tied=True),
    "Qwen2.5-1.5B": _qwen2(1536, 8960, 28, 12, 2, 128, 151_936, tied=True),
    "Qwen2.5-7B": _qwen2(3584, 18944, 28, 28, 4, 128, 152_064, tied=False),
}
"""Shapes by name; an `-Instruct` model has the shape of its base model."""


def known(name: str) -> str | None:
    """The name in `KNOWN` of a Hub id such as `meta-llama/Llama-3.2-1B-Instruct`; None if it is unknown."""
    short = name.rsplit("/", 1)[-1].removeprefix("Meta-").removesuffix("-Instruct")
    return short if short in KNOWN else None


def shape_of(config: Mapping[str, Any], where: str) -> ModelShape:
    """The shape in a `config.json`; `ArtifactError` for another model family or a missing or invalid value."""
    named = config.get("architectures")
    found = named[0] if named and isinstance(named, list) else config.get("model_type")
    kind = ARCHITECTURES.get(str(found), str(found))
    if kind not in ARCHITECTURES.values():
        raise ArtifactError(f"{where} is a {found}; supported: {', '.join(ARCHITECTURES)}")
    try:
        shape = ModelShape(
            hidden=config["hidden_size"],
            feed_forward=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            vocabulary=config["vocab_size"],
            context=config["max_position_embeddings"],
            tied=config.get("tie_word_embeddings", False),
            kind=kind,
        )
    except KeyError as error:
        raise ArtifactError(f"{where}/config.json lacks {error}; save the model with save_pretrained") from error
    except (TypeError, ZeroDivisionError) as error:
        raise ArtifactError(f"{where}/config.json has values that are not numbers above 0; copy it again") from error
    for name, most in LIMITS.items():
        value = getattr(shape, name)
        if type(value) is not int or not 1 <= value <= most:
            raise ArtifactError(f"{where}/config.json: {name} is {value!r}, not 1 to {most}; copy it again")
    if shape.heads % shape.kv_heads:
        raise ArtifactError(f"{where}/config.json: {shape.heads} heads cannot share {shape.kv_heads} key-value heads")
    return shape


def stored_shape(config: Mapping[str, Any], folder: Path, where: str) -> ModelShape:
    """`shape_of`, but not tied if the folder stores a head of its own."""
    shape = shape_of(config, where)
    return replace(shape, tied=shape.tied and not has_own_head(folder))


def find_shape(name: str, root: Path) -> ModelShape:
    """The shape of a model folder (relative paths start at `root`) or of a `known` Hub id; else `ArtifactError`."""
    config = root / name / "config.json"
    try:
        check_weight_files(config.parent)
        return stored_shape(json.loads(config.read_text("utf-8")), config.parent, name)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{config} cannot be read ({error}); copy it again") from error
    short = known(name)
    if short is None:
        raise ArtifactError(
            f"'{name}' is neither a model folder under {root} nor a model of known shape; "
            f"{nearest(name.rsplit('/', 1)[-1], KNOWN)}; or give a folder with its config.json"
        )
    return KNOWN[short]
