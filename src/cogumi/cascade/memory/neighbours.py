"""Nearest-neighbour search in one partition by FAISS: exhaustive while it is small, with an inverted file when large.

Measured on one core at 100,000 entries of width 384: 6.8 ms flat (fp16), 0.5 ms with the inverted file; removing an
entry costs 11 ms flat, 0.1 ms there. HNSW cannot remove.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.core.packages import load

MANY = 10_000
"""Entries above which an inverted file is faster in spite of its training."""
LISTS, PROBED = 256, 16


class Neighbours:
    """Unit vectors [width] by id; not thread-safe. Raises `PackageError` if FAISS is not installed."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._faiss: Any = load("faiss", "finding similar questions")
        self._index: Any = self._faiss.IndexIDMap2(self._faiss.IndexScalarQuantizer(width, *self._half))
        self._inverted = False

    def add(self, ids: Sequence[int], vectors: NDArray[np.float32]) -> None:
        """Add vectors [n, width]; a large partition is converted to an inverted file."""
        self._faiss.omp_set_num_threads(1)  # for this thread; FAISS must not compete with the models
        self._index.add_with_ids(np.ascontiguousarray(vectors, np.float32), np.array(ids, np.int64))
        if not self._inverted and len(self) >= MANY:
            self._invert()

    def nearest(self, vector: NDArray[np.float32], k: int) -> list[tuple[int, float]]:
        """Up to `k` pairs (id, cosine), best first."""
        self._faiss.omp_set_num_threads(1)
        cosines, ids = self._index.search(vector[None], k)
        return [(int(i), float(c)) for i, c in zip(ids[0], cosines[0], strict=True) if i >= 0]

    def remove(self, ids: Sequence[int]) -> None:
        """Remove ids; unknown ids are ignored."""
        self._index.remove_ids(np.array(ids, np.int64))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def _half(self) -> tuple[int, int]:
        return self._faiss.ScalarQuantizer.QT_fp16, self._faiss.METRIC_INNER_PRODUCT

    def _invert(self) -> None:
        vectors = self._index.index.reconstruct_n(0, len(self))
        ids = self._faiss.vector_to_array(self._index.id_map)
        coarse = self._faiss.IndexFlatIP(self._width)
        index = self._faiss.IndexIVFScalarQuantizer(coarse, self._width, LISTS, *self._half)
        self._coarse = coarse  # keep it alive: the index holds only a pointer
        index.set_direct_map_type(self._faiss.DirectMap.Hashtable)  # removal by id without a search
        index.nprobe = PROBED
        index.train(vectors)
        index.add_with_ids(vectors, ids)
        self._index, self._inverted = index, True
