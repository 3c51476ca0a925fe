"""The tokenizer in a GGUF file as the files of a Hugging Face folder: the same ids for every text (SPEC M2).

Everything comes from the file's own keys: digits, added tokens, end token and chat template are those that llama.cpp
uses for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import TokenType

from cogumi.compress.gguf.gguf_header import Header
from cogumi.compress.gguf.gguf_vocabulary import LLAMA3, PRE_TOKENIZERS, Vocabulary, fingerprint
from cogumi.core.errors import ExportError
from cogumi.core.files import write_json, write_text
from cogumi.models.tokenizer_settings import TEMPLATE

ALIASES = {"llama3": LLAMA3, "llama-v3": LLAMA3, "deepseek-r1-qwen": "qwen2"}
"""Further names under which llama.cpp knows a pre-tokenizer of `PRE_TOKENIZERS`."""
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def tokenizer_sha256(header: Header) -> str:
    """`Vocabulary.sha256` of the file's tokenizer, of any family."""
    return fingerprint(_pre(header), *_tokens(header))


def read_vocabulary(header: Header) -> Vocabulary:
    """The tokenizer of a file; `ExportError` if it is not one that Hugging Face's library can reproduce exactly."""
    keys = header.keys
    model, pre = keys.get("tokenizer.ggml.model"), _pre(header)
    if model != "gpt2":
        raise header.untrainable(f"its tokenizer is {model}; supported is BPE over bytes (gpt2)")
    if pre not in PRE_TOKENIZERS:
        raise header.untrainable(f"its pre-tokenizer is {pre}; supported: {', '.join([*PRE_TOKENIZERS, *ALIASES])}")
    tokens, merges, control, defined = _tokens(header)
    if len(set(tokens.values())) < len(tokens):
        raise header.untrainable("two tokens of its vocabulary have the same text")
    bos, eos, pad, unk = (
        _special(header, tokens, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding", "unknown")
    )
    if eos is None:
        raise header.untrainable("it names no end token (tokenizer.ggml.eos_token_id)")
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        merges=merges,
        control=control,
        defined=defined,
        bos=bos,
        eos=eos,
        pad=pad,
        unk=unk,
        add_bos=bos is not None and bool(keys.get("tokenizer.ggml.add_bos_token", pre == LLAMA3)),
        add_eos=bool(keys.get("tokenizer.ggml.add_eos_token", False)),
        template=keys.get("tokenizer.chat_template"),
        turn_end=_special(header, tokens, "tokenizer.ggml.eot_token_id"),
    )


def write_tokenizer(vocabulary: Vocabulary, context: int, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, and chat_template.jinja if there is a template."""
    write_json(out / "tokenizer.json", _document(vocabulary))
    names = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos, "pad_token": vocabulary.pad}
    names |= {"unk_token": vocabulary.unk}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **{name: vocabulary.tokens[number] for name, number in names.items() if number is not None},
    }
    if vocabulary.template is not None:
        settings["chat_template"] = vocabulary.template
        write_text(out / TEMPLATE, vocabulary.template)
    write_json(out / "tokenizer_config.json", settings)


def _document(vocabulary: Vocabulary) -> dict[str, Any]:
    """The content of tokenizer.json. All tokens are in the model's vocabulary, so that each keeps its id."""
    steps = PRE_TOKENIZERS[vocabulary.pre]
    added = sorted(vocabulary.control | vocabulary.defined)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": vocabulary.tokens[i], **_ADDED, "special": i in vocabulary.control} for i in added
        ],
        "normalizer": None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": _around(vocabulary),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": vocabulary.pre == LLAMA3,
            "vocab": {token: i for i, token in sorted(vocabulary.tokens.items())},
            "merges": [merge.split(" ") for merge in vocabulary.merges],
        },
    }


def _around(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """The post-processor that puts bos before a text and eos after it, where the file asks for that."""
    first = [vocabulary.bos] if vocabulary.add_bos and vocabulary.bos is not None else []
    last = [vocabulary.eos] if vocabulary.add_eos else []
    if not first and not last:
        return None

    def side(name: str, kind: int) -> list[dict[str, Any]]:
        before, after = (
            [{"SpecialToken": {"id": vocabulary.tokens[i], "type_id": kind}} for i in ids] for ids in (first, last)
        )
        return [*before, {"Sequence": {"id": name, "type_id": kind}}, *after]

    special = {
        vocabulary.tokens[i]: {"id": vocabulary.tokens[i], "ids": [i], "tokens": [vocabulary.tokens[i]]}
        for i in {*first, *last}
    }
    pair = [*side("A", 0), *side("B", 1)]
    return {"type": "TemplateProcessing", "single": side("A", 0), "pair": pair, "special_tokens": special}


def _pre(header: Header) -> str:
    keys = header.keys
    name = str(keys.get("tokenizer.ggml.pre", keys.get("tokenizer.ggml.model", "none")))
    return ALIASES.get(name, name)


def _tokens(header: Header) -> tuple[dict[int, str], tuple[str, ...], frozenset[int], frozenset[int]]:
    """Tokens by id, merges, ids of control tokens, ids of other added tokens."""
    keys = header.keys
    texts = keys["tokenizer.ggml.tokens"]
    types = keys.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(texts))
    if len(types) != len(texts):
        raise ExportError(f"{header.path} has {len(texts)} tokens and {len(types)} token types; download it again")
    control = frozenset(i for i, type in enumerate(types) if type == TokenType.CONTROL)
    defined = frozenset(i for i, type in enumerate(types) if type == TokenType.USER_DEFINED)
    used = {i: text for i, text in enumerate(texts) if types[i] != TokenType.UNUSED}
    return used, tuple(keys.get("tokenizer.ggml.merges", ())), control, defined


def _special(header: Header, tokens: dict[int, str], key: str) -> int | None:
    number = header.keys.get(key)
    if number is not None and number not in tokens:
        raise ExportError(f"{header.path}: {key} is {number}, which is no token; download it again")
    return None if number is None else int(number)
