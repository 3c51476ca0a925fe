"""The GGUF keys of a byte-level BPE tokenizer, with which llama.cpp produces the same ids (SPEC D5).

llama.cpp does not read pre-tokenizers from a file, it implements some of them by name (`tokenizer.ggml.pre`). A name
that almost fits is exact on most text and wrong on the rest, so every pre-tokenizer without an exact match is refused.
One exception: Qwen2's NFC normalization is ignored, so ids differ for letters with decomposed accents.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from cogumi.core.chat_template import Controls, closing_token
from cogumi.core.errors import ExportError
from cogumi.models.tokenization import BYTE_OF, TOKENIZER_FILES
from cogumi.models.tokenizer_settings import TokenizerSettings

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _split(digits: str) -> list[dict[str, Any]]:
    """A pre-tokenizer that splits text by a pattern, and the parts into bytes."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pattern = {"Regex": words + digits + rest}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [split, BYTE_LEVEL | {"use_regex": False}]


LLAMA3 = "llama-bpe"
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    LLAMA3: _split(r"\p{N}{1,3}"),
    "qwen2": _split(r"\p{N}"),
}
"""llama.cpp's name of a pre-tokenizer -> the same in the notation of `tokenizer.json`."""

_IRRELEVANT = {"type", "trim_offsets"}  # without effect on ids
_DEFAULTS = {"add_prefix_space": False, "use_regex": True}
_BPE_OPTIONS = (
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
)
_MATCH_OPTIONS = ("lstrip", "rstrip", "single_word")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms: `control` ids are special tokens, `defined` ids other added tokens.

    `turn_end` closes an assistant's message in the chat template; None if `eos` does.
    """

    pre: str
    tokens: Mapping[int, str]
    merges: tuple[str, ...]
    control: frozenset[int]
    defined: frozenset[int]
    bos: int | None
    eos: int
    pad: int | None
    unk: int | None
    add_bos: bool
    add_eos: bool
    template: str | None
    turn_end: int | None = None

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """Read a folder's tokenizer files; `ExportError` if llama.cpp would produce other ids."""
        text, _ = (_read(folder / name) for name in TOKENIZER_FILES)
        settings = TokenizerSettings.load(folder)
        document = json.loads(text)
        model, added = document["model"], document["added_tokens"]
        _check(folder, document)
        ids = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
        names = ("bos", "eos", "pad", "unk")
        bos, eos, pad, unk = (_special(folder, getattr(settings, name), ids, name) for name in names)
        if eos is None:
            raise ExportError(f"{folder}/tokenizer_config.json names no eos_token; without one an answer never ends")
        controls = Controls(frozenset(token["content"] for token in added if token["special"]))
        closing = closing_token(settings.template, controls, bos=settings.bos or "", eos=settings.eos or "")
        add_bos, add_eos = _adds_bos_eos(folder, text, bos, eos)
        return cls(
            pre=_pre_tokenizer(folder, document["pre_tokenizer"]),
            tokens={number: token for token, number in ids.items()},
            merges=tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]),
            control=frozenset(token["id"] for token in added if token["special"]),
            defined=frozenset(token["id"] for token in added if not token["special"]),
            bos=bos,
            eos=eos,
            pad=pad,
            unk=unk,
            add_bos=bos is not None and (add_bos if settings.add_bos is None else settings.add_bos),
            add_eos=add_eos if settings.add_eos is None else settings.add_eos,
            template=settings.template,
            turn_end=ids[closing] if closing and ids[closing] != eos else None,
        )

    @property
    def missing_bytes(self) -> tuple[int, ...]:
        """The bytes without a token, ascending: text that holds one of them loses it, in torch and in llama.cpp."""
        lost = BYTE_OF.keys() - set(self.tokens.values())
        return tuple(sorted(BYTE_OF[character] for character in lost))

    @property
    def sha256(self) -> str:
        """Equal for two tokenizers exactly if they encode every text to the same ids."""
        return fingerprint(self.pre, self.tokens, self.merges, self.control, self.defined)

    def write(self, writer: GGUFWriter, rows: int) -> None:
        """Add the `tokenizer.*` keys; those of the embedding's `rows` without a token become unused tokens."""
        if max(self.tokens) >= rows:
            raise ExportError(
                f"the tokenizer's highest id is {max(self.tokens)}, but config.json says vocab_size {rows}; "
                "use the tokenizer this model was trained with"
            )
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list([self.tokens.get(i, f"[PAD{i}]") for i in range(rows)])
        writer.add_token_types([self._type(i) for i in range(rows)])
        writer.add_token_merges(list(self.merges))
        if self.bos is not None:
            writer.add_bos_token_id(self.bos)
        writer.add_eos_token_id(self.eos)
        if self.turn_end is not None:
            writer.add_eot_token_id(self.turn_end)
        if self.pad is not None:
            writer.add_pad_token_id(self.pad)
        if self.unk is not None:
            writer.add_unk_token_id(self.unk)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.template is not None:
            writer.add_chat_template(self.template)

    def _type(self, number: int) -> TokenType:
        if number in self.control:
            return TokenType.CONTROL
        if number in self.defined:
            return TokenType.USER_DEFINED
        return TokenType.NORMAL if number in self.tokens else TokenType.UNUSED


