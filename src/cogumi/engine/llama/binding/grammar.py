"""GBNF grammars that an answer cannot leave, by llama.cpp's parser."""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
from llama_cpp import llama_cpp as c
from numpy.typing import NDArray

from cogumi.core.errors import RequestError
from cogumi.engine.gbnf import check_grammar
from cogumi.engine.llama.binding.backend import errors, reason, utf8
from cogumi.engine.llama.binding.tokenizer import Tokenizer


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
