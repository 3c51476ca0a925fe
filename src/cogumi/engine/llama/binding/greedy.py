"""Minimal greedy decoding: the baseline of benchmarks."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from llama_cpp import llama_cpp as c

from cogumi.core.errors import BundleError, RequestError
from cogumi.engine.llama.binding.backend import compute
from cogumi.engine.llama.binding.model import Model


def greedy_loop(model: Model, prompt: Sequence[int], n: int, *, length: int, threads: int) -> tuple[list[int], float]:
    """Minimal greedy decoding with llama.cpp's default settings: the baseline of benchmarks.

    Returns `n` ids after `prompt`, and the seconds of all steps after the first.
    """
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = length, length, threads, threads
    context = c.llama_init_from_model(model.weights.pointer, params)
    if not context:
        raise BundleError(f"cannot create a context for {model.path.name}; lower its length")
    size, ids = model.tokenizer.size, list(prompt)
    first, one = (c.llama_token * len(ids))(*ids), (c.llama_token * 1)()  # the batch points to these arrays
    batch = c.llama_batch_get_one(first, len(ids))
    began = 0.0

    def decode() -> None:
        nonlocal batch, began
        for i in range(n):
            if c.llama_decode(context, batch):
                raise RequestError("llama.cpp could not run a batch")
            logits = np.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), (size,))
            one[0] = int(logits.argmax())
            ids.append(one[0])
            batch = c.llama_batch_get_one(one, 1)
            if i == 0:
                began = time.perf_counter()

    try:
        compute(threads, decode)
        return ids[len(prompt) :], time.perf_counter() - began
    finally:
        c.llama_free(context)
