"""The machine's limit: every token reads all weights once, so that memory bandwidth limits tokens per second."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
from gguf import GGUFReader

from cogumi.core.types import Request
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.evaluate.bench.paired import Row, Setup, alternate, answer, decode_rate

ARRAY = 1 << 28
"""Bytes that each thread reads: far more than any processor cache."""
PROMPT, ANSWER = 16, 64


class Memory:
    """Measures memory bandwidth by reading arrays of `ARRAY` bytes, one per thread."""

    def __init__(self, threads: int) -> None:
        self._arrays = [np.ones(ARRAY // 4, np.int32) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)

    def bandwidth(self) -> float:
        """Bytes per second, best of three; the reduction takes one comparison per 4 bytes and releases the GIL."""
        times = []
        for _ in range(3):
            began = time.perf_counter()
            list(self._pool.map(np.max, self._arrays))
            times.append(time.perf_counter() - began)
        return len(self._arrays) * ARRAY / min(times)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def weight_bytes(model: Path) -> int:
    """Bytes of weights read per token: all weights, except that an untied embedding contributes a single row."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(model).tensors}
    total = sum(int(tensor.n_bytes) for tensor in tensors.values())
    if "output.weight" not in tensors:
        return total
    embedding = tensors["token_embd.weight"]
    return total - int(embedding.n_bytes) + int(embedding.n_bytes // embedding.shape[1])


def roofline(setup: Setup) -> Row:
    """Achieved tokens per second against bandwidth / bytes per token, measured in turns."""
    engine = LlamaEngine(setup.model, threads=setup.threads)
    weights = weight_bytes(setup.model)
    length = PROMPT + ANSWER // 2
    bytes_per_token = weights + length * engine.cache_bytes
    with closing(engine), closing(Memory(setup.threads)) as memory:

        def achieved() -> float:
            return decode_rate(answer(engine, Request(prompt=setup.passage(PROMPT), max_tokens=ANSWER)))

        achieved()
        pairs = alternate(achieved, lambda: memory.bandwidth() / bytes_per_token, setup.tick)
    return pairs.row(
        "roofline",
        "tokens/s",
        least=0.6,
        bytes_per_token=bytes_per_token,
        cache_bytes=engine.cache_bytes,
        length=length,
        bandwidth_gb_s=round(float(np.median(pairs.theirs)) * bytes_per_token / 1e9, 2),
        threads=setup.threads,
    )
