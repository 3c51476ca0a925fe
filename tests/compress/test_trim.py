"""A trimmed vocabulary is a whole tokenizer, the model around it says the same, and what costs too much is undone."""

from __future__ import annotations

import json
import math
import random
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from typer.testing import CliRunner

from cogumi.cli import app
from cogumi.compress.gguf.export import export_model
from cogumi.compress.trim import trim
from cogumi.compress.trim.bpe import BPE, check, renumbering, trimmed
from cogumi.compress.trim.essential import cover, of_size
from cogumi.compress.trim.fertility import measure, read_texts, tokens_per_word
from cogumi.compress.trim.remap import Model
from cogumi.compress.trim.trimmed_vocabulary import Vocabulary
from cogumi.core.errors import ArtifactError, CogumiError, DataError, ExportError
from cogumi.core.files import sha256
from cogumi.core.types import Artifact, Message
from cogumi.data.examples import SPLITS, split_path, write_examples
from cogumi.models.folders import load
from cogumi.models.tokenization import HFTokenizer
from support.gguf import MULTILINGUAL, edit, foreign_text, llama
from support.pico import SENTENCES, make_adapter, make_model
from support.public_data import public_data, public_lines
from support.real import llama3, qwen2
from support.train import context, example
from support.vocabularies import real_vocabulary

CONTEXT = context()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {
        "llama3": llama3(root / "llama3", tied=False),
        "qwen2": qwen2(root / "qwen2"),
        "own": make_model(root / "own", vocab=700, hidden=32, layers=1),
    }
    eos = json.loads((found["llama3"] / "config.json").read_text())["eos_token_id"]
    (found["llama3"] / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, eos - 1]}))
    return found


NAMES = ("llama3", "qwen2", "own")


def artifact(path: Path) -> Artifact:
    return Artifact("test", path, "0", {}, {})


def examples(folder: Path, train: list[str], selection: list[str]) -> Path:
    for split in SPLITS:
        texts = {"train": train, "selection": selection}.get(split, [])
        write_examples(split_path(folder, split), [example(f"Say it {i}.", text) for i, text in enumerate(texts)])
    return folder


def run(model: Path, data: Path, out: Path, follow: Path | None = None, **config):
    out.mkdir()
    inputs = {"model": model, "examples": data} | ({"tokenizer": follow} if follow else {})
    return trim.run(trim.Config(**config), {name: artifact(path) for name, path in inputs.items()}, out, CONTEXT)


def half(vocabulary: Vocabulary, seed: int, share: float = 0.5) -> set[int]:
    """A random choice of tokens with all that must be among them."""
    draw = random.Random(seed)
    added = [token["content"] for token in vocabulary.document["added_tokens"]]
    drawn = [token for token in vocabulary.bpe.ids if len(token) == 1 or draw.random() < share]
    return {vocabulary.bpe.ids[token] for token in vocabulary.bpe.closed([*drawn, *added])}


# --- the tokenizer alone


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
@settings(max_examples=6, deadline=None)
def test_what_stays_is_a_byte_pair_encoding(folders, name, seed, share):
    vocabulary = Vocabulary.load(folders[name])
    kept = half(vocabulary, seed, share)
    new = renumbering(kept)
    document = trimmed(vocabulary.document, new, "here")
    check(document, "here")
    after = BPE.of(document)
    assert sorted(after.ids.values()) == list(range(len(kept)))
    order = sorted(after.ids, key=after.ids.__getitem__)
    assert order == [
        token for token in sorted(vocabulary.bpe.ids, key=vocabulary.bpe.ids.__getitem__) if token in after.ids
    ]
    assert all({left, right, left + right} <= after.ids.keys() for left, right in after.merges)
    stay = [pair for pair in vocabulary.bpe.merges if {*pair, "".join(pair)} <= after.ids.keys()]
    assert list(after.merges) == stay
    bare = models.BPE(vocab=document["model"]["vocab"], merges=stay)
    for token, number in document["model"]["vocab"].items():
        if vocabulary.bpe.parents(token):
            assert [t.id for t in bare.tokenize(token)] == [number]
            assert set(vocabulary.bpe.parents(token)) <= after.ids.keys()


