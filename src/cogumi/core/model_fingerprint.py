"""The fingerprint by which adapters, heads and bundles recognise the base they were made for (SPEC M2)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from cogumi.core.files import sha256
from cogumi.core.types import Artifact


def model_fingerprint(model: Artifact) -> str:
    """The metric `base_fingerprint` of a model that was made from a GGUF file, else the hash of its own weights.

    An adapter trained on the dequantized weights of a file so belongs to that file.
    """
    given = model.metrics.get("base_fingerprint")
    return str(given) if given else weights_sha256(_weight_files(model.path))


def weights_sha256(files: Sequence[Path]) -> str:
    """The hash of a single file, or a hash over the names and hashes of several."""
    if len(files) == 1:
        return sha256(files[0])
    lines = (f"{path.name} {sha256(path)}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    one = folder / "model.safetensors"
    shards = [] if one.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    return shards or [one]
