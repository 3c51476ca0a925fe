"""Byte-level BPE of a `tokenizer.json`: dependencies between tokens, and the same tokenizer with fewer (SPEC A11).

BPE (Sennrich et al., 1508.07909) repeatedly applies the earliest merge that matches adjacent parts of a word. The
merges inside a substring that ends up as one token do not depend on the rest of the word, so every token has a single
derivation; the tokens in it are its merge parents. If the kept tokens are closed under merge parents, and the kept
merges are those whose parts and result are kept, every word with kept tokens only is tokenized as before. Other words
are split differently, usually into more tokens, at worst into bytes: no text is lost that was not lost before.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

from cogumi.core.errors import DataError

Document: TypeAlias = Mapping[str, Any]
"""A parsed `tokenizer.json`."""

_CHANGES_MERGES = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")


def check(document: Document, where: str) -> None:
    """`DataError` with the reason, unless the document is a byte-level BPE whose ids can be renumbered."""
    try:
        model, added = document["model"], document["added_tokens"]
        kind, vocab, splits = model["type"], model["vocab"], json.dumps(document["pre_tokenizer"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: tokenizer.json lacks {error}; save the tokenizer with save_pretrained") from error
    if kind != "BPE":
        raise DataError(f"{where}: the tokenizer is {_FAMILIES.get(kind, kind)}; only byte-level BPE can be trimmed")
    if model.get("byte_fallback") or "<0x0A>" in vocab:
        raise DataError(f"{where}: the tokenizer is SentencePiece's BPE; only byte-level BPE can be trimmed")
    if option := next((name for name in _CHANGES_MERGES if model.get(name)), None):
        raise DataError(f"{where}: the tokenizer's BPE sets {option}; only byte-level BPE without it can be trimmed")
    if '"ByteLevel"' not in splits:
        raise DataError(f"{where}: the tokenizer does not split texts into bytes; only byte-level BPE can be trimmed")
    numbers = [*vocab.values(), *(token["id"] for token in added if token["content"] not in vocab)]
    if len(set(numbers)) < len(numbers):
        raise DataError(f"{where}: two tokens of tokenizer.json share an id; save the tokenizer again")
    try:
        trimmed(document, {i: i for i in numbers}, where)
    except KeyError as error:
        raise DataError(f"{where}: tokenizer.json refers to an id or a field {error} that it does not have") from error


_FAMILIES = {
    "Unigram": "SentencePiece's Unigram",
    "WordPiece": "WordPiece (BERT's)",
    "WordLevel": "WordLevel (whole words)",
}


@dataclass(frozen=True, slots=True)
class BPE:
    """`ids` of all tokens including added ones, and `merges`: the rank of each pair of tokens."""

    ids: Mapping[str, int]
    merges: Mapping[tuple[str, str], int]

    @classmethod
    def of(cls, document: Document) -> BPE:
        """The BPE of a document that passed `check`."""
        model = document["model"]
        added = {token["content"]: token["id"] for token in document["added_tokens"]}
        return cls({**model["vocab"], **added}, {pair: i for i, pair in enumerate(map(_pair, model["merges"]))})

    def parents(self, token: str) -> tuple[str, ...]:
        """The two tokens of a token's last merge; empty for a byte and for a token that no merges produce."""
        parts = list(token)
        while len(parts) > 2:
            ranks = [self.merges.get(pair, len(self.merges)) for pair in pairwise(parts)]
            first = min(ranks)
            if first == len(self.merges):
                return ()
            at = ranks.index(first)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return tuple(parts) if len(parts) == 2 and (parts[0], parts[1]) in self.merges else ()

    def missing(self, token: str, kept: Collection[str]) -> set[str]:
        """The tokens to add to `kept`, a set closed under merge parents, so that it contains `token` and is closed."""
        new: set[str] = set()
        waiting = [token]
        while waiting:
            one = waiting.pop()
            if one not in kept and one not in new:
                new.add(one)
                waiting += self.parents(one)
        return new

    def closed(self, tokens: Iterable[str]) -> set[str]:
        """These tokens and all their merge parents."""
        kept: set[str] = set()
        for token in tokens:
            kept |= self.missing(token, kept)
        return kept


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def renumbering(kept: Iterable[int]) -> dict[int, int]:
    """Old id -> new id, in the old order and without gaps."""
    return {old: new for new, old in enumerate(sorted(kept))}


def trimmed(document: Document, new: Mapping[int, int], where: str) -> dict[str, Any]:
    """The document with the tokens whose ids are in `new`, under their new ids; all added tokens must be among them."""
    model = document["model"]
    vocab = {token: new[i] for token, i in model["vocab"].items() if i in new}
    merges = [merge for merge in model["merges"] if vocab.keys() >= {*(pair := _pair(merge)), "".join(pair)}]
    found = {
        **document,
        "added_tokens": [token | {"id": new[token["id"]]} for token in document["added_tokens"]],
        "post_processor": _renumbered(document.get("post_processor"), new, where),
        "model": {**model, "vocab": vocab, "merges": merges},
    }
    if found.get("padding"):
        found["padding"] = found["padding"] | {"pad_id": new[found["padding"]["pad_id"]]}
    return found


def _renumbered(processor: Document | None, new: Mapping[int, int], where: str) -> dict[str, Any] | None:
    """A post-processor with the ids of its special tokens replaced."""
    if processor is None:
        return None
    match processor["type"]:
        case "ByteLevel":
            return dict(processor)
        case "Sequence":
            return {**processor, "processors": [_renumbered(p, new, where) for p in processor["processors"]]}
        case "TemplateProcessing":
            special = processor["special_tokens"]
            ids = {name: value | {"ids": [new[i] for i in value["ids"]]} for name, value in special.items()}
            return {**processor, "special_tokens": ids}
        case "RobertaProcessing" | "BertProcessing":
            return {**processor} | {end: [processor[end][0], new[processor[end][1]]] for end in ("sep", "cls")}
        case kind:
            raise DataError(f"{where}: the tokenizer's post-processor {kind} is not known; its ids cannot be replaced")


def settings(config: Document, new: Mapping[int, int]) -> dict[str, Any]:
    """A `tokenizer_config.json` with its ids replaced; texts and chat template do not change."""
    if "added_tokens_decoder" not in config:
        return dict(config)
    decoder = config["added_tokens_decoder"]
    return {**config, "added_tokens_decoder": {str(new[int(i)]): token for i, token in decoder.items()}}
