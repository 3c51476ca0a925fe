"""Lets a draft model with another vocabulary draft for a base (SPEC E3): both meet in the text they share.

String-level exact match (SLEM) of "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for
Heterogeneous Vocabularies" (arXiv 2502.05202): drafted ids become text, the text becomes ids of the base, and the base
verifies those. It is lossless, because only what the base's own verification settles is ever emitted; the ids proposed
are deterministic given the draft's (a point mass in `speculate.verify_sampled`).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Protocol

from cogumi.core.errors import BundleError, RequestError
from cogumi.core.types import Request
from cogumi.engine.protocol import Tokenizer

TAIL = 8
"""Ids of the draft at the end of the settled text that more text may still change; those before them are kept."""

PROBES = (
    "The quick Brown fox; it's 3 or 42,007.50?",
    "def f(x):\n\treturn  x[0] + 'A'\n\n\n    # end\r\n",
    " leading and trailing ",
    "\n\n",
    "\tx",
    "7 of 10",
    "Ünïcode, e\u0301 and œuvre",
    "Привет, Κόσμε",
    "日本語の文と한국어",
    "مرحبا नमस्ते",
    "🙂👩\u200d🔬",
)
"""Texts that both tokenizers must give back unchanged: scripts, code, white space, digits, emoji."""


class PieceTokenizer(Tokenizer, Protocol):
    """A tokenizer that also tells the bytes of each id, as `engine.llama.binding.tokenizer.Tokenizer` does."""

    template: str | None

    def ends(self, token: int) -> bool:
        """Whether a token ends generation."""

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; empty for special tokens."""


