"""Sentence embeddings by ONNX Runtime (SPEC F5, F12): one vector of length 1 per text.

Texts go through one at a time. An int8 model scales its activations by the largest of the whole batch, so in company
a text's vector would depend on its neighbours; and on one thread a batch is no faster.
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
from cogumi.engine.onnx import open_session

MODEL, TOKENIZER = "embedder.onnx", "embedder.json"
CHARACTERS = 4096
"""Looked at in a text: more than a model reads, so that no length makes a text expensive."""


class Embedder:
    """The encoder in a folder (`embedder.onnx`, `embedder.json`), on one thread; several threads may call it.

    Raises `BundleError` if the folder holds none, or if model and tokenizer do not belong together.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._folder = folder
        path = folder / TOKENIZER
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # for a text that is no tokenizer the library raises nothing more special
            raise BundleError(f"cannot read the tokenizer {path}: {error}; build the bundle again") from error
        self._session = open_session(folder / MODEL)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1 or not isinstance(outputs[0].shape[-1], int):
            raise BundleError(f"{folder / MODEL} is no sentence encoder of one input; build the bundle again")
        self._input, self.width = inputs[0].name, int(outputs[0].shape[-1])

    @cached_property
    def identity(self) -> str:
        """What tells vectors of this encoder from those of another: a hash of its two files."""
        return "-".join(sha256(self._folder / name)[:16] for name in (MODEL, TOKENIZER))

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors [n, width] of length 1, whatever the texts hold; what a model cannot read at the end is left out."""
        rows = [self._vector(self._encode(text).ids) for text in texts]
        return np.stack(rows) if rows else np.empty((0, self.width), dtype=np.float32)

    def reads_all(self, text: str) -> bool:
        """Whether the vector stands for the whole text, not only for its beginning."""
        return len(text) <= CHARACTERS and not self._encode(text).overflowing

    def _encode(self, text: str) -> Any:
        # a lone surrogate is no text for the tokenizer
        return self._tokenizer.encode(text[:CHARACTERS].encode("utf-8", "replace").decode("utf-8"))

    def _vector(self, ids: Sequence[int]) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self._session.run(None, {self._input: np.array([ids], dtype=np.int64)})[0][0]
        return row
