"""The header of a GGUF file that a person has: its keys and tensors, checked before anything else is done (SPEC M1).

Only the header is read; the tensors' data stays in the file until it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, LlamaFileType
from gguf.quants import dequantize
from numpy.typing import NDArray

from cogumi.compress.gguf.layout import KINDS, Llama, Tensor, llama3_stretch
from cogumi.core.errors import ExportError
from cogumi.core.model_files import not_a_model, parts_of

EMBEDDING, HEAD, FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"
GENERAL, TOKENIZER = "general.", "tokenizer."
TECHNICAL = ("architecture", "type", "file_type", "quantization_version", "alignment")
"""Keys below `general.` that describe the file; all others describe the model, and go wherever it goes."""
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Settings of every published Llama 3.1 to 3.3; a GGUF file holds only the frequencies that follow from them."""
LLAMA3_LEARNED = 8192
"""Context of their pre-training in tokens, for files from whose frequencies it does not follow."""


def incomplete(path: Path, error: Exception) -> ExportError:
    """The error for a file that `gguf` cannot read: its data ends early, or its header contradicts itself."""
    why = f"the key {error} is missing" if isinstance(error, KeyError) else "it is cut off, or damaged"
    return ExportError(f"{path} is not a complete GGUF model: {why}; copy or download it again")


