"""Stage `trim`: the trimmed model gives the same logits, and a trim that costs too much quality is rolled back."""

from __future__ import annotations

import json
import math
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from cogumi.cli.main import app
from cogumi.compress.gguf.export import export_model
from cogumi.compress.trim import trim
from cogumi.compress.trim.bpe import renumbering
from cogumi.compress.trim.fertility import measure, read_texts, tokens_per_word
from cogumi.compress.trim.remap import Model
from cogumi.core.errors import DataError
from cogumi.core.files import sha256
from cogumi.models.folders import load
from cogumi.models.tokenization import HFTokenizer
from support.gguf import foreign_text, llama
from support.pico import SENTENCES, make_adapter, make_model
from support.public_data import public_lines
from support.trim import NAMES, examples, half, make_folders, run
from support.vocabularies import real_vocabulary


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("models"))


# --- the trimmed model


def aligned(model):
    """Copy every weight to a new tensor, because rounding in the matrix kernels depends on memory alignment."""
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_kept_tokens_are_bit_identical(folders, tmp_path, name):
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


def test_adapter_of_the_original_model_works_on_the_trimmed_one(folders, tmp_path):
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


def test_nan_quality_is_reported_as_a_problem():
    one, other = trim.Quality(1.0, 1.0, 0.5), trim.Quality(math.nan, math.nan, 0.0)
    assert trim.quality_problem(trim.Config(), one, one) is None
    assert "perplexity per byte rises by nan%" in trim.quality_problem(trim.Config(), one, other)


@pytest.mark.parametrize("source", [foreign_text, public_lines])
@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_tokenizes_like_the_trimmed_tokenizer(folders, tmp_path, name, source):
    model = Model.load(folders[name])
    kept = half(model.vocabulary, 5)
    tokenizer = model.vocabulary.write(kept, tmp_path)
    model.write(kept, tmp_path)
    export_model(tmp_path, tmp_path / "m.gguf")
    stock = llama(tmp_path / "m.gguf", vocab_only=True)
    assert stock.n_vocab() == len(kept)
    for text in source(500):
        text = unicodedata.normalize("NFC", text)  # llama.cpp has no normalizer
        assert stock.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)


def test_k_quants_do_not_need_an_even_vocabulary_size(tmp_path):
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


def test_unused_tokens_are_removed(folders, tmp_path):
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


def test_larger_cover_is_tried_when_the_first_costs_too_much(folders, tmp_path):
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
def test_trim_that_costs_too_much_is_rolled_back(folders, tmp_path, limits, reason):
    """With random weights all tokens are equally likely, so an answer of more tokens is less likely."""
    data = examples(tmp_path / "data", ["xyz"], SENTENCES)
    found = run(folders["llama3"], data, tmp_path / "out", **limits)
    assert found["rolled_back"]
    assert found["reason"].startswith(reason)
    assert len(found["attempts"]) == 3
    assert found["tokens"]["after"] == found["tokens"]["before"]
    assert found["bytes"]["saved"] == 0
    assert unchanged(folders["llama3"], tmp_path / "out")


def test_draft_is_trimmed_like_its_base(folders, tmp_path):
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


def test_corpus_files_are_counted_and_held_out_files_measured(folders, tmp_path):
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
    assert found["lines"]["ascii"] == 1 + 1 + 1  # question, answer and the line of the log


def test_vocabulary_command_estimates_the_effect_of_trimming(folders, tmp_path):
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


# --- a published vocabulary


def test_llama_3_at_a_quarter_of_its_vocabulary(tmp_path):
    """Counted on one book and some code, measured on other books and code; `cogumi vocabulary` covers whole corpora."""
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
