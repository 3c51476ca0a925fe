"""The tokenizer in a GGUF file gives the ids of the Hugging Face tokenizer on every text, or export refuses it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaForCausalLM

from cogumi.compress.gguf.export import export_model
from cogumi.compress.gguf.gguf_vocabulary import Vocabulary
from cogumi.core.errors import ExportError
from cogumi.models.tokenization import HFTokenizer
from support.gguf import edit, foreign_text, llama
from support.pico import SENTENCES, SPECIALS, make_model
from support.public_data import public_data, public_lines


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small model folder that a test may change."""
    return make_model(tmp_path / "folder", hidden=32)


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))


def plain_tokenizer() -> Tokenizer:
    """Byte-level BPE without digit splitting, whose merges join digits, so that a wrong `pre` changes the ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    numbers = " ".join(str(random.Random(i).randrange(10_000)) for i in range(3000))
    tokenizer.train_from_iterator([*SENTENCES * 20, numbers], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("    ", special=False)])
    return tokenizer


def mismatches(path: Path, tokenizer: HFTokenizer, texts: list[str]) -> list[str]:
    model = llama(path, vocab_only=True)
    return [
        text
        for text in texts
        for special in (False, True)
        if model.tokenize(text.encode(), add_bos=False, special=special) != tokenizer.encode(text, special=special)
    ]


@pytest.mark.parametrize("source", [foreign_text, public_lines])
@pytest.mark.parametrize("kind", ["smollm", "gpt-2"])
def test_tokenization_equals_the_hugging_face_tokenizer(tmp_path, folder, kind, source):
    if kind == "gpt-2":
        save_tokenizer(folder, plain_tokenizer())
    export_model(folder, tmp_path / "m.gguf")
    assert llama(tmp_path / "m.gguf", vocab_only=True).metadata["tokenizer.ggml.pre"] == kind
    texts = source(11_000)
    assert mismatches(tmp_path / "m.gguf", HFTokenizer.load(folder), texts) == []


def test_foreign_text_detects_a_wrong_pre_tokenizer(tmp_path, folder):
    """Check that the texts above detect a wrong `pre`: an exporter that wrote one name for both would fail on them."""
    export_model(folder, tmp_path / "m.gguf")
    save_tokenizer(folder, plain_tokenizer())
    export_model(folder, tmp_path / "plain.gguf")
    document = json.loads((folder / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, document["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert len(mismatches(tmp_path / "plain.gguf", HFTokenizer.load(folder), foreign_text(500))) > 50


def test_published_vocabulary_with_non_special_added_tokens(tmp_path):
    """phi-2's 50,295 tokens: byte-level, with runs of spaces and tabs as added tokens that are not special."""
    tokenizer = Tokenizer.from_file(str(public_data("tokenizer_hf/phi-2/tokenizer.json")))
    folder = real_folder(tmp_path / "m", tokenizer)
    export_model(folder, tmp_path / "m.gguf")
    texts = foreign_text(1_000) + public_lines(1_000)
    assert mismatches(tmp_path / "m.gguf", HFTokenizer.load(folder), texts) == []


def real_folder(folder: Path, tokenizer: Tokenizer) -> Path:
    """A pico model with the vocabulary size of a published tokenizer."""
    make_model(folder, hidden=32)
    edit(folder / "config.json", vocab_size=tokenizer.get_vocab_size(), eos_token_id=50256)
    LlamaForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True).save_pretrained(folder)
    save_tokenizer(folder, tokenizer)
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>", pad_token=None)
    return folder


def test_special_token_text_from_a_user_is_not_parsed_as_special(tmp_path, folder):
    export_model(folder, tmp_path / "m.gguf")
    model = llama(tmp_path / "m.gguf", vocab_only=True)
    for number, text in enumerate(SPECIALS):
        assert model.tokenize(text.encode(), add_bos=False, special=True) == [number]
        typed = model.tokenize(f"a {text} b".encode(), add_bos=False, special=False)
        assert not set(typed) & set(range(len(SPECIALS)))
        assert model.detokenize(typed).decode() == f"a {text} b"


