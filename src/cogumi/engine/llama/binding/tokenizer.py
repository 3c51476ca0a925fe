"""The tokenizer inside a GGUF file."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as c

from cogumi.core.chat_template import render_pieces
from cogumi.core.errors import BundleError, RequestError
from cogumi.core.types import Request
from cogumi.engine.llama.binding.backend import reason, utf8


class Weights:
    """Owns a loaded model; it is unmapped when the last tokenizer and context that use it are collected."""

    def __init__(self, pointer: Any) -> None:
        self.pointer = pointer
        weakref.finalize(self, c.llama_model_free, pointer).atexit = False


class Tokenizer:
    """`engine.protocol.Tokenizer` over the vocabulary and chat template inside a GGUF file. Thread-safe."""

    def __init__(self, weights: Weights, path: Path) -> None:
        self._weights, model = weights, weights.pointer
        self.vocab = c.llama_model_get_vocab(model)
        self._pieces: dict[int, bytes] = {}
        self._size = int(c.llama_vocab_n_tokens(self.vocab))
        template = c.llama_model_chat_template(model, None)
        try:
            self.template: str | None = template.decode("utf-8") if template else None
        except UnicodeDecodeError as error:
            raise BundleError(
                f"the chat template in {path} is damaged ({error.reason}); copy the file again"
            ) from error
        turn_end, text_end = int(c.llama_vocab_eot(self.vocab)), int(c.llama_vocab_eos(self.vocab))
        self._eos = turn_end if turn_end >= 0 else text_end
        if self._eos < 0:
            raise BundleError(f"{path} has no end-of-answer token; export it again with its tokenizer")
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
        """`bos_token`, `eos_token` and `chat_template`, as `engine.protocol.Tokenizer` has them."""
        bos = int(c.llama_vocab_bos(self.vocab))
        eos = self._read_piece(self._eos, special=True).decode("utf-8")
        start = self._read_piece(bos, special=True).decode("utf-8") if bos >= 0 else None
        return {"bos_token": start, "eos_token": eos, "chat_template": self.template}

    def ends(self, token: int) -> bool:
        """Whether a token ends generation (a vocabulary may have several such tokens)."""
        return bool(c.llama_vocab_is_eog(self.vocab, token))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`; special-token text becomes special ids only if `special` is set."""
        data = utf8(text)
        room = len(data) + 8
        buffer = (c.llama_token * room)()
        n = c.llama_tokenize(self.vocab, data, len(data), buffer, room, False, special)
        if n < 0:
            raise RequestError(f"the text cannot be tokenized: {reason()}")
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
        n = c.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = c.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:n]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        return b"".join(map(self.piece, ids)).decode("utf-8", "replace")

    def render(self, request: Request) -> list[int]:
        """Prompt ids of a request: its messages through the chat template, or its raw prompt."""
        if request.prompt is not None:
            if isinstance(request.prompt, str):
                bos = [int(c.llama_vocab_bos(self.vocab))] if c.llama_vocab_get_add_bos(self.vocab) else []
                return bos + self.encode(request.prompt)
            if not all(0 <= i < self._size for i in request.prompt):
                raise RequestError(f"the prompt contains an id outside the vocabulary of {self._size}")
            return list(request.prompt)
        if self.template is None:
            raise RequestError(f"{self._name} has no chat template; give a prompt instead of messages")
        own = self.settings
        pieces = render_pieces(self.template, request.messages, bos=own["bos_token"] or "", eos=own["eos_token"] or "")
        return [i for text, is_template in pieces for i in self.encode(text, special=is_template)]

    def same_vocabulary(self, other: Tokenizer) -> bool:
        """Whether both vocabularies map every id to the same text, including special tokens."""
        if self._size != other._size or self._eos != other._eos:
            return False
        text, vocab, rival = c.llama_vocab_get_text, self.vocab, other.vocab
        return all(text(vocab, i) == text(rival, i) for i in range(self._size))
