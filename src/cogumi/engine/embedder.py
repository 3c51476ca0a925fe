"""Sentence embeddings by ONNX Runtime (SPEC F5, F12): one vector of length 1 per text.

Texts are encoded one at a time. An int8 model scales its activations by the maximum of the whole batch, so in a batch
a text's vector would depend on the other texts; and on one thread a batch is not faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.core.errors import BundleError
from cogumi.core.files import sha256
from cogumi.core.packages import load
from cogumi.engine.onnx import open_session

MODEL, TOKENIZER = "embedder.onnx", "embedder.json"
CHARACTERS = 4096
"""Maximum number of characters tokenized per text: more than a model reads, so that long texts stay cheap."""


class Embedder:
    """The encoder in a folder (`embedder.onnx`, `embedder.json`); runs on one thread, may be called from several.

    Raises `BundleError` if a file is missing or invalid, `PackageError` if a package that it needs is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = folder / TOKENIZER
        tokenizers: Any = load("tokenizers", f"the sentence encoder in {folder}")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception for an invalid tokenizer
            raise BundleError(f"cannot read the tokenizer {path}: {error}; build the bundle again") from error
        self._session = open_session(folder / MODEL)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1 or not isinstance(outputs[0].shape[-1], int):
            raise BundleError(f"{folder / MODEL} is not a sentence encoder with one input; build the bundle again")
        self._input, self.width = inputs[0].name, int(outputs[0].shape[-1])

    @cached_property
    def identity(self) -> str:
        """Hash of the two files; vectors are comparable only if it is equal."""
        return "-".join(sha256(self._folder / name)[:16] for name in (MODEL, TOKENIZER))

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors [n, width] of length 1 for any texts; a text beyond the model's context is truncated."""
        rows = [self._vector(self._encode(text).ids) for text in texts]
        return np.stack(rows) if rows else np.empty((0, self.width), dtype=np.float32)

    def reads_all(self, text: str) -> bool:
        """Whether the vector covers the whole text (it is not truncated)."""
        return len(text) <= CHARACTERS and not self._encode(text).overflowing

    def _encode(self, text: str) -> Any:
        # the tokenizer does not accept lone surrogates
        return self._tokenizer.encode(text[:CHARACTERS].encode("utf-8", "replace").decode("utf-8"))

    def _vector(self, ids: Sequence[int]) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self._session.run(None, {self._input: np.array([ids], dtype=np.int64)})[0][0]
        return row