@pytest.mark.parametrize("name", NAMES)
def test_parents_are_what_the_tokenizer_joins(folders, name):
    vocabulary = Vocabulary.load(folders[name])
    bpe, model = vocabulary.bpe, vocabulary.document["model"]
    without = {token: dict(bpe.merges) for token in random.Random(1).sample(sorted(model["vocab"]), 60)}
    for token, merges in without.items():
        pair = bpe.parents(token)
        if pair:
            del merges[pair]
            bare = models.BPE(vocab=model["vocab"], merges=list(merges))
            assert tuple(t.value for t in bare.tokenize(token)) == pair


@pytest.mark.parametrize("name", NAMES)
def test_any_text_comes_back(folders, tmp_path, name):
    vocabulary = Vocabulary.load(folders[name])
    after = vocabulary.write(half(vocabulary, 1, 0.1), tmp_path)

    @given(st.text(max_size=60) | st.lists(st.sampled_from([*MULTILINGUAL, *SENTENCES]), max_size=3).map(" ".join))
    @settings(max_examples=60, deadline=None)
    def comes_back(text):
        wanted = unicodedata.normalize("NFC", text) if name == "qwen2" else text
        assert after.plain.decode(after.encode(text), skip_special_tokens=False) == wanted

    comes_back()


@pytest.mark.parametrize("name", NAMES)
def test_texts_whose_tokens_all_stay_keep_them(folders, tmp_path, name):
    vocabulary = Vocabulary.load(folders[name])
    kept = half(vocabulary, 2)
    new, after = renumbering(kept), vocabulary.write(kept, tmp_path)
    words = {word for text in (*SENTENCES, *MULTILINGUAL) for word in text.split(" ")}
    same = other = 0
    for text in sorted(words | {f" {word}" for word in words}):
        ids = vocabulary.tokenizer.encode(text)
        if kept.issuperset(ids):
            assert after.encode(text) == [new[i] for i in ids]
            same += len(ids) > 1
        else:
            other += len(after.encode(text)) > len(ids)
    assert min(same, other) > 20


@pytest.mark.parametrize("name", NAMES)
def test_chat_template_and_control_tokens_are_as_before(folders, tmp_path, name):
    vocabulary = Vocabulary.load(folders[name])
    kept = half(vocabulary, 3, 1.0) - {max(vocabulary.document["model"]["vocab"].values())}
    new, after = renumbering(kept), vocabulary.write(kept, tmp_path)
    messages = (Message("user", "the fox 12"), Message("assistant", "dog"), Message("user", "<|end|> <|eot_id|>"))
    before = vocabulary.tokenizer
    assert after.chat(messages) == [new[i] for i in before.chat(messages)]
    assert after.control == {new[i] for i in before.control}
    assert after.answer("fox") == [new[i] for i in before.answer("fox")]
    assert after.raw.encode("fox").ids == [new[i] for i in before.raw.encode("fox").ids]  # with begin of text


@given(st.dictionaries(st.integers(0, 50), st.integers(1, 9), min_size=1), st.floats(0.01, 1))
def test_a_cover_is_as_small_as_can_be(counts, share):
    chosen = cover(counts, share)
    covered = sum(counts[i] for i in chosen)
    assert covered >= share * sum(counts.values()) > covered - min(counts[i] for i in chosen)
    assert min(counts[i] for i in chosen) >= max((n for i, n in counts.items() if i not in chosen), default=0)


def test_a_size_is_met_exactly_and_closed(folders):
    bpe = Vocabulary.load(folders["own"]).bpe
    always = bpe.closed(token for token in bpe.ids if len(token) == 1)
    for size in range(len(always), len(bpe.ids) + 1, 7):
        kept = of_size(bpe, {600: 5, 500: 9}, size, always)
        assert len(kept) == size
        assert bpe.closed(kept) == kept
    with pytest.raises(DataError, match="size: 255 is too small: 256 tokens are always kept"):
        of_size(bpe, {}, 255, always)


