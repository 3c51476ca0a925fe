"""Sentence embeddings of many texts, on all cores, with duplicates embedded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from cogumi.core.environment import usable_threads
from cogumi.engine.embedder import Embedder

CHUNK = 64


def embed_all(
    embedder: Embedder,
    texts: Sequence[str],
    progress: Callable[[int, int, Mapping[str, float]], None] = lambda done, total, figures: None,
) -> NDArray[np.float32]:
    """Vectors [n, width] of texts; `progress` counts unique texts."""
    index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    unique = list(index)
    chunks = [unique[i : i + CHUNK] for i in range(0, len(unique), CHUNK)]
    rows = [np.empty((0, embedder.width), dtype=np.float32)]
    with ThreadPoolExecutor(usable_threads()) as pool:
        for i, part in enumerate(pool.map(embedder.embed, chunks)):
            rows.append(part)
            progress(min((i + 1) * CHUNK, len(unique)), len(unique), {})
    return np.concatenate(rows)[[index[text] for text in texts]]
