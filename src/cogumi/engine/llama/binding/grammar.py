"""Grammars that an answer cannot leave: GBNF by llama.cpp's parser, JSON schemas turned into it."""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
from llama_cpp import llama_cpp as c
from llama_cpp.llama_grammar import json_schema_to_gbnf
from numpy.typing import NDArray

from cogumi.core.errors import RequestError
from cogumi.engine.json_schema import check_grammar, check_schema
from cogumi.engine.llama.binding.backend import errors, reason, utf8
from cogumi.engine.llama.binding.tokenizer import Tokenizer

_ANY_CHARACTER, _NO_CONTROL = r'[^"\\]', r'[^"\\\x00-\x1f\x7f]'  # of a string; raw control characters are no JSON


class Grammar:
    """`engine.sampling.Grammar` by llama.cpp's GBNF parser; belongs to one generation."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        check_grammar(text)
        errors.clear()
        self._tokenizer = tokenizer  # keeps the vocabulary alive
        self._sampler = c.llama_sampler_init_grammar(tokenizer.vocab, utf8(text), b"root")
        if not self._sampler:
            raise RequestError(f"the grammar cannot be used ({reason()}); write GBNF with a rule named root")
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


def schema_grammar(schema: str) -> str:
    """The GBNF grammar of a JSON schema (as text); `RequestError` if it is none that can be kept to."""
    check_schema(schema)
    try:
        return str(json_schema_to_gbnf(schema)).replace(_ANY_CHARACTER, _NO_CONTROL)
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise RequestError(f"the JSON schema cannot be used ({error}); simplify or correct it") from error