@pytest.mark.parametrize("name", NAMES)
def test_code_symbols_and_numbers_stay_whole(folders, name):
    vocabulary = Vocabulary.load(folders[name])
    kept = trim.Choice.by(vocabulary, [], ["x"]).of(0.9)
    assert len(kept) < len(vocabulary.bpe.ids)
    for text in ("    ", "\n", " (", "==", "12", " return", "é", "∑", " Δ"):
        ids = vocabulary.tokenizer.encode(text)
        assert kept.issuperset(ids) or (text == " return" and len(ids) > 1)


# --- the model around it


def aligned(model):
    """The same weights, each where a new tensor lies: the matrix kernels round by where in memory a number is."""
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_what_stays_are_the_same_bits(folders, tmp_path, name):
    model = Model.load(folders[name])
    kept = half(model.vocabulary, 4)
    model.vocabulary.write(kept, tmp_path)
    model.write(kept, tmp_path)
    before, after = aligned(load(folders[name])), aligned(load(tmp_path))
    old = torch.tensor(sorted(kept))
    rows = before.lm_head.weight[old]

    @given(st.lists(st.integers(0, len(kept) - 1), min_size=1, max_size=40))
    @settings(max_examples=8, deadline=None)
    def the_same(ids):
        new = torch.tensor([ids])
        with torch.no_grad():
            hidden = before.model(old[new]).last_hidden_state
            assert torch.equal(after.model(new).last_hidden_state, hidden)
            assert torch.equal(after(new).logits, torch.nn.functional.linear(hidden, rows))
            torch.testing.assert_close(after(new).logits, before(old[new]).logits[..., old], rtol=1e-5, atol=1e-5)

    the_same()
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == len(kept)
    found, given_ = after.config, json.loads((folders[name] / "config.json").read_text())
    assert found.eos_token_id == renumbering(kept)[given_["eos_token_id"]]
    if name == "llama3":
        eos = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
        assert [HFTokenizer.load(tmp_path).raw.id_to_token(i) for i in eos] == ["<|eot_id|>", "<|end_header_id|>"]


def test_an_adapter_of_the_whole_model_fits_the_trimmed_one(folders, tmp_path):
    model = Model.load(folders["own"])
    kept = half(model.vocabulary, 7)
    model.vocabulary.write(kept, tmp_path)
    model.write(kept, tmp_path)
    adapter = make_adapter(tmp_path / "adapter", folders["own"])
    new, old = torch.arange(40)[None], torch.tensor(sorted(kept))[None, :40]
    hidden = []
    for folder, ids in ((folders["own"], old), (tmp_path, new)):
        adapted = PeftModel.from_pretrained(load(folder), adapter)
        hidden.append(adapted.get_base_model().model(ids).last_hidden_state)
    torch.testing.assert_close(hidden[0], hidden[1])
    assert not torch.allclose(hidden[0], load(folders["own"]).model(old).last_hidden_state)


def test_a_quality_that_is_no_number_is_a_problem():
    one, other = trim.Quality(1.0, 1.0, 0.5), trim.Quality(math.nan, math.nan, 0.0)
    assert trim.quality_problem(trim.Config(), one, one) is None
    assert "perplexity per byte rises by nan%" in trim.quality_problem(trim.Config(), one, other)


@pytest.mark.parametrize("source", [foreign_text, public_lines])
@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_cuts_the_same(folders, tmp_path, name, source):
    model = Model.load(folders[name])
    kept = half(model.vocabulary, 5)
    tokenizer = model.vocabulary.write(kept, tmp_path)
    model.write(kept, tmp_path)
    export_model(tmp_path, tmp_path / "m.gguf")
    stock = llama(tmp_path / "m.gguf", vocab_only=True)
    assert stock.n_vocab() == len(kept)
    for text in source(500):
        text = unicodedata.normalize("NFC", text)  # llama.cpp knows no normalizer
        assert stock.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)


