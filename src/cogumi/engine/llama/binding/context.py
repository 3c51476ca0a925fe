"""A llama.cpp context: one KV cache with one preallocated batch, used by a single thread."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from llama_cpp import llama_cpp as c
from numpy.typing import NDArray

from cogumi.core.errors import BundleError, RequestError
from cogumi.engine.llama.binding.backend import AMX, compute, errors, reason
from cogumi.engine.llama.binding.model import Model, cache_types
from cogumi.engine.llama.thread_control import ThreadControl

MAX_LOGITS = 1 << 24
"""Maximum number of logits returned by one batch (64 MiB of floats); bounds memory for large vocabularies."""
_FILLED = 4 if AMX else 0
"""Maximum number of idle sequences between two rows that are computed with them.

llama.cpp computes only consecutive sequences in one pass; after a gap it makes another pass over all weights. With AMX
a pass costs as much as six more tokens in it, without as much as two (135M parameters, Q4_1, two cores).
"""


class Row(NamedTuple):
    """Consecutive tokens of one sequence from position `start` on; the last `outputs` of them return logits."""

    sequence: int
    tokens: Sequence[int]
    start: int
    outputs: int = 0


def adjacent(rows: Sequence[Row]) -> bool:
    """Whether no other sequence lies between those of the rows, so that llama.cpp computes them in one pass."""
    return all(later.sequence == row.sequence + 1 for row, later in pairwise(rows))


class Context:
    """A KV cache for `sequences` sequences of up to `length` tokens each; the adapter is fixed.

    `threads` is their number, or a control shared by contexts that run in turn and chooses it for each pass.

    The logits of a request must not depend on other requests nor on how its tokens are split into batches. Hence each
    sequence has its own stream in the cache, and values are bf16 with keys in f16: on CPUs the different types make
    llama.cpp use its attention kernel that works query by query. Measured at Q8_0: all logits bit-identical; with equal
    types, prompt chunks of 64 and contexts of 512 change logits by more than 1.
    """

    def __init__(
        self,
        model: Model,
        *,
        sequences: int,
        length: int,
        batch: int,
        threads: int | ThreadControl,
        cache: str = "f16",
        adapter: Any = None,
    ) -> None:
        self.batch, self.length = batch, length
        self._control = threads if isinstance(threads, ThreadControl) else None
        self._threads = threads.most if isinstance(threads, ThreadControl) else threads
        self.outputs = max(min(batch, MAX_LOGITS // model.tokenizer.size), min(batch, 64), sequences)
        params = c.llama_context_default_params()
        params.n_ctx = sequences * length
        params.n_batch = params.n_ubatch = batch
        params.n_seq_max = sequences
        params.n_outputs_max = params.n_outputs_max_per_seq = self.outputs
        params.n_threads = params.n_threads_batch = self._threads
        params.pooling_type = c.LLAMA_POOLING_TYPE_NONE
        params.kv_unified = False
        params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k, params.type_v = cache_types(cache)
        self._vocab, self._width, self.sequences = model.tokenizer.size, model.width, sequences
        errors.clear()
        self._weights = model.weights
        self._context = c.llama_init_from_model(model.weights.pointer, params)
        if not self._context:
            raise BundleError(f"cannot create a context for {model.path.name} ({reason()}); lower slots or context")
        if adapter is not None:
            scales = (ctypes.c_float * 1)(1.0)
            c.llama_set_adapters_lora(self._context, (c.llama_adapter_lora_p_ctypes * 1)(adapter), 1, scales)
        self._memory = c.llama_get_memory(self._context)
        self._hidden = False
        self._views: dict[int, NDArray[np.float32]] = {}
        self._allocate(batch)

    def _allocate(self, batch: int) -> None:
        """Allocate the arrays that the batch structure points to; each step only fills them."""
        self._token, self._position, self._sequence = (np.zeros(batch, np.int32) for _ in range(3))
        self._returned = np.zeros(batch, np.int8)
        self._ones = np.ones(batch, np.int32)
        int_p = ctypes.POINTER(ctypes.c_int32)
        first = self._sequence.ctypes.data
        self._sequence_p = (int_p * batch)(*(ctypes.cast(first + 4 * i, int_p) for i in range(batch)))
        self._batch = c.llama_batch(
            n_tokens=0,
            token=self._token.ctypes.data_as(int_p),
            embd=None,
            pos=self._position.ctypes.data_as(int_p),
            n_seq_id=self._ones.ctypes.data_as(int_p),
            seq_id=self._sequence_p,
            logits=self._returned.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def decode(self, rows: Sequence[Row], *, hidden: bool = False) -> NDArray[np.float32]:
        """Run one batch; returns the logits (outputs, vocabulary) in the order of `rows`.

        Their sequences must ascend, because llama.cpp would compute others one after another. With `hidden`, which
        requires that every token is an output, `hidden()` has their hidden states. The array is llama.cpp's own
        memory: it is valid until the next call only.
        """
        assert all(row.sequence < later.sequence for row, later in pairwise(rows))
        assert not hidden or all(len(row.tokens) == row.outputs for row in rows)
        if hidden != self._hidden:
            c.llama_set_embeddings(self._context, hidden)
            self._hidden = hidden
        fillers = self._fillers(rows)
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        returned: list[int] = []
        for sequence, run, start, outputs in sorted([*rows, *fillers]) if fillers else rows:
            n = len(run)
            tokens += run
            positions += range(start, start + n)
            sequences += [sequence] * n
            returned += [0] * (n - outputs) + [1] * outputs
        n, outputs = len(tokens), sum(returned)
        if not 0 < n <= self.batch or outputs > self.outputs:
            raise RequestError(f"a batch of {n} tokens and {outputs} outputs exceeds {self.batch} and {self.outputs}")
        self._token[:n] = tokens
        self._position[:n] = positions
        self._sequence[:n] = sequences
        self._returned[:n] = returned
        self._batch.n_tokens = n
        status = self._run(n)
        if status:
            raise RequestError(f"llama.cpp could not run a batch of {n} tokens (status {status}: {reason()})")
        for filler in fillers:
            self.trim(filler.sequence, filler.start)
        return self._view(c.llama_get_logits(self._context), self._vocab)[:outputs]

    def _fillers(self, rows: Sequence[Row]) -> list[Row]:
        """One token of each idle sequence in a small gap between rows, to be removed after the pass; see `_FILLED`."""
        if not _FILLED or self._hidden:  # with hidden states every token would be an output
            return []
        room = self.batch - sum(len(row.tokens) for row in rows)
        fillers: list[Row] = []
        for row, later in pairwise(rows):
            idle = range(row.sequence + 1, later.sequence)
            if len(idle) > min(_FILLED, room - len(fillers)):
                continue
            gap = [Row(i, (0,), c.llama_memory_seq_pos_max(self._memory, i) + 1) for i in idle]
            if all(filler.start < self.length for filler in gap):
                fillers += gap
        return fillers

    def _run(self, tokens: int) -> int:
        """Run the batch with the number of threads that is fastest just now."""
        control = self._control
        if control is None:
            return int(compute(self._threads, lambda: c.llama_decode(self._context, self._batch)))
        if (threads := control.choose(tokens)) != self._threads:
            c.llama_set_n_threads(self._context, threads, threads)
            self._threads = threads
        began = time.perf_counter()
        status = int(compute(threads, lambda: c.llama_decode(self._context, self._batch)))
        control.observe(threads, tokens, time.perf_counter() - began)
        return status

    def hidden(self) -> NDArray[np.float32]:
        """Hidden states (outputs, width) after the final norm of the last batch, which must have asked for them."""
        return self._view(c.llama_get_embeddings(self._context), self._width)

    def _view(self, pointer: Any, columns: int) -> NDArray[np.float32]:
        address = ctypes.addressof(pointer.contents)
        view = self._views.get(address)
        if view is None or view.shape[1] != columns:
            if len(self._views) > 8:
                self._views.clear()
            view = np.ctypeslib.as_array(pointer, (self.outputs, columns))
            self._views[address] = view
        return view

    def trim(self, sequence: int, length: int) -> None:
        """Remove a sequence's tokens from position `length` on."""
        c.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def clear(self) -> None:
        """Remove all tokens of all sequences."""
        c.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        """Free the cache."""
        if self._context:
            c.llama_free(self._context)
            self._context = None
