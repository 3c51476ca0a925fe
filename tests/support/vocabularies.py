"""The published vocabularies of Llama 3 and Qwen2 as model folders with random weights."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from support.gguf import edit
from support.pico import make_model
from support.public_data import public_data
from support.real import LLAMA_TEMPLATE, QWEN_TEMPLATE, REST, WORDS

_CHARACTERS = {
    **{b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))},
    **{b: chr(256 + i) for i, b in enumerate((*range(33), *range(127, 161), 173))},
}
LLAMA_CONTROL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2)),
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
]


def _document(vocab: dict[str, int], merges: list, added: list[dict], digits: str, llama: bool) -> dict:
    bos = added[0]["content"]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": WORDS + digits + REST},
        "behavior": "Isolated",
        "invert": False,
    }
    begin, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [begin, text, {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {bos: {"id": bos, "ids": [added[0]["id"]], "tokens": [bos]}}
    framed = {"type": "TemplateProcessing", "single": [begin, text], "pair": pair, "special_tokens": special}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None if llama else {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": {"type": "Sequence", "processors": [level, framed]} if llama else level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None if llama else "",
            "end_of_word_suffix": None if llama else "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": llama,
            "vocab": vocab,
            "merges": merges,
        },
    }


def llama3_document() -> dict:
    """tokenizer.json of Llama 3.2: 128,000 ranks and 256 control tokens."""
    source = public_data("tokenizer_llama3")
    vocab = json.loads((source / "encoder.json").read_text("utf-8"))
    lines = (source / "vocab.bpe").read_text("utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": 128_000 + i, "content": text} | plain for i, text in enumerate(LLAMA_CONTROL)]
    return _document(vocab, merges, added, r"\p{N}{1,3}", llama=True)


def qwen2_document() -> dict:
    """tokenizer.json of Qwen2.5: 151,643 ranks and 22 added tokens; a token's merge follows from the ranks below it."""
    lines = public_data("tokenizer_qwen/qwen.tiktoken").read_text("ascii").split("\n")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    spelled = {token: "".join(_CHARACTERS[b] for b in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            found = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            at = found.index(min(found))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append([spelled[part] for part in parts])
    settings = json.loads(public_data("tokenizer_hf/qwen2.5/tokenizer_config.json").read_text("utf-8"))
    added = [{"id": int(number), **token} for number, token in settings["added_tokens_decoder"].items()]
    return _document({spelled[token]: rank for token, rank in ranks.items()}, merges, added, r"\p{N}", llama=False)


def real_vocabulary(folder: Path, name: str, **shape) -> Path:
    """A pico model with the vocabulary of `llama3` or `qwen2`, with padded embedding rows like Qwen's."""
    document = llama3_document() if name == "llama3" else qwen2_document()
    ids = {token["content"]: token["id"] for token in document["added_tokens"]}
    size = len(document["model"]["vocab"]) + len(ids)
    bos, eos = ("<|begin_of_text|>", "<|eot_id|>") if name == "llama3" else (None, "<|im_end|>")
    make_model(folder, **shape)
    rows = size + (0 if name == "llama3" else 271)
    edit(folder / "config.json", vocab_size=rows, bos_token_id=ids.get(bos), eos_token_id=ids[eos], pad_token_id=None)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    template = LLAMA_TEMPLATE if name == "llama3" else QWEN_TEMPLATE
    settings = {"bos_token": bos, "eos_token": eos, "chat_template": template, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return folder
