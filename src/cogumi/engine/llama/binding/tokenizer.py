"""The tokenizer inside a GGUF file."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as c

from cogumi.core.chat_template import Controls, closing_token, render_pieces
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
        self._name = path.name
        bos, text_end = self._declared("bos", c.llama_vocab_bos), self._declared("eos", c.llama_vocab_eos)
        self._bos, self._bos_text, self._eos_text = bos, self._special(bos), self._special(text_end)
        self._adds_bos = bos >= 0 and bool(c.llama_vocab_get_add_bos(self.vocab))
        self._invented = {int(c.llama_vocab_eos(self.vocab))} - {text_end}
        self._eos = self._end_of_answer(text_end)
        if self._eos < 0:
            raise BundleError(f"{path} has no end-of-answer token; export it again with its tokenizer")

    def _declared(self, name: str, ask: Callable[[Any], int]) -> int:
        """The special token of that name; -1 if the file does not declare it, though llama.cpp then reports id 11 of a
        byte-level vocabulary, an ordinary word. Of a SentencePiece vocabulary its default is the usual token.
        """
        key, buffer = f"tokenizer.ggml.{name}_token_id".encode(), ctypes.create_string_buffer(32)
        declared = c.llama_model_meta_val_str(self._weights.pointer, key, buffer, len(buffer)) >= 0
        found = int(ask(self.vocab))
        usual = c.llama_vocab_type(self.vocab) == c.LLAMA_VOCAB_TYPE_SPM
        return found if 0 <= found < self._size and (declared or usual) else -1

    def _end_of_answer(self, text_end: int) -> int:
        """The control token that the template writes after an assistant's message, if generation ends with it; else the
        declared end of a text; else llama.cpp's guess by the names of tokens.
        """
        closing = closing_token(self.template, self._controls, bos=self._bos_text, eos=self._eos_text)
        for token in self.encode(closing, special=True)[:1] if closing else ():
            if token in self.ends:
                return token
        return text_end if text_end >= 0 else int(c.llama_vocab_eot(self.vocab))

    @cached_property
    def _controls(self) -> Controls:
        """The names that llama.cpp reads as one token in a text with special tokens, and never in a user's text."""
        wanted = c.LLAMA_TOKEN_ATTR_CONTROL | c.LLAMA_TOKEN_ATTR_UNKNOWN
        attribute, vocab = c.llama_vocab_get_attr, self.vocab
        return Controls(frozenset(self._special(i) for i in range(self._size) if attribute(vocab, i) & wanted))

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
        eos = self._eos_text or self._special(self._eos)
        return {"bos_token": self._bos_text or None, "eos_token": eos, "chat_template": self.template}

    @cached_property
    def ends(self) -> frozenset[int]:
        """The ids that end generation."""
        return frozenset(i for i in range(self._size) if c.llama_vocab_is_eog(self.vocab, i)) - self._invented

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

    def _special(self, token: int) -> str:
        """The name of a token, empty for -1."""
        return self._read_piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        return b"".join(map(self.piece, ids)).decode("utf-8", "replace")

    def render(self, request: Request) -> list[int]:
        """Prompt ids of a request: its messages through the chat template, or its raw prompt."""
        if request.prompt is not None:
            if isinstance(request.prompt, str):
                return self._begun(self.encode(request.prompt, special=True))
            if not all(0 <= i < self._size for i in request.prompt):
                raise RequestError(f"the prompt contains an id outside the vocabulary of {self._size}")
            return list(request.prompt)
        if self.template is None:
            raise RequestError(f"{self._name} has no chat template; give a prompt instead of messages")
        template, bos, eos = self.template, self._bos_text, self._eos_text
        pieces = render_pieces(template, request.messages, self._controls, tools=request.tools, bos=bos, eos=eos)
        return self._begun([i for text, special in pieces for i in self.encode(text, special=special)])

    def _begun(self, ids: list[int]) -> list[int]:
        """The ids with one bos before them, if the model wants one; a template may have written it."""
        return [self._bos, *ids] if self._adds_bos and ids[:1] != [self._bos] else ids

    def same_vocabulary(self, other: Tokenizer) -> bool:
        """Whether both vocabularies map every id to the same text, including special tokens."""
        if self._size != other._size or self._eos != other._eos:
            return False
        text, vocab, rival = c.llama_vocab_get_text, self.vocab, other.vocab
        return all(text(vocab, i) == text(rival, i) for i in range(self._size))