def test_k_quants_need_no_padding_of_rows(tmp_path):
    model = Model.load(make_model(tmp_path / "m", hidden=256, layers=1, vocab=500))
    kept = half(model.vocabulary, 6, 0.9)
    kept -= {max(kept)} if len(kept) % 2 == 0 else set()
    (tmp_path / "t").mkdir()
    tokenizer = model.vocabulary.write(kept, tmp_path / "t")
    model.write(kept, tmp_path / "t")
    export_model(tmp_path / "t", tmp_path / "m.gguf", "q4_k_m")
    stock = llama(tmp_path / "m.gguf")
    assert stock.n_vocab() == len(kept)
    assert len(kept) % 2 == 1
    stock.eval(tokenizer.encode("The quick brown fox"))


# --- the stage


def test_what_texts_never_use_goes(folders, tmp_path):
    data = examples(tmp_path / "data", SENTENCES, SENTENCES)
    found = run(folders["llama3"], data, tmp_path / "out")
    assert not found["rolled_back"]
    assert found["tokens"]["after"] < found["tokens"]["before"]
    assert found["coverage"] >= 0.995
    assert found["round_trip"] == {"ascii": 1.0, "unicode": 1.0}
    assert found["bytes"]["saved"] > 0
    assert found["after"]["nats_per_byte"] < 1.03 * found["before"]["nats_per_byte"]
    again = run(folders["llama3"], data, tmp_path / "again")
    assert again["model_sha256"] == found["model_sha256"] == sha256(tmp_path / "out" / "model.safetensors")
    assert run(folders["qwen2"], data, tmp_path / "q", size=500)["tokens"] == {"before": 643, "after": 500}


def unchanged(folder: Path, out: Path) -> bool:
    return all((out / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir())


def test_a_larger_cover_is_tried_where_the_first_costs_too_much(folders, tmp_path):
    data = examples(tmp_path / "data", SENTENCES, SENTENCES)
    found = run(folders["own"], data, tmp_path / "out", covers=(0.3, 1.0), tokens_per_word=0.0)
    assert [attempt["problem"] is None for attempt in found["attempts"]] == [False, True]
    assert found["attempts"][0]["problem"].startswith("tokens per word rise by")
    assert found["tokens"]["after"] < found["tokens"]["before"]
    assert not found["rolled_back"]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"tokens_per_word": 0.001}, "tokens per word rise by"),
        ({"tokens_per_word": 9.0}, "perplexity per byte rises by"),
    ],
)
def test_what_costs_too_much_is_undone(folders, tmp_path, limits, reason):
    """Random weights find every token alike unlikely: an answer of more tokens is less likely."""
    data = examples(tmp_path / "data", ["xyz"], SENTENCES)
    found = run(folders["llama3"], data, tmp_path / "out", **limits)
    assert found["rolled_back"]
    assert found["reason"].startswith(reason)
    assert len(found["attempts"]) == 3
    assert found["tokens"]["after"] == found["tokens"]["before"]
    assert found["bytes"]["saved"] == 0
    assert unchanged(folders["llama3"], tmp_path / "out")


