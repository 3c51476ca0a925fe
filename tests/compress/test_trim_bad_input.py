"""Stage `trim` refuses unsupported tokenizers, damaged models and bad settings with a one-line error."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from cogumi.compress.trim import trim
from cogumi.compress.trim.bpe import check
from cogumi.compress.trim.fertility import read_texts
from cogumi.compress.trim.remap import Model
from cogumi.core.errors import ArtifactError, CogumiError, DataError, ExportError
from cogumi.core.files import sha256
from support.gguf import edit
from support.pico import make_model
from support.public_data import public_data
from support.trim import examples, make_folders, run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("models"))


def sentencepiece(document):
    document["model"] |= {"byte_fallback": True}


def unigram(document):
    document["model"] = {"type": "Unigram", "vocab": [["<unk>", 0.0]]}


def wordpiece(document):
    document["model"] = {"type": "WordPiece", "vocab": {"[UNK]": 0}}


def not_bytewise(document):
    document["pre_tokenizer"] = {"type": "Whitespace"}


def shared_ids(document):
    vocab = document["model"]["vocab"]
    vocab["!"] = vocab['"']


def unknown_processor(document):
    document["post_processor"] = {"type": "Novel"}


def suffixes(document):
    document["model"]["end_of_word_suffix"] = "</w>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (sentencepiece, "is SentencePiece's BPE; only byte-level BPE"),
        (unigram, "is SentencePiece's Unigram; only byte-level BPE"),
        (wordpiece, r"is WordPiece \(BERT's\); only byte-level BPE"),
        (not_bytewise, "does not split texts into bytes; only byte-level BPE"),
        (shared_ids, "two tokens of tokenizer.json share an id"),
        (unknown_processor, "post-processor Novel is not known"),
        (suffixes, "sets end_of_word_suffix"),
        (lambda document: document.pop("model"), "lacks 'model'"),
    ],
)
def test_unsupported_tokenizers_are_refused_by_name(folders, change, message):
    document = json.loads((folders["own"] / "tokenizer.json").read_text())
    change(document)
    with pytest.raises(DataError, match=message):
        check(document, "here")


@pytest.mark.parametrize("name", ["llama2", "phi-3-mini"])
def test_published_sentencepiece_tokenizers_are_refused(name):
    with pytest.raises(DataError, match="SentencePiece's BPE"):
        check(json.loads(public_data(f"tokenizer_hf/{name}/tokenizer.json").read_text("utf-8")), name)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (cut, ExportError, "is truncated or damaged"),
        (lambda f: (f / "model.safetensors").unlink(), ExportError, "is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{"), ExportError, "tokenizer.json is not JSON"),
        (
            lambda f: edit(f / "config.json", vocab_size=701),
            ArtifactError,
            "has 700 rows, config.json says vocab_size 701",
        ),
        (lambda f: edit(f / "config.json", bos_token_id=7000), ArtifactError, "names the id 7000"),
        (lambda f: add_token(f), ArtifactError, "highest id is 700, but the model has 700 rows"),
    ],
)
def test_models_that_do_not_match_their_tokenizer_are_refused(tmp_path, damage, error, message):
    folder = make_model(tmp_path / "m", vocab=700, hidden=32, layers=1)
    damage(folder)
    with pytest.raises(error, match=message):
        Model.load(folder)


def add_token(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<more>"])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("train", "selection", "config", "message"),
    [
        ([], ["a"], {}, "corpus to trim by is empty"),
        (["a"], ["a"], {"corpus": ["nowhere.txt"]}, "there is no corpus file"),
        (["a"], ["a"], {"measure": ["nowhere.txt"]}, "there is no corpus file"),
        (["a"], ["a"], {"size": 300}, "size: 300 is too small"),
        (["a"], [], {}, "hold no words"),
    ],
)
def test_bad_settings_are_refused_and_leave_the_model_unchanged(folders, tmp_path, train, selection, config, message):
    data = examples(tmp_path / "data", train, selection)
    before = {path.name: sha256(path) for path in folders["llama3"].iterdir()}
    with pytest.raises(CogumiError, match=message):
        run(folders["llama3"], data, tmp_path / "out", **config)
    assert {path.name: sha256(path) for path in folders["llama3"].iterdir()} == before
    assert list((tmp_path / "out").iterdir()) == []


def test_unreadable_corpus_files_are_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd" / "folder.txt").mkdir(parents=True)
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text"):
        list(read_texts([tmp_path / "a.txt"]))
    with pytest.raises(DataError, match=r"folder\.txt cannot be read \(Is a directory\)"):
        list(read_texts([tmp_path / "odd"]))
    with pytest.raises(DataError, match="there is no corpus file"):
        list(read_texts([tmp_path / "nowhere"]))
    with pytest.raises(DataError, match="holds no texts"):
        list(read_texts([tmp_path / "empty"]))
    with pytest.raises(ValueError, match="rising shares"):
        trim.Config(covers=(0.9, 0.5))
