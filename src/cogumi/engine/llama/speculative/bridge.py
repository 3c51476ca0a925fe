"""Speculative decoding with a draft model of another vocabulary (SPEC E3): ids are translated via their text.

String-level exact match (SLEM) of "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for
Heterogeneous Vocabularies" (arXiv 2502.05202): drafted ids become text, the text becomes ids of the base, and the base
verifies those. It is lossless, because only ids accepted by the base are emitted; the proposed ids are deterministic
given the draft's (a point mass in `speculation.verify_sampled`).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Protocol

from cogumi.core.errors import BundleError, RequestError
from cogumi.core.types import Request
from cogumi.engine.protocol import Tokenizer

TAIL = 8
"""Number of the draft's last ids that may still change when text is appended; earlier ids are final."""

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
"""Texts that both tokenizers must round-trip: scripts, code, white space, digits, emoji."""


class PieceTokenizer(Tokenizer, Protocol):
    """A tokenizer that may have a chat template, such as `engine.llama.binding.tokenizer.Tokenizer`."""

    template: str | None


class _Vocabulary:
    """Encodes text fragments without anything added in front.

    SentencePiece vocabularies prepend a space. For them a line break is prepended to the text, and its ids are removed
    from the result.
    """

    def __init__(self, tokenizer: PieceTokenizer, owner: str) -> None:
        self.tokenizer, self.piece = tokenizer, tokenizer.piece
        if not 0 <= tokenizer.eos < tokenizer.size:
            raise BundleError(f"the {owner}'s tokenizer has no end-of-answer token; remove or replace the draft")
        lost = ""
        for self._mark in ("", "\n"):
            self._marks = len(tokenizer.encode(self._mark))
            lost = next((probe for probe in PROBES if self.text(self.encode(probe)) != probe.encode()), "")
            if not lost:
                return
        back = self.text(self.encode(lost)).decode("utf-8", "replace")
        raise BundleError(
            f"the {owner}'s tokenizer does not round-trip text ({lost!r} becomes {back!r}), so drafts cannot be "
            "translated; remove the draft, or use one with the base's tokenizer"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of exactly `text`."""
        return self.tokenizer.encode(self._mark + text)[self._marks :]

    def text(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`."""
        return b"".join(map(self.piece, ids))


class Bridge:
    """Translates between the vocabularies of a base and its draft.

    Raises `BundleError` if one of the tokenizers does not round-trip text or has no end-of-answer token.
    """

    def __init__(self, base: PieceTokenizer, draft: PieceTokenizer) -> None:
        self._base, self._draft = _Vocabulary(base, "base"), _Vocabulary(draft, "draft")

    def prompt(self, request: Request, ids: Sequence[int]) -> list[int]:
        """The draft's prompt ids for the prompt `ids` of the base; at least one id.

        Messages are rendered by the draft's own chat template if it accepts them; else the text of `ids` is encoded.
        """
        draft = self._draft.tokenizer
        try:
            own = [] if isinstance(request.prompt, tuple) else draft.render(request)
        except RequestError:
            own = []
        return own or draft.encode(self._base.tokenizer.decode(ids)) or [draft.eos]  # never empty

    def text(self, request: Request, ids: Sequence[int]) -> BridgedText:
        """A translator for one answer to `request`, whose prompt is `ids` for the base."""
        return BridgedText(self._base, self._draft, self.prompt(request, ids))


class BridgedText:
    """One growing answer in both vocabularies. Belongs to one generation; created by `Bridge.text`."""

    def __init__(self, base: _Vocabulary, draft: _Vocabulary, prompt: list[int]) -> None:
        self._base, self._draft = base, draft
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._open: list[int] = []  # accepted ids since the last whole character
        self._ids = prompt
        self._kept = len(prompt)  # number of final ids
        self._tail = ""  # the text after them
        self._stale = False

    def append(self, token: int) -> None:
        """Add a token accepted by the base."""
        text = self._decoder.decode(self._base.piece(token))
        if self._partial:
            self._open.append(token)
        else:
            self._open.clear()
        if text:
            self._tail += text
            self._stale = True

    @property
    def _partial(self) -> bytes:
        """Bytes of an incomplete character of the base; not passed to the draft yet."""
        return self._decoder.getstate()[0]

    @property
    def ids(self) -> list[int]:
        """The draft's input: its prompt, then its ids of the accepted text (whole characters only).

        Returns the internal list: it is updated when read after an `append`, and then only its last few ids may change.
        """
        if self._stale:
            self._stale = False
            tail = self._draft.encode(self._tail)
            if len(tail) > 2 * TAIL:
                tail = self._keep(tail)
            self._ids[self._kept :] = tail
        return self._ids

    def _keep(self, tail: list[int]) -> list[int]:
        """Make the ids of the older part of the tail final; returns those of the rest.

        The cut is at an id after which the encoding does not depend on the text before it. If there is no such position
        nearby, the cut is at the middle of the text.
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
        """Ids of the base for ids drafted after `ids`; they cover the drafted text or a prefix of it.

        The draft's end token becomes the base's end token, in last position. The translation stops before any other
        special token and before an incomplete character.
        """
        draft = self._draft.tokenizer
        written = list(takewhile(lambda id: id not in draft.ends and self._draft.piece(id), drafted))
        data, partial = self._draft.text(written), self._partial
        whole = _whole_characters(data)
        new = self._matching_prefix(self._encode(whole, partial), whole[len(partial) :])
        ended = len(written) < len(drafted) and drafted[len(written)] in draft.ends
        if ended and partial + self._base.text(new) == data:
            new.append(self._base.tokenizer.eos)
        return new

    def _encode(self, text: bytes, partial: bytes) -> list[int]:
        """Ids of the base for drafted `text`, which should start with the bytes `partial`, already accepted.

        The encoding must reproduce the accepted ids; otherwise the result is empty.
        """
        before = self._base.text(self._open)
        together = before[: len(before) - len(partial)] + text
        if _whole_characters(together) != together:
            return []
        ids, n = self._base.encode(together.decode()), len(self._open)
        return ids[n:] if ids[:n] == self._open else []

    def _matching_prefix(self, ids: list[int], text: bytes) -> list[int]:
        """The leading `ids` whose bytes equal `text`: all of them, unless the base's tokenizer normalises text."""
        at = 0
        for i, id in enumerate(ids):
            piece = self._base.piece(id)
            if not piece or not text.startswith(piece, at):
                return ids[:i]
            at += len(piece)
        return ids


def _whole_characters(data: bytes) -> bytes:
    """`data` up to the first byte of an incomplete or invalid UTF-8 character."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start]
    return data