def fingerprint(
    pre: str, tokens: Mapping[int, str], merges: Sequence[str], control: Collection[int], defined: Collection[int]
) -> str:
    """Hash of everything that determines the ids of a text."""
    content = [pre, sorted(tokens.items()), merges, sorted(control), sorted(defined)]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def warn_of_lost_text(vocabulary: Vocabulary) -> None:
    """Warn, once per process, of text that the vocabulary cannot represent, if there is any."""
    if missing := vocabulary.missing_bytes:
        names = " ".join(f"{byte:02X}" for byte in missing)
        warnings.warn(
            f"the vocabulary has no token for {len(missing)} of the 256 bytes ({names}): the model never sees them, "
            "and characters that hold them are cut; all other text is unaffected",
            stacklevel=1,
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing; give a full model folder, tokenizer included") from error


def _check(folder: Path, document: Mapping[str, Any]) -> None:
    """`ExportError` for options that change ids and that llama.cpp's gpt2 tokenizer does not support."""
    model = document["model"]
    if model["type"] != "BPE":
        raise ExportError(f"{folder}: the tokenizer model is {model['type']}; supported is BPE over bytes")
    if other := [kind for kind in _normalizers(document["normalizer"]) if kind != "NFC"]:
        raise ExportError(f"{folder}: the tokenizer normalizes text ({other[0]}); llama.cpp would not")
    for option in _BPE_OPTIONS:
        if model.get(option):
            raise ExportError(f"{folder}: the tokenizer's BPE sets {option}, which llama.cpp does not support")
    if model.get("ignore_merges") and _pre_tokenizer(folder, document["pre_tokenizer"]) != LLAMA3:
        raise ExportError(f"{folder}: the tokenizer's BPE sets ignore_merges; llama.cpp supports that for Llama 3 only")
    if not model["merges"]:
        raise ExportError(f"{folder}: the tokenizer has no merges; llama.cpp needs at least one")
    for token in document["added_tokens"]:
        for option in _MATCH_OPTIONS:
            if token[option]:
                raise ExportError(
                    f"{folder}: token {token['content']!r} sets {option}, which llama.cpp does not support"
                )


def _normalizers(node: Mapping[str, Any] | None) -> list[str]:
    """The kinds of normalizers in a possibly empty or nested sequence."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [str(node["type"])]
    return [kind for part in node["normalizers"] for kind in _normalizers(part)]


def _pre_tokenizer(folder: Path, node: Mapping[str, Any] | None) -> str:
    parts = [] if node is None else node["pretokenizers"] if node["type"] == "Sequence" else [node]
    found = _describe(parts)
    names = {_describe(known): name for name, known in PRE_TOKENIZERS.items()}
    if found not in names:
        supported = " or ".join([*names][:2])
        raise ExportError(
            f"{folder}: the pre-tokenizer is {found or 'none'}; supported: {supported}, and those of Llama 3 and Qwen2"
        )
    return names[found]


def _describe(parts: Sequence[Mapping[str, Any]]) -> str:
    """The steps of a pre-tokenizer with all options that change ids: equal texts for equal pre-tokenizers."""
    return " + ".join(map(_describe_one, parts))


def _describe_one(part: Mapping[str, Any]) -> str:
    options = {key: value for key, value in part.items() if key not in _IRRELEVANT and value != _DEFAULTS.get(key)}
    arguments = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"{part['type']}({arguments})" if arguments else str(part["type"])


def _special(folder: Path, text: str | None, ids: Mapping[str, int], name: str) -> int | None:
    if text is not None and text not in ids:
        raise ExportError(f"{folder}: {name}_token {text!r} of tokenizer_config.json is not in tokenizer.json")
    return None if text is None else ids[text]


def _adds_bos_eos(folder: Path, text: str, bos: int | None, eos: int) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before a text, and whether it puts eos after it."""
    try:
        raw = Tokenizer.from_str(text)
    except Exception as error:  # the library raises no narrower type
        raise ExportError(f"{folder}/tokenizer.json cannot be read ({error}); copy it again") from error
    plain, special = (raw.encode("a", add_special_tokens=add).ids for add in (False, True))
    for add_bos in (False, True):
        for add_eos in (False, True):
            if [bos] * add_bos + plain + [eos] * add_eos == special:
                return add_bos, add_eos
    raise ExportError(f"{folder}: the tokenizer's post-processor adds more than bos and eos; llama.cpp cannot")