def test_unused_embedding_rows_become_unused_tokens(tmp_path, folder):
    save_tokenizer(folder, plain_tokenizer())  # 502 tokens, 512 rows
    export_model(folder, tmp_path / "m.gguf")
    assert llama(tmp_path / "m.gguf", vocab_only=True).n_vocab() == 512
    types = GGUFReader(tmp_path / "m.gguf").get_field("tokenizer.ggml.token_type").contents()
    assert types == [3] * 5 + [1] * 495 + [4] * 2 + [5] * 10


@pytest.mark.parametrize("explicit", [None, False], ids=["post-processor", "switched off"])
def test_bos_is_added_as_the_tokenizer_declares(tmp_path, folder, explicit):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<|user|> $A", special_tokens=[("<|user|>", 2)])
    save_tokenizer(folder, tokenizer)
    edit(folder / "tokenizer_config.json", bos_token={"content": "<|user|>"}, add_bos_token=explicit)
    export_model(folder, tmp_path / "m.gguf")
    model = llama(tmp_path / "m.gguf", vocab_only=True)
    assert model.token_bos() == 2
    assert model._model.add_bos_token() is (explicit is None)


def test_chat_template_is_read_from_its_own_file(tmp_path, folder):
    edit(folder / "tokenizer_config.json", chat_template=None)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    export_model(folder, tmp_path / "m.gguf")
    assert llama(tmp_path / "m.gguf", vocab_only=True).metadata["tokenizer.chat_template"] == "{{ messages }}"


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LLAMA3_SPLIT = {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "is Whitespace; supported: ByteLevel or Digits"),
        ({"pre_tokenizer": None}, "is none; supported"),
        (
            {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}},
            r"is ByteLevel\(add_prefix_space=True\)",
        ),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [LLAMA3_SPLIT, BYTE_LEVEL]}}, "Split"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTE_LEVEL],
                }
            },
            r"Digits\(individual_digits=False\)",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "normalizes text"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "<|pad|>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [
                        {"Sequence": {"id": "A", "type_id": 0}},
                        {"Sequence": {"id": "B", "type_id": 0}},
                    ],
                    "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [0], "tokens": ["<|pad|>"]}},
                }
            },
            "post-processor adds more",
        ),
    ],
)
def test_tokenizers_that_llama_cpp_would_misread_are_refused(tmp_path, folder, change, message):
    edit(folder / "tokenizer.json", **change)
    with pytest.raises(ExportError, match=message):
        export_model(folder, tmp_path / "m.gguf")


def test_damaged_vocabularies_and_those_without_an_end_token_are_refused(folder):
    document = json.loads((folder / "tokenizer.json").read_text())
    for change, message in (
        ({"ignore_merges": True}, "ignore_merges"),
        ({"merges": []}, "no merges"),
        ({"type": "WordLevel"}, "WordLevel"),
        ({"vocab": {k: v for k, v in document["model"]["vocab"].items() if k != "Ġ"}}, "out of vocabulary"),
    ):
        (folder / "tokenizer.json").write_text(json.dumps(document | {"model": document["model"] | change}))
        with pytest.raises(ExportError, match=message):
            Vocabulary.load(folder)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    edit(folder / "tokenizer_config.json", eos_token="<|stop|>")
    with pytest.raises(ExportError, match=r"eos_token '<\|stop\|>'"):
        Vocabulary.load(folder)
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ExportError, match="names no eos_token"):
        Vocabulary.load(folder)


def test_tokenizer_hash_depends_only_on_the_ids(folder):
    same = Vocabulary.load(folder).sha256
    edit(folder / "tokenizer_config.json", chat_template="{{ 1 }}")
    assert Vocabulary.load(folder).sha256 == same
    save_tokenizer(folder, plain_tokenizer())
    assert Vocabulary.load(folder).sha256 != same
