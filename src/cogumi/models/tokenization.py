"""The tokenizer of a Hugging Face folder, and training rows made of token ids (SPEC M1)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as RawTokenizer

from cogumi.core.chat_template import Controls, closing_token, render_pieces
from cogumi.core.errors import DataError
from cogumi.core.types import Message, Request
from cogumi.models.tokenizer_settings import SETTINGS, TOKENIZER, TokenizerSettings

TOKENIZER_FILES = (TOKENIZER, SETTINGS)


def _bytes_of_characters() -> dict[str, int]:
    """Character -> byte in byte-level BPE: printable Latin-1 bytes stand for themselves, others for 256, 257, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _bytes_of_characters()


@dataclass(frozen=True, slots=True)
class HFTokenizer:
    """`engine.protocol.Tokenizer` over `tokenizer.json` and the files beside it.

    `eos` ends an answer: it is the control token that the template writes after an assistant's message, or else the
    declared `eos_text`. Generation also ends with the other ids of `ends`. `bos` stands before a text once, None if the
    model has none or wants none there.
    """

    raw: RawTokenizer
    plain: RawTokenizer  # without special tokens, so that their names in a user's text are encoded as text
    template: str
    eos: int
    eos_text: str
    bos: int | None
    bos_text: str
    ends: frozenset[int]
    control: frozenset[int]
    controls: Controls
    literal: frozenset[int]  # added tokens that are not special: their text is not in the alphabet of bytes

    @classmethod
    def load(cls, folder: Path) -> HFTokenizer:
        """Read a model folder; `DataError` if it lacks a tokenizer, a chat template or an end token."""
        for name in TOKENIZER_FILES:
            if not (folder / name).is_file():
                raise DataError(f"{folder} has no {name}; give a full model folder")
        settings = TokenizerSettings.load(folder)
        if not settings.template or not settings.eos:
            raise DataError(f"{folder} lacks chat_template or eos_token; chat models have both")
        text = (folder / TOKENIZER).read_text(encoding="utf-8")
        document = json.loads(text)
        added = document["added_tokens"]
        document["added_tokens"] = [token for token in added if not token["special"]]
        raw = RawTokenizer.from_str(text)
        ids: dict[str, int] = raw.get_vocab()
        for role, token in (("eos_token", settings.eos), ("bos_token", settings.bos)):
            if token and token not in ids:
                raise DataError(f"{folder}: {role} {token!r} is not in tokenizer.json")
        controls = Controls(frozenset(token["content"] for token in added if token["special"]))
        closing = closing_token(settings.template, controls, bos=settings.bos or "", eos=settings.eos)
        eos, bos = ids[closing or settings.eos], ids.get(settings.bos or "")
        return cls(
            raw=raw,
            plain=RawTokenizer.from_str(json.dumps(document)),
            template=settings.template,
            eos=eos,
            eos_text=settings.eos,
            bos=bos if _adds_bos(raw, settings, bos) else None,
            bos_text=settings.bos or "",
            ends=settings.ends | {eos, ids[settings.eos]},
            control=frozenset(token["id"] for token in added if token["special"]),
            controls=controls,
            literal=frozenset(token["id"] for token in added if not token["special"]),
        )

    @property
    def size(self) -> int:
        """Number of ids."""
        return int(self.raw.get_vocab_size())

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`; special-token text becomes special ids only if `special` is set."""
        encoder = self.raw if special else self.plain
        return list(encoder.encode(text, add_special_tokens=False).ids)

    @property
    def settings(self) -> dict[str, str | None]:
        """`bos_token`, `eos_token` and `chat_template`."""
        return {"bos_token": self.bos_text or None, "eos_token": self.eos_text, "chat_template": self.template}

    def piece(self, token: int) -> bytes:
        """The bytes of an id of a byte-level vocabulary; empty for special tokens."""
        text = "" if token in self.control else self.raw.id_to_token(token) or ""
        if token in self.literal or not all(c in BYTE_OF for c in text):
            return text.encode("utf-8")
        return bytes(BYTE_OF[c] for c in text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens."""
        return str(self.raw.decode(list(ids), skip_special_tokens=True))

    def render(self, request: Request) -> list[int]:
        """Prompt ids of a request."""
        if request.prompt is None:
            return self.chat(request.messages, request.tools)
        if isinstance(request.prompt, str):
            return self._begun(self.encode(request.prompt, special=True))
        return list(request.prompt)

    def chat(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[int]:
        """Prompt ids of a conversation, up to the start of the assistant's answer."""
        bos, eos = self.bos_text, self.eos_text
        pieces = render_pieces(self.template, messages, self.controls, tools=tools, bos=bos, eos=eos)
        return self._begun([i for text, special in pieces for i in self.encode(text, special=special)])

    def _begun(self, ids: list[int]) -> list[int]:
        """The ids with one bos before them, if the model wants one; a template may have written it."""
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def answer(self, text: str) -> list[int]:
        """Ids of an assistant's answer, including the end token."""
        return [*self.encode(text), self.eos]


def _adds_bos(raw: RawTokenizer, settings: TokenizerSettings, bos: int | None) -> bool:
    """Whether bos is put before a text: as the settings say, or else as the tokenizer's post-processor does."""
    if settings.add_bos is not None:
        return settings.add_bos
    return bool(raw.encode("a").ids[:1] == [bos])


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of a prompt and its answer `ids[start:]`, including the end token; `id` is the example's."""

    ids: tuple[int, ...]
    start: int
    id: str = ""

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    @property
    def weight(self) -> int:
        """Number of answer tokens: the row's weight in a mean over rows."""
        return len(self.ids) - self.start
