"""The weights of a Hugging Face folder, read a few rows at a time from one or several safetensors files, and their
importance matrix (SPEC D5).

A file is opened for every read and unmapped afterwards, so that memory holds only the rows in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from cogumi.compress.gguf.layout import Tensor, read_json
from cogumi.core.errors import ExportError
from cogumi.core.model_fingerprint import weights_sha256

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
IMPORTANCE = "importance.safetensors"
"""The file of stage `importance`."""
_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Weights:
    """The file and the shape of each tensor; `files` are all files, sorted by name."""

    files: tuple[Path, ...]
    file_of: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def load(cls, folder: Path, name: str = ONE) -> Weights:
        """Read the headers of the safetensors file `name` of a folder, or of the shards that its index names.

        Raises `ExportError` for files that are missing or truncated, that hold other types than floats, or that lack a
        tensor of the index.
        """
        index = folder / INDEX
        if not any(folder.glob("*.safetensors")) and (pickled := sorted(folder.glob("*.bin"))):
            raise ExportError(
                f"{folder} holds its weights as {pickled[0].name}, which can run code when it is opened; save the "
                "model as safetensors (save_pretrained of transformers does)"
            )
        if name != ONE or (folder / name).exists() or not index.exists():
            return cls._read_headers([folder / name])
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(Path(str(file)).name == file for file in shards.values()):
            raise ExportError(f"{index} has no weight_map of file names; copy the checkpoint again")
        found = cls._read_headers([folder / str(file) for file in sorted(set(shards.values()))])
        for tensor, file in shards.items():
            if found.file_of.get(tensor) != folder / file:
                raise ExportError(f"{folder / file} lacks {tensor}, which {index.name} lists for it; copy it again")
        return found

    @classmethod
    def _read_headers(cls, files: list[Path]) -> Weights:
        file_of: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with _opened(path) as file:
                for tensor in file.keys():  # noqa: SIM118
                    part = file.get_slice(tensor)
                    if part.get_dtype() not in _DTYPES:
                        known = ", ".join(_DTYPES)
                        raise ExportError(f"{path}: {tensor} is {part.get_dtype()}; save the model as one of {known}")
                    file_of[tensor], shapes[tensor] = path, tuple(part.get_shape())
        return cls(tuple(files), file_of, shapes)

    def rows(self, tensor: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start` to `stop` of a tensor as f32."""
        with _opened(self.file_of[tensor]) as file:
            values: NDArray[np.float32] = file.get_slice(tensor)[start:stop].float().numpy()
            return values

    @property
    def sha256(self) -> str:
        """The hash of a single file, or a hash over the hashes of several."""
        return weights_sha256(self.files)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, read through torch because numpy has no bfloat16."""
    try:
        file = safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing; give a full model or adapter folder") from error
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} is truncated or damaged ({error}); copy it again") from error
    with file:
        yield file


def read_importance(path: Path, tensors: Sequence[Tensor], weights: Weights) -> dict[str, NDArray[np.float32]]:
    """Importance of input columns, by GGUF name; `ExportError` unless measured on these weights, for every layer."""
    try:
        with safe_open(path, framework="np") as file:
            measured = (file.metadata() or {}).get("base_sha256")
            found: dict[str, NDArray[np.float32]] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} is missing or damaged ({error}); run stage 'importance' again") from error
    if measured != weights.sha256:
        raise ExportError(f"{path} was measured on another model; run stage 'importance' on the one to export")
    for tensor in tensors:
        if tensor.name in found or (len(tensor.shape) == 2 and tensor.name.startswith("blk.")):
            columns = found.get(tensor.name, np.empty(0, np.float32))
            if columns.shape != tensor.shape[1:] or not np.isfinite(columns).all():
                raise ExportError(f"{path}: {tensor.name} is missing or damaged; run stage 'importance' again")
    return found