def test_a_draft_follows_its_base(folders, tmp_path):
    data = examples(tmp_path / "data", SENTENCES[:2], SENTENCES[:2])
    draft = make_model(tmp_path / "draft", vocab=700, hidden=64)
    run(folders["own"], data, tmp_path / "base")
    found = run(draft, data, tmp_path / "trimmed", follow=tmp_path / "base")
    assert found["tokens"]["after"] < found["tokens"]["before"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "trimmed" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    rows = load_file(tmp_path / "trimmed" / "model.safetensors")["model.embed_tokens.weight"]
    assert rows.shape == (found["tokens"]["after"], 64)
    with pytest.raises(DataError, match="has no trimmed form of the tokenizer of"):
        run(draft, data, tmp_path / "wrong", follow=folders["qwen2"])


def test_corpus_files_count_and_files_kept_out_are_measured(folders, tmp_path):
    data = examples(tmp_path / "data", ["xyz"], ["xyz"])
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.py").write_text(SENTENCES[1])
    (tmp_path / "texts" / "b.md").write_text("quick brown fox\n" * 3000)
    (tmp_path / "texts" / "c.bin").write_bytes(b"\xff")
    assert "".join(read_texts([tmp_path / "texts"])) == SENTENCES[1] + "quick brown fox\n" * 3000
    (tmp_path / "kept_out.log").write_text("the brown fox\n")
    texts = {"corpus": [tmp_path / "texts"], "measure": [tmp_path / "kept_out.log"]}
    found = run(folders["own"], data, tmp_path / "out", tokens_per_word=1.0, perplexity=1.0, **texts)
    tokenizer = HFTokenizer.load(tmp_path / "out")
    assert len(tokenizer.encode("quick brown")) == len(HFTokenizer.load(folders["own"]).encode("quick brown"))
    assert found["lines"]["ascii"] == 1 + 1 + 1  # question, answer, the log's line


def test_the_command_says_what_trimming_would_do(folders, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(SENTENCES[:3]), "utf-8")
    (tmp_path / "b.txt").write_text("\n".join(SENTENCES), "utf-8")
    asked = ["vocabulary", str(folders["llama3"]), "--corpus", str(tmp_path / "a.txt")]
    asked += ["--measure", str(tmp_path / "b.txt"), "--size", "650", "--cover", "1"]
    [sized, covering] = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert (sized["asked"], sized["tokens"]) == (650, 650)
    assert covering["coverage"] == 1
    assert covering["tokens_per_word"]["after"] >= covering["tokens_per_word"]["before"]
    assert covering["round_trip"] == {"ascii": 1.0, "unicode": 1.0}
    assert "704 tokens" in CliRunner().invoke(app, asked, env={"COLUMNS": "200"}).stdout


# --- bad input


def sentencepiece(document):
    document["model"] |= {"byte_fallback": True}


def unigram(document):
    document["model"] = {"type": "Unigram", "vocab": [["<unk>", 0.0]]}


def wordpiece(document):
    document["model"] = {"type": "WordPiece", "vocab": {"[UNK]": 0}}


def without_bytes(document):
    del document["model"]["vocab"]["Ġ"]


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
        (without_bytes, "lacks 1 of the 256 bytes"),
        (shared_ids, "two tokens of tokenizer.json share an id"),
        (unknown_processor, "post-processor Novel is not known"),
        (suffixes, "sets end_of_word_suffix"),
        (lambda document: document.pop("model"), "lacks 'model'"),
    ],
)
def test_other_tokenizers_are_refused_by_name(folders, change, message):
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
def test_damaged_models_are_refused(tmp_path, damage, error, message):
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
def test_bad_asks_are_refused_and_leave_the_model_alone(folders, tmp_path, train, selection, config, message):
    data = examples(tmp_path / "data", train, selection)
    before = {path.name: sha256(path) for path in folders["llama3"].iterdir()}
    with pytest.raises(CogumiError, match=message):
        run(folders["llama3"], data, tmp_path / "out", **config)
    assert {path.name: sha256(path) for path in folders["llama3"].iterdir()} == before
    assert list((tmp_path / "out").iterdir()) == []


def test_texts_that_are_none_are_named(tmp_path):
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


# --- a published vocabulary


def test_llama_3_at_a_quarter_of_its_vocabulary(tmp_path):
    """Counted on one book and some code, measured on other books and code; the whole corpora are for `vocabulary`."""
    model = Model.load(real_vocabulary(tmp_path / "m", "llama3", hidden=32, layers=1))
    lines = public_lines(40_000)
    fit, kept_out = "\n".join(lines[:35_000]), "\n".join(lines[35_000:])
    kept = trim.Choice.by(model.vocabulary, [], [fit], model.named).of(32_768)
    (tmp_path / "t").mkdir()
    tokenizer = model.vocabulary.write(kept, tmp_path / "t")
    model.write(kept, tmp_path / "t")
    found = measure(tokens_per_word(model.vocabulary.tokenizer, [kept_out]), tokenizer, [kept_out])
    assert found.rise < 0.05
    assert found.ascii == found.unicode == 1
    new = renumbering(kept)
    assert tokenizer.control == {new[i] for i in range(128_000, 128_256)}
    export_model(tmp_path / "t", tmp_path / "m.gguf")
    stock = llama(tmp_path / "m.gguf", vocab_only=True)
    for text in foreign_text(300) + lines[-300:]:
        assert stock.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)
