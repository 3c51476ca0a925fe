"""The tokenizer of a Hugging Face folder, and training rows made of token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as RawTokenizer

from cogumi.core.chat_template import render_pieces
from cogumi.core.errors import DataError
from cogumi.core.types import Message, Request

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def _bytes_of_characters() -> dict[str, int]:
    """Character -> byte in byte-level BPE: printable Latin-1 bytes stand for themselves, others for 256, 257, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _bytes_of_characters()


@dataclass(frozen=True, slots=True)
class HFTokenizer:
    """`engine.protocol.Tokenizer` over `tokenizer.json` and `tokenizer_config.json`."""

    raw: RawTokenizer
    plain: RawTokenizer  # without special tokens, so that their names in a user's text are encoded as text
    template: str
    eos: int
    eos_text: str
    bos_text: str
    control: frozenset[int]

    @classmethod
    def load(cls, folder: Path) -> HFTokenizer:
        """Read a model folder; `DataError` if it lacks a tokenizer, a chat template or an end token."""
        try:
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(f"{folder} has no {Path(error.filename).name}; give a full model folder") from error
        if not config.get("chat_template") or not config.get("eos_token"):
            raise DataError(f"{folder}/tokenizer_config.json lacks chat_template or eos_token; chat models have both")
        document = json.loads(text)
        added = document["added_tokens"]
        document["added_tokens"] = [token for token in added if not token["special"]]
        raw = RawTokenizer.from_str(text)
        eos = raw.token_to_id(config["eos_token"])
        if eos is None:
            raise DataError(f"{folder}: eos_token {config['eos_token']!r} is not in tokenizer.json")
        return cls(
            raw=raw,
            plain=RawTokenizer.from_str(json.dumps(document)),
            template=config["chat_template"],
            eos=eos,
            eos_text=config["eos_token"],
            bos_text=config.get("bos_token") or "",
            control=frozenset(token["id"] for token in added if token["special"]),
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
        return bytes(_BYTES[c] for c in text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens."""
        return str(self.raw.decode(list(ids), skip_special_tokens=True))

    def render(self, request: Request) -> list[int]:
        """Prompt ids of a request."""
        if request.prompt is None:
            return self.chat(request.messages)
        if isinstance(request.prompt, str):
            return self.encode(request.prompt)
        return list(request.prompt)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Prompt ids of a conversation, up to the start of the assistant's answer."""
        pieces = render_pieces(self.template, messages, bos=self.bos_text, eos=self.eos_text)
        return [i for text, is_template in pieces for i in self.encode(text, special=is_template)]

    def answer(self, text: str) -> list[int]:
        """Ids of an assistant's answer, including the end token."""
        return [*self.encode(text), self.eos]


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
