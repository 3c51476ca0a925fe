"""llama.cpp's published tokenizer vectors: an exported tokenizer reproduces them; any other is refused."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from gguf import GGUFType, GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers

from cogumi.compress.gguf.gguf_vocabulary import Vocabulary
from cogumi.core.errors import ExportError
from support.gguf import foreign_text, llama
from support.public_data import public_data
from support.vocabularies import llama3_document, qwen2_document


def gpt2_document() -> dict:
    vocabulary, merges = (str(public_data(f"tokenizer_hf/gpt2.{kind}")) for kind in ("vocab", "merges.txt"))
    tokenizer = Tokenizer(models.BPE.from_file(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return json.loads(tokenizer.to_str())


EXPORTED = {
    "gpt-2": (gpt2_document, None, "<|endoftext|>"),
    "llama-bpe": (llama3_document, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen2": (qwen2_document, None, "<|im_end|>"),
}
"""llama.cpp's name of the vectors, and of the pre-tokenizer -> (tokenizer.json, first and last token)."""


def tokenizer_folder(folder: Path, document: dict | str, eos: str, bos: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = document if isinstance(document, str) else json.dumps(document)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos}))
    return folder


def vocabulary_file(folder: Path, out: Path) -> Path:
    """A GGUF file that contains only the folder's tokenizer."""
    vocabulary = Vocabulary.load(folder)
    writer = GGUFWriter(out, "llama")
    writer.add_type(GGUFType.MODEL)
    vocabulary.write(writer, max(vocabulary.tokens) + 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return out


def vectors(name: str) -> tuple[list[str], list[list[int]]]:
    """Texts and their ids; the last text in the file has no ids."""
    source = public_data("tokenizers_llamacpp")
    texts = (source / f"ggml-vocab-{name}.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (source / f"ggml-vocab-{name}.gguf.out").read_text(encoding="ascii").splitlines()
    ids = [[int(number) for number in line.split()] for line in lines]
    return texts[: len(ids)], ids


@pytest.mark.parametrize("name", EXPORTED)
def test_published_vectors_are_reproduced(tmp_path, name):
    """So are ids of other text, with two known differences for Qwen2: text that is not in NFC, and "</s>", an ordinary
    token that llama.cpp parses as end of text wherever it parses special tokens.
    """
    document, bos, eos = EXPORTED[name]
    folder = tokenizer_folder(tmp_path, document(), eos, bos)
    stock = llama(vocabulary_file(folder, tmp_path / "m.gguf"), vocab_only=True)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert stock.metadata["tokenizer.ggml.pre"] == name
    texts, expected = vectors(name)
    assert len(expected) == 46
    assert [stock.tokenize(text.encode(), add_bos=False, special=False) for text in texts] == expected
    assert [raw.encode(text, add_special_tokens=False).ids for text in texts] == expected
    more = [unicodedata.normalize("NFC", text) for text in foreign_text(500) if "</s>" not in text]
    got = [stock.tokenize(text.encode(), add_bos=False, special=True) for text in more]
    assert got == [encoding.ids for encoding in raw.encode_batch(more, add_special_tokens=False)]


@pytest.mark.parametrize(("name", "eos"), [("llama2", "</s>"), ("phi-3-mini", "<|endoftext|>")])
def test_sentencepiece_tokenizers_are_refused(tmp_path, name, eos):
    text = public_data(f"tokenizer_hf/{name}/tokenizer.json").read_text(encoding="utf-8")
    with pytest.raises(ExportError, match="the tokenizer normalizes text"):
        Vocabulary.load(tokenizer_folder(tmp_path, text, eos))


FALCON = [
    {"type": "Punctuation", "behavior": "Contiguous"},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    {"type": "Digits", "individual_digits": False},
    {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False},
]
DEEPSEEK = [
    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    for pattern in ("[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", "[一-龥ࠀ-一가-퟿]+")
] + [
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
]


@pytest.mark.parametrize("parts", [FALCON, DEEPSEEK], ids=["falcon", "deepseek"])
def test_other_pre_tokenizers_are_refused_by_name(tmp_path, parts):
    document = gpt2_document() | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}
    with pytest.raises(ExportError, match=f"the pre-tokenizer is {parts[0]['type']}.*; supported: ByteLevel or Digits"):
        Vocabulary.load(tokenizer_folder(tmp_path, document, "<|endoftext|>"))
