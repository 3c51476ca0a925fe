"""A thin typed wrap of llama.cpp's C interface: the only file that imports llama_cpp.

`Model` is a memory-mapped GGUF file with its tokenizer and adapters; `Context` is one key-value cache with
one preallocated batch, and belongs to one thread. What would kill the process is refused before the call.
"""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from llama_cpp import llama_cpp as c
from llama_cpp._ggml import libggml as ggml
from llama_cpp.llama_grammar import json_schema_to_gbnf
from numpy.typing import NDArray

from cogumi.errors import BundleError, ExportError, RequestError
from cogumi.runtime.schema import check_grammar, check_schema
from cogumi.template import render_pieces
from cogumi.types import Request

T = TypeVar("T")

MAX_LOGITS = 1 << 24
"""Most logits one batch may return (64 MiB of floats), so that a large vocabulary does not eat the memory."""

_ERROR_LEVEL = 4  # ggml.h
_GGML_TYPE_BF16 = 30  # ggml.h; the Python package does not name it
_complaints: list[str] = []


@c.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_errors(level: int, text: bytes, _user_data: Any) -> None:
    if level == _ERROR_LEVEL and text.strip():
        _complaints.append(text.decode("utf-8", "replace").strip())


c.llama_log_set(_keep_errors, ctypes.c_void_p(0))
c.llama_backend_init()


def _reason() -> str:
    """llama.cpp's first complaint since the last clearing: later ones only say that the caller failed too."""
    return _complaints[0] if _complaints else "llama.cpp gave no reason"


_compute = ThreadPoolExecutor(1, thread_name_prefix="llama")


def _computed(threads: int, work: Callable[[], T]) -> T:
    """Run llama.cpp's parallel work, always in the same thread of this process.

    OpenMP keeps a team of threads for each thread that ever called it, and lets all of them doze at every barrier
    once their sum exceeds the processors: measured on two cores, 42 instead of 33 ms a token. Two models computing
    at a time would be slower still.
    """
    return work() if threads == 1 else _compute.submit(work).result()


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError("the text holds half of a surrogate pair; send whole characters") from error


class _Weights:
    """Owns a loaded model: it is unmapped when the last tokenizer and context that use it are gone."""

    def __init__(self, pointer: Any) -> None:
        self.pointer = pointer
        weakref.finalize(self, c.llama_model_free, pointer).atexit = False


