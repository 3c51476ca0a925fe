"""The safetensors files of a model folder, read without torch: what a plan knows before a model is loaded (SPEC M1)."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cogumi.core.errors import ArtifactError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a value; other types have one."""
CHUNK = 1 << 22
"""Bytes compared at a time."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's type and its bytes `start` to `stop` in a file."""

    file: Path
    dtype: str
    start: int
    stop: int


def check_weight_files(folder: Path) -> None:
    """`ArtifactError` for a folder with PyTorch's `.bin` files alone: they are programs, and are not opened."""
    if not any(folder.glob("*.safetensors")) and (old := sorted(path.name for path in folder.glob("*.bin"))):
        raise ArtifactError(
            f"{folder} has its weights in {old[0]} only; save the model as safetensors "
            "(transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other_folder))"
        )


def stored_weights(folder: Path) -> int:
    """The number of weights in the safetensors files; files that cannot be read count nothing."""
    found = 0
    for path in folder.glob("*.safetensors"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
            found += sum((t.stop - t.start) // WIDTHS.get(t.dtype, 1) for t in _tensors(path).values())
    return found


def has_own_head(folder: Path) -> bool:
    """Whether the output head in the files differs from the embedding; then the two are not tied, whatever
    `tie_word_embeddings` says. Files that cannot be read have none: whoever loads them says what is wrong.
    """
    found: dict[str, StoredTensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            found |= {name: tensor for name, tensor in _tensors(path).items() if name in (EMBEDDING, HEAD)}
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            return False
    if len(found) < 2:
        return False
    one, two = found[EMBEDDING], found[HEAD]
    if (one.dtype, one.stop - one.start) != (two.dtype, two.stop - two.start):
        return True
    with one.file.open("rb") as a, two.file.open("rb") as b:
        a.seek(one.start)
        b.seek(two.start)
        left = one.stop - one.start
        while left > 0:
            size = min(CHUNK, left)
            if a.read(size) != b.read(size):
                return True
            left -= size
    return False


def _tensors(path: Path) -> dict[str, StoredTensor]:
    """The header of a safetensors file: 8 bytes of length, JSON, then the data."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError("truncated")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    at = 8 + length
    return {
        name: StoredTensor(path, entry["dtype"], at + entry["data_offsets"][0], at + entry["data_offsets"][1])
        for name, entry in header.items()
    }