class _Vocabulary:
    """A tokenizer for text from the middle of a text: nothing is added in front.

    SentencePiece vocabularies put a space before what they encode. They get a line break to put it before, and its
    ids are taken off again.
    """

    def __init__(self, tokenizer: PieceTokenizer, owner: str) -> None:
        self.tokenizer, self.piece = tokenizer, tokenizer.piece
        if not 0 <= tokenizer.eos < tokenizer.size:
            raise BundleError(f"the {owner}'s tokenizer has no end-of-answer token; drop the draft, or use another")
        lost = ""
        for self._mark in ("", "\n"):
            self._marks = len(tokenizer.encode(self._mark))
            lost = next((probe for probe in PROBES if self.text(self.encode(probe)) != probe.encode()), "")
            if not lost:
                return
        back = self.text(self.encode(lost)).decode("utf-8", "replace")
        raise BundleError(
            f"the {owner}'s tokenizer loses text ({lost!r} comes back as {back!r}), so text cannot carry drafts from "
            "one model to the other; drop the draft, or use one with the base's tokenizer"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, and of nothing else."""
        return self.tokenizer.encode(self._mark + text)[self._marks :]

    def text(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for."""
        return b"".join(map(self.piece, ids))

    def pieces(self) -> set[bytes]:
        """All pieces of text in the vocabulary."""
        return {self.piece(i) for i in range(self.tokenizer.size)} - {b""}


class Bridge:
    """Translates between the vocabularies of a base and its draft.

    Raises `BundleError` with the reason where one of the tokenizers loses text or cannot end an answer.
    """

    def __init__(self, base: PieceTokenizer, draft: PieceTokenizer) -> None:
        self._base, self._draft = _Vocabulary(base, "base"), _Vocabulary(draft, "draft")

    @cached_property
    def overlap(self) -> float:
        """Share of the base's pieces that are pieces of the draft too; reads both vocabularies at first use."""
        base, draft = self._base.pieces(), self._draft.pieces()
        return len(base & draft) / len(base)

    def prompt(self, request: Request, ids: Sequence[int]) -> list[int]:
        """What the draft reads in place of the prompt `ids` of the base; at least one id.

        Messages go through the draft's own chat template if it takes them; else it reads the text of `ids`.
        """
        draft = self._draft.tokenizer
        try:
            own = [] if isinstance(request.prompt, tuple) else draft.render(request)
        except RequestError:
            own = []
        return own or draft.encode(self._base.tokenizer.decode(ids)) or [draft.eos]  # an end is also a beginning

    def text(self, request: Request, ids: Sequence[int]) -> BridgedText:
        """The translation of one answer to `request`, whose prompt is `ids` for the base."""
        return BridgedText(self._base, self._draft, self.prompt(request, ids))


class BridgedText:
    """One answer in both vocabularies while it grows. Belongs to one generation; made by `Bridge.text`."""

    def __init__(self, base: _Vocabulary, draft: _Vocabulary, prompt: list[int]) -> None:
        self._base, self._draft = base, draft
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._open: list[int] = []  # settled ids since the last whole character
        self._ids = prompt
        self._kept = len(prompt)  # ids that no longer change
        self._tail = ""  # the text behind them
        self._stale = False

    def append(self, token: int) -> None:
        """Add a token that the base has settled."""
        text = self._decoder.decode(self._base.piece(token))
        if self._held:
            self._open.append(token)
        else:
            self._open.clear()
        if text:
            self._tail += text
            self._stale = True

    @property
    def _held(self) -> bytes:
        """Bytes of a character that the base has begun; the draft has not seen them."""
        return self._decoder.getstate()[0]

    @property
    def ids(self) -> list[int]:
        """What the draft should have read: its prompt, then its own ids of the settled text (whole characters only).

        The list itself, not a copy: it grows when read after an `append`, and then only its last few ids may differ
        from what they were.
        """
        if self._stale:
            self._stale = False
            tail = self._draft.encode(self._tail)
            if len(tail) > 2 * TAIL:
                tail = self._keep(tail)
            self._ids[self._kept :] = tail
        return self._ids

    def _keep(self, tail: list[int]) -> list[int]:
        """Keep the ids of the older part of the tail for good; returns those of the rest.

        The cut is at an id behind which the encoding is the same without what stands before it. Where no such place
        is near, it is at the middle of the text.
        """
        for cut in range(len(tail) - TAIL, len(tail) - TAIL // 2):
            before = self._draft.text(tail[:cut]).decode("utf-8", "replace")
            rest = self._tail.removeprefix(before)
            if rest != self._tail and self._draft.encode(rest) == tail[cut:]:
                old, new = tail[:cut], tail[cut:]
                break
        else:
            middle = len(self._tail) // 2
            rest = self._tail[middle:]
            old, new = self._draft.encode(self._tail[:middle]), self._draft.encode(rest)
        self._ids[self._kept :] = old
        self._kept, self._tail = len(self._ids), rest
        return new

    def translate(self, drafted: Sequence[int]) -> list[int]:
        """Ids of the base for ids that the draft wrote behind `ids`: their text or a beginning of it.

        An end of the draft becomes the base's, and stays last. Any other special token, and bytes that are no whole
        character, end the translation before them.
        """
        draft = self._draft.tokenizer
        written = list(takewhile(lambda id: not draft.ends(id) and self._draft.piece(id), drafted))
        data, held = self._draft.text(written), self._held
        whole = _whole_characters(data)
        new = self._spelling(self._encode(whole, held), whole[len(held) :])
        ended = len(written) < len(drafted) and draft.ends(drafted[len(written)])
        if ended and held + self._base.text(new) == data:
            new.append(self._base.tokenizer.eos)
        return new

    def _encode(self, text: bytes, held: bytes) -> list[int]:
        """Ids of the base for drafted `text`, whose first bytes should be those `held`, settled already.

        The ids settled for them must come out again, or nothing is certain.
        """
        before = self._base.text(self._open)
        together = before[: len(before) - len(held)] + text
        if _whole_characters(together) != together:
            return []
        ids, n = self._base.encode(together.decode()), len(self._open)
        return ids[n:] if ids[:n] == self._open else []

    def _spelling(self, ids: list[int], text: bytes) -> list[int]:
        """The first `ids` that spell `text` byte for byte: all of them, unless the base changes what it encodes."""
        at = 0
        for i, id in enumerate(ids):
            piece = self._base.piece(id)
            if not piece or not text.startswith(piece, at):
                return ids[:i]
            at += len(piece)
        return ids


def _whole_characters(data: bytes) -> bytes:
    """`data` up to the first byte that is not part of a whole UTF-8 character."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start]
    return data