class Tokenizer:
    """`runtime.engine.Tokenizer` over the vocabulary and chat template inside a GGUF file. Thread-safe."""

    def __init__(self, weights: _Weights, path: Path) -> None:
        self._weights, model = weights, weights.pointer
        self._vocab = c.llama_model_get_vocab(model)
        self._pieces: dict[int, bytes] = {}
        self._size = int(c.llama_vocab_n_tokens(self._vocab))
        template = c.llama_model_chat_template(model, None)
        try:
            self.template: str | None = template.decode("utf-8") if template else None
        except UnicodeDecodeError as error:
            raise BundleError(
                f"the chat template in {path} is damaged ({error.reason}); copy the file again"
            ) from error
        turn_end, text_end = int(c.llama_vocab_eot(self._vocab)), int(c.llama_vocab_eos(self._vocab))
        self._eos = turn_end if turn_end >= 0 else text_end
        if self._eos < 0:
            raise BundleError(f"{path} names no end-of-answer token; export it again with its tokenizer")
        self._name = path.name

    @property
    def size(self) -> int:
        """Number of ids."""
        return self._size

    @property
    def eos(self) -> int:
        """The id that ends an answer."""
        return self._eos

    @property
    def settings(self) -> dict[str, str | None]:
        """`bos_token`, `eos_token` and `chat_template`, as `runtime.engine.Tokenizer` has them."""
        bos = int(c.llama_vocab_bos(self._vocab))
        eos = self._read_piece(self._eos, special=True).decode("utf-8")
        start = self._read_piece(bos, special=True).decode("utf-8") if bos >= 0 else None
        return {"bos_token": start, "eos_token": eos, "chat_template": self.template}

    def ends(self, token: int) -> bool:
        """Whether a token ends generation (a vocabulary may hold several such tokens)."""
        return bool(c.llama_vocab_is_eog(self._vocab, token))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`; special-token text becomes special ids only if `special` is set."""
        data = _utf8(text)
        room = len(data) + 8
        buffer = (c.llama_token * room)()
        n = c.llama_tokenize(self._vocab, data, len(data), buffer, room, False, special)
        if n < 0:
            raise RequestError(f"the text cannot be tokenized: {_reason()}")
        return list(buffer[:n])

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; empty for special tokens."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._read_piece(token, special=False)
        return known

    def _read_piece(self, token: int, special: bool) -> bytes:
        if not 0 <= token < self._size:
            raise RequestError(f"token id {token} is outside the vocabulary of {self._size}")
        buffer = ctypes.create_string_buffer(256)
        n = c.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = c.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:n]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        return b"".join(map(self.piece, ids)).decode("utf-8", "replace")

    def render(self, request: Request) -> list[int]:
        """Prompt ids of a request: its messages through the chat template, or its raw prompt."""
        if request.prompt is not None:
            if isinstance(request.prompt, str):
                bos = [int(c.llama_vocab_bos(self._vocab))] if c.llama_vocab_get_add_bos(self._vocab) else []
                return bos + self.encode(request.prompt)
            if not all(0 <= i < self._size for i in request.prompt):
                raise RequestError(f"the prompt holds an id outside the vocabulary of {self._size}")
            return list(request.prompt)
        if self.template is None:
            raise RequestError(f"{self._name} has no chat template; give a prompt instead of messages")
        own = self.settings
        pieces = render_pieces(self.template, request.messages, bos=own["bos_token"] or "", eos=own["eos_token"] or "")
        return [i for text, is_template in pieces for i in self.encode(text, special=is_template)]

    def same_vocabulary(self, other: Tokenizer) -> bool:
        """Whether every id means the same in both, special tokens included."""
        if self._size != other._size or self._eos != other._eos:
            return False
        text, vocab, rival = c.llama_vocab_get_text, self._vocab, other._vocab
        return all(text(vocab, i) == text(rival, i) for i in range(self._size))


class Grammar:
    """`runtime.sampling.Grammar` by llama.cpp's GBNF parser; belongs to one generation."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        check_grammar(text)
        _complaints.clear()
        self._tokenizer = tokenizer  # keeps the vocabulary alive
        self._sampler = c.llama_sampler_init_grammar(tokenizer._vocab, _utf8(text), b"root")
        if not self._sampler:
            raise RequestError(f"the grammar cannot be used ({_reason()}); write GBNF with a rule named root")
        weakref.finalize(self, c.llama_sampler_free, self._sampler).atexit = False
        self._candidates = np.zeros(tokenizer.size, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._candidates["id"] = np.arange(tokenizer.size)
        data = self._candidates.ctypes.data_as(ctypes.POINTER(c.llama_token_data))
        self._array = c.llama_token_data_array(data=data, size=tokenizer.size, selected=-1, sorted=False)
        self._one = (c.llama_token_data * 1)()
        self._single = c.llama_token_data_array(data=self._one, size=1, selected=-1, sorted=False)

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""
        self._one[0] = c.llama_token_data(token, 0.0, 0.0)
        c.llama_sampler_apply(self._sampler, ctypes.byref(self._single))
        return bool(self._one[0].logit == 0.0)

    def mask(self, logits: NDArray[np.float32]) -> None:
        """Set what may not come next to minus infinity, in place; `RequestError` if nothing is left."""
        self._candidates["logit"] = 0.0
        c.llama_sampler_apply(self._sampler, ctypes.byref(self._array))
        logits[self._candidates["logit"] != 0.0] = -np.inf
        if np.isneginf(logits.max()):
            raise RequestError("the grammar allows no token of this vocabulary here; loosen it")

    def accept(self, token: int) -> None:
        """Go on by one token. One that is not allowed is refused here: it would end the process in llama.cpp."""
        if not self.allows(token):
            raise RequestError(f"the grammar does not allow token {token} here")
        c.llama_sampler_accept(self._sampler, token)


_ANY_CHARACTER, _NO_CONTROL = r'[^"\\]', r'[^"\\\x00-\x1f\x7f]'  # of a string; raw control characters are no JSON


def schema_grammar(schema: str) -> str:
    """The GBNF grammar of a JSON schema (as text); `RequestError` if it is none that can be kept to."""
    check_schema(schema)
    try:
        return str(json_schema_to_gbnf(schema)).replace(_ANY_CHARACTER, _NO_CONTROL)
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise RequestError(f"the JSON schema cannot be used ({error}); simplify or correct it") from error


class Model:
    """A GGUF file mapped into memory. Raises `BundleError` if llama.cpp cannot use the file."""

    def __init__(self, path: Path, *, vocabulary_only: bool = False) -> None:
        if not path.is_file():
            raise BundleError(f"{path} does not exist; build or copy the model first")
        _complaints.clear()
        params = c.llama_model_default_params()
        params.vocab_only = vocabulary_only
        pointer = c.llama_model_load_from_file(os.fsencode(path), params)
        if not pointer:
            raise BundleError(f"{path} is not a whole GGUF model ({_reason()}); export or copy it again")
        self.path = path
        self.weights = _Weights(pointer)
        self.tokenizer = Tokenizer(self.weights, path)
        self.width = int(c.llama_model_n_embd(pointer))
        self.bytes = int(c.llama_model_size(pointer))

    def load_adapter(self, path: Path) -> Any:
        """Load a LoRA GGUF for contexts of this model; it lives as long as the model.

        With a rank divisible by 4, llama.cpp sums the f32 products of one token and of several in different
        orders (about 1e-5); with any other rank the adapter keeps results free of the batch, bit for bit.
        """
        if not path.is_file():
            raise BundleError(f"adapter {path} does not exist; build or copy it first")
        _complaints.clear()
        adapter = c.llama_adapter_lora_init(self.weights.pointer, os.fsencode(path))
        if not adapter:
            raise BundleError(f"{path} is no adapter for {self.path.name} ({_reason()}); use one trained on it")
        return adapter

    def free_adapter(self, adapter: Any) -> None:
        """Free a loaded adapter; no context may use it any more."""
        c.llama_adapter_lora_free(adapter)

    def cache_bytes(self, cache: str) -> int:
        """Bytes that one token takes in a key-value cache of that type (SPEC D8)."""
        model = self.weights.pointer
        key, value = (self._head(name) * int(c.llama_model_n_head_kv(model)) for name in ("key", "value"))
        row = ggml.ggml_row_size
        row.restype = ctypes.c_size_t
        of_key, of_value = cache_types(cache)
        one = row(of_key, ctypes.c_int64(key)) + row(of_value, ctypes.c_int64(value))
        return int(c.llama_model_n_layer(model)) * int(one)

    def can_hold(self, cache: str) -> bool:
        """Whether the heads can be cut into the blocks of that cache type."""
        heads = (self._head(name) for name in ("key", "value"))
        return not any(n % ggml.ggml_blck_size(kind) for n, kind in zip(heads, cache_types(cache), strict=True))

    def _head(self, name: str) -> int:
        """Width of one attention head's keys or values."""
        model, buffer = self.weights.pointer, ctypes.create_string_buffer(64)
        known = c.llama_model_meta_val_str
        if known(model, b"general.architecture", buffer, len(buffer)) >= 0:
            key = buffer.value.decode() + f".attention.{name}_length"
            if known(model, key.encode(), buffer, len(buffer)) >= 0:
                return int(buffer.value)
        return self.width // int(c.llama_model_n_head(model))


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer inside a GGUF file, without its weights. Raises `BundleError` if there is none."""
    return Model(path, vocabulary_only=True).tokenizer


def cache_types(name: str) -> tuple[int, int]:
    """llama.cpp's types of keys and values for a cache type of ours; `RequestError` if there is none."""
    on_cpu = not c.llama_supports_gpu_offload()
    types = {
        "f16": (c.GGML_TYPE_F16, _GGML_TYPE_BF16 if on_cpu else c.GGML_TYPE_F16),
        "q8_0": (c.GGML_TYPE_Q8_0, c.GGML_TYPE_Q8_0),
        "q4_0": (c.GGML_TYPE_Q4_0, c.GGML_TYPE_Q4_0),
    }
    if name not in types:
        raise BundleError(f"unknown cache type {name!r}; use one of {', '.join(types)}")
    return types[name]


class Row(NamedTuple):
    """A run of tokens of one sequence from position `start` on; the last `outputs` of them return logits."""

    sequence: int
    tokens: Sequence[int]
    start: int
    outputs: int = 0


class Context:
    """A key-value cache for `sequences` sequences of up to `length` tokens each; its adapter is for life.

    What a request computes must not depend on its neighbours nor on how its tokens were cut into batches.
    Hence a stream of its own in the cache for each sequence, and values in bf16 beside keys in f16: on CPUs the
    unequal types keep llama.cpp on its one attention kernel that works query by query. Measured at Q8_0: all
    logits bit-identical; with equal types, prompt chunks of 64 and contexts of 512 change them by whole units.
    """

    def __init__(
        self,
        model: Model,
        *,
        sequences: int,
        length: int,
        batch: int,
        threads: int,
        cache: str = "f16",
        adapter: Any = None,
    ) -> None:
        self.batch, self.length, self._threads = batch, length, threads
        self.outputs = max(min(batch, MAX_LOGITS // model.tokenizer.size), min(batch, 64), sequences)
        params = c.llama_context_default_params()
        params.n_ctx = sequences * length
        params.n_batch = params.n_ubatch = batch
        params.n_seq_max = sequences
        params.n_outputs_max = params.n_outputs_max_per_seq = self.outputs
        params.n_threads = params.n_threads_batch = threads
        params.pooling_type = c.LLAMA_POOLING_TYPE_NONE
        params.kv_unified = False
        params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k, params.type_v = cache_types(cache)
        self._vocab, self._width, self.sequences = model.tokenizer.size, model.width, sequences
        _complaints.clear()
        self._weights = model.weights
        self._context = c.llama_init_from_model(model.weights.pointer, params)
        if not self._context:
            raise BundleError(f"no context for {model.path.name} ({_reason()}); lower the slots or the context")
        if adapter is not None:
            scales = (ctypes.c_float * 1)(1.0)
            c.llama_set_adapters_lora(self._context, (c.llama_adapter_lora_p_ctypes * 1)(adapter), 1, scales)
        self._memory = c.llama_get_memory(self._context)
        self._hidden = False
        self._views: dict[int, NDArray[np.float32]] = {}
        self._allocate(batch)

    def _allocate(self, batch: int) -> None:
        """Arrays that the batch structure points into for ever; filling them is the only work per step."""
        self._token, self._position, self._sequence = (np.zeros(batch, np.int32) for _ in range(3))
        self._wanted = np.zeros(batch, np.int8)
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
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def decode(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Run one batch; returns the logits (outputs, vocabulary) in the order of `rows`.

        The array is llama.cpp's own memory: it is valid until the next call only.
        """
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        wanted: list[int] = []
        for sequence, run, start, outputs in rows:
            n = len(run)
            tokens += run
            positions += range(start, start + n)
            sequences += [sequence] * n
            wanted += [0] * (n - outputs) + [1] * outputs
        n, outputs = len(tokens), sum(wanted)
        if not 0 < n <= self.batch or outputs > self.outputs:
            raise RequestError(f"a batch of {n} tokens and {outputs} outputs exceeds {self.batch} and {self.outputs}")
        self._token[:n] = tokens
        self._position[:n] = positions
        self._sequence[:n] = sequences
        self._wanted[:n] = wanted
        self._batch.n_tokens = n
        status = _computed(self._threads, lambda: c.llama_decode(self._context, self._batch))
        if status:
            raise RequestError(f"llama.cpp could not run a batch of {n} tokens (status {status}: {_reason()})")
        return self._view(c.llama_get_logits(self._context), self._vocab)[:outputs]

    def hidden(self) -> NDArray[np.float32]:
        """Hidden states (outputs, width) after the final norm of the last batch, if they were wanted."""
        return self._view(c.llama_get_embeddings(self._context), self._width)

    def want_hidden(self, wanted: bool) -> None:
        """Also return hidden states from now on; every token of a batch must then be an output."""
        if wanted != self._hidden:
            c.llama_set_embeddings(self._context, wanted)
            self._hidden = wanted

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
        """Forget all of a sequence from position `length` on."""
        c.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def clear(self) -> None:
        """Forget everything."""
        c.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        """Free the cache."""
        if self._context:
            c.llama_free(self._context)
            self._context = None


def quantize(source: Path, target: Path, type: str) -> None:
    """Write `source` (an f32 or f16 GGUF) as `target` in a named type such as q8_0 or q4_k_m, atomically."""
    known = {
        name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_").lower(): value
        for name, value in vars(c).items()
        if name.startswith("LLAMA_FTYPE_") and name != "LLAMA_FTYPE_GUESSED"
    }
    if type not in known:
        raise ExportError(f"unknown GGUF type {type!r}; use one of {', '.join(sorted(known))}")
    params = c.llama_model_quantize_default_params()
    params.ftype = known[type]
    partial = target.with_name(target.name + ".partial")
    _complaints.clear()
    status = c.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(params))
    if status:
        partial.unlink(missing_ok=True)
        raise ExportError(f"llama.cpp could not quantize {source} to {type} ({_reason()})")
    os.replace(partial, target)


def quantize_rows(rows: NDArray[np.float32], type: str) -> NDArray[np.uint8]:
    """The bytes (n, bytes per row) of float rows (n, width) in a ggml type such as Q8_0, Q4_K or Q6_K.

    The width must be a multiple of the type's block (32, or 256 for K types).
    """
    number = getattr(c, f"GGML_TYPE_{type}", None)
    if number is None:
        raise ExportError(f"unknown ggml type {type!r}; use one such as Q8_0, Q4_K or Q6_K")
    n, width = rows.shape
    ggml.ggml_row_size.restype = ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    if width % ggml.ggml_blck_size(number):
        raise ExportError(f"rows of {width} values cannot be cut into {type} blocks; use a narrower type")
    out = np.empty((n, ggml.ggml_row_size(number, ctypes.c_int64(width))), np.uint8)
    source = np.ascontiguousarray(rows, np.float32)
    ggml.ggml_quantize_chunk(
        number,
        ctypes.c_void_p(source.ctypes.data),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_int64(0),
        ctypes.c_int64(n),
        ctypes.c_int64(width),
        None,
    )
    return out


def greedy_loop(model: Model, prompt: Sequence[int], n: int, *, length: int, threads: int) -> tuple[list[int], float]:
    """The barest greedy decoding that llama.cpp allows, with its default settings: the yardstick of benchmarks.

    Returns `n` ids after `prompt`, and the seconds of all steps after the first.
    """
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = length, length, threads, threads
    context = c.llama_init_from_model(model.weights.pointer, params)
    if not context:
        raise BundleError(f"no context for {model.path.name}; lower its length")
    size, ids = model.tokenizer.size, list(prompt)
    first, one = (c.llama_token * len(ids))(*ids), (c.llama_token * 1)()  # a batch points into them
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
        _computed(threads, decode)
        return ids[len(prompt) :], time.perf_counter() - began
    finally:
        c.llama_free(context)
