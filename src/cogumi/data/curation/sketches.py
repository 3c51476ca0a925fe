"""What `deduplicate` needs to know about each row of a pool, kept in files so that memory stays small (SPEC A4).

The files are appended to in chunks; `done.json`, written after each chunk, has their sizes. A killed run cuts them to
these sizes and continues with the next row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cogumi.core.files import write_json
from cogumi.core.packages import load
from cogumi.data.curation.shingles import Hashes, Texts, padded, shingles

SLOTS = 48
"""MinHash values of a row's question."""
DONE = "done.json"

_ROW = np.dtype([("question", "<u8"), ("answer", "<u8"), ("question_bytes", "<u4"), ("answer_bytes", "<u4")])
_FILES = ("rows", "signatures", "questions", "answers")
_SEED = 1


@dataclass(frozen=True, slots=True)
class Sketches:
    """n rows: 64-bit keys of question and answer [n], MinHash `signatures` of the questions [n, SLOTS], and the texts.

    Equal normalised texts have equal keys.
    """

    question_keys: Hashes
    answer_keys: Hashes
    signatures: NDArray[np.uint32]
    questions: Texts
    answers: Texts


class SketchFiles:
    """The sketches in `folder`; `rows` are finished, so that an interrupted run goes on there."""

    def __init__(self, folder: Path) -> None:
        self._paths = {name: folder / f"{name}.bin" for name in _FILES}
        self._done = folder / DONE
        folder.mkdir(parents=True, exist_ok=True)
        sizes = json.loads(self._done.read_bytes()) if self._done.is_file() else dict.fromkeys(_FILES, 0)
        for name, path in self._paths.items():
            with path.open("ab") as file:
                file.truncate(sizes[name])
        self.rows = sizes["rows"] // _ROW.itemsize

    def append(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Add rows, given as normalised question and normalised answer."""
        questions, answers = [padded(question) for question, _ in pairs], [padded(answer) for _, answer in pairs]
        rows = np.empty(len(pairs), _ROW)
        for name, texts in (("question", questions), ("answer", answers)):
            rows[name] = np.frombuffer(b"".join(blake2b(text, digest_size=8).digest() for text in texts), "<u8")
            rows[f"{name}_bytes"] = [len(text) for text in texts]
        parts = {
            "rows": rows.tobytes(),
            "signatures": signatures(b"".join(questions), rows["question_bytes"].astype(np.int64)).tobytes(),
            "questions": b"".join(questions),
            "answers": b"".join(answers),
        }
        for name, part in parts.items():
            with self._paths[name].open("ab") as file:
                file.write(part)
        self.rows += len(pairs)
        write_json(self._done, {name: path.stat().st_size for name, path in self._paths.items()})

    def open(self) -> Sketches:
        """All rows; signatures and texts stay in their files. There must be at least one row."""
        rows = np.fromfile(self._paths["rows"], _ROW)

        def texts(name: str) -> Texts:
            content = np.memmap(self._paths[f"{name}s"], np.uint8, "r")
            return Texts(content, rows[f"{name}_bytes"].astype(np.int64))

        minima = np.memmap(self._paths["signatures"], np.uint32, "r").reshape(-1, SLOTS)
        return Sketches(rows["question"].copy(), rows["answer"].copy(), minima, texts("question"), texts("answer"))


def signatures(texts: bytes, lengths: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The MinHash signatures [texts, SLOTS] of texts that stand one after another."""
    rensa = load("rensa", "stage 'deduplicate'")
    values, counts = shingles(np.frombuffer(texts, np.uint8), lengths)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(values, offsets, SLOTS, _SEED)
    minima = np.fromiter(chain.from_iterable(matrix.to_rows()), np.uint32, len(lengths) * SLOTS)
    return minima.reshape(-1, SLOTS)