@dataclass(frozen=True)
class Header:
    """The keys of a GGUF file and their sizes in bytes, and its tensors: name -> the reader's record, whose `data` maps
    the file.
    """

    path: Path
    keys: Mapping[str, Any]
    key_sizes: Mapping[str, int]
    tensors: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's architecture."""
        return str(self.keys["general.architecture"])

    @property
    def about(self) -> dict[str, Any]:
        """The keys that describe the model: `general.name`, `general.license`, `general.languages` and so on."""
        names = (key for key in self.keys if key.startswith(GENERAL))
        return {key: self.keys[key] for key in names if key.removeprefix(GENERAL) not in TECHNICAL}

    @property
    def type(self) -> str:
        """The file type in llama.cpp's spelling (`q4_1`, `q4_k_m`), or the type of most weights if it is not named."""
        number = self.keys.get("general.file_type")
        named = {t.value: t.name.lower().removeprefix("all_").removeprefix("mostly_") for t in LlamaFileType}
        if number in named:
            return str(named[number])
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.tensor_type.name.lower()] = counts.get(tensor.tensor_type.name.lower(), 0) + tensor.n_elements
        return max(counts, key=lambda name: counts[name])

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(int(tensor.n_elements) for name, tensor in self.tensors.items() if name != FREQUENCIES)

    @property
    def context(self) -> int:
        """Tokens that the model was trained for; 0 if the file does not say."""
        return int(self.keys.get(f"{self.architecture}.context_length", 0))

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys that do not follow from the shape: tokenizer and description."""
        return sum(size for name, size in self.key_sizes.items() if name.startswith(TOKENIZER) or name in self.about)

    @cached_property
    def shape(self) -> Llama:
        """The model, if it is one that can be trained; else `ExportError` with the reason."""
        self._check(self.layout)
        return self.layout

    @cached_property
    def layout(self) -> Llama:
        """The model's sizes as its keys say them; `ExportError` for another family than `KINDS`."""
        if self.architecture not in KINDS:
            raise self.untrainable(f"it is a {self.architecture}; supported: {', '.join(KINDS)}")
        try:
            return self._layout()
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise incomplete(self.path, error) from error

    def untrainable(self, reason: str) -> ExportError:
        """The error for a model that llama.cpp runs, but that has no counterpart in torch here."""
        return ExportError(f"{self.path} cannot be trained: {reason}; llama.cpp may still serve it")

    def _layout(self) -> Llama:
        kind, keys = self.architecture, self.keys
        hidden, heads = keys[f"{kind}.embedding_length"], keys[f"{kind}.attention.head_count"]
        head = keys.get(f"{kind}.attention.key_length", hidden // heads)
        theta = float(keys.get(f"{kind}.rope.freq_base", 10_000.0))
        frequencies = self.tensors.get(FREQUENCIES)
        return Llama(
            hidden=hidden,
            feed_forward=keys[f"{kind}.feed_forward_length"],
            layers=keys[f"{kind}.block_count"],
            heads=heads,
            kv_heads=keys.get(f"{kind}.attention.head_count_kv", heads),
            head=head,
            vocabulary=int(self.tensors[EMBEDDING].n_elements) // hidden,
            context=keys[f"{kind}.context_length"],
            tied=HEAD not in self.tensors,
            kind=kind,
            epsilon=shortest(keys[f"{kind}.attention.layer_norm_rms_epsilon"]),
            theta=theta,
            stretch=() if frequencies is None else tuple(map(float, frequencies.data)),
        )

    def _check(self, shape: Llama) -> None:
        """`ExportError` unless torch would compute what llama.cpp computes, from exactly these tensors."""
        kind, keys = self.architecture, self.keys
        for name, expected in (
            ("expert_count", 0),
            ("rope.scaling.type", "none"),
            ("rope.scale_linear", 1.0),
            ("rope.dimension_count", shape.head),
            ("attention.value_length", shape.head),
        ):
            if (found := keys.get(f"{kind}.{name}", expected)) != expected:
                raise self.untrainable(f"{kind}.{name} is {found!r}")
        if shape.stretch:
            followed = llama3_stretch(shape.head, llama3_rope(shape) | {"rope_theta": shape.theta})
            if not np.allclose(followed, shape.stretch, rtol=1e-4):
                raise self.untrainable("its rotary frequencies are not those of a Llama 3.1 to 3.3")
        expected_tensors = {tensor.name: tensor for tensor in shape.tensors()}
        for name in sorted(expected_tensors.keys() ^ self.tensors.keys()):
            raise self.untrainable(f"{'it has no' if name in expected_tensors else 'it also has a'} tensor {name}")
        for name, tensor in expected_tensors.items():
            found_shape = tuple(int(n) for n in reversed(self.tensors[name].shape))
            if found_shape != tensor.shape:
                raise self.untrainable(f"{name} has shape {found_shape}, its keys require {tensor.shape}")
        for type in {tensor.tensor_type for tensor in self.tensors.values()}:
            sample = next(t for t in self.tensors.values() if t.tensor_type == type)
            try:
                dequantize(np.atleast_2d(sample.data)[:1], type)
            except NotImplementedError as error:
                raise self.untrainable(f"its type {type.name.lower()} cannot be read") from error

    def rows(self, tensor: Tensor, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start` to `stop` of a tensor as f32, in the order of the file."""
        found = self.tensors[tensor.name]
        values: NDArray[np.float32] = dequantize(found.data[start:stop], found.tensor_type)
        return values.reshape(stop - start, *tensor.shape[1:])


def shortest(value: float) -> float:
    """The shortest decimal number that is this f32: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def llama3_rope(shape: Llama) -> dict[str, Any]:
    """The `rope_scaling` of a config.json from which the divisors `shape.stretch` follow (see `llama3_stretch`)."""
    factor, learned = float(max(shape.stretch)), LLAMA3_LEARNED
    low, high = LLAMA3_ROPE.values()
    for i, divisor in enumerate(shape.stretch):
        if 1 < divisor < factor:  # interpolated: its wavelength tells the context of pre-training
            share = (1 / divisor - 1 / factor) / (1 - 1 / factor)
            wave = 2 * math.pi * shape.theta ** (2 * i / shape.head)
            learned = round(wave * (low + share * (high - low)))
            break
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE, "original_max_position_embeddings": learned}


def read_header(path: Path) -> Header:
    """The header of a model's GGUF file.

    Raises `ExportError` for a file that is missing, cut or damaged, and for one that is no whole text model: an
    adapter, an image encoder, a part of a split model.
    """
    try:
        reader = GGUFReader(path)
        fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        keys = {name: field.contents() for name, field in fields.items()}
        sizes = {name: sum(int(part.nbytes) for part in field.parts) for name, field in fields.items()}
        header = Header(path, keys, sizes, {tensor.name: tensor for tensor in reader.tensors})
        if int(keys.get("split.count", 0)) > 1:
            raise ExportError(_split_message(path, int(keys["split.count"])))
        if "general.architecture" not in keys:
            raise KeyError("general.architecture")
    except FileNotFoundError as error:
        raise ExportError(f"there is no file {path}; check the name") from error
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise incomplete(path, error) from error
    if problem := not_a_model(path, keys):
        raise ExportError(problem)
    return header


def _split_message(path: Path, count: int) -> str:
    parts = parts_of(path)
    if missing := [part.name for part in parts if not part.is_file()]:
        return f"{path} is one of {count} parts, and {missing[0]} is missing: put all of them into one folder"
    first, last = (parts[0].name, parts[-1].name) if parts else (path.name, f"part {count}")
    join = f"llama-gguf-split --merge {first} whole.gguf"
    return f"{path} is one of {count} parts ({first} to {last}); join them first: {join}"
