"""A trimmed vocabulary is a complete byte-pair encoding that encodes and decodes any text."""

from __future__ import annotations

import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from cogumi.compress.trim import trim
from cogumi.compress.trim.bpe import BPE, check, renumbering, trimmed
from cogumi.compress.trim.essential import cover, of_size
from cogumi.compress.trim.trimmed_vocabulary import Vocabulary
from cogumi.core.errors import DataError
from cogumi.core.types import Message
from support.gguf import MULTILINGUAL
from support.pico import SENTENCES
from support.trim import NAMES, half, make_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
@settings(max_examples=6, deadline=None)
def test_kept_tokens_form_a_byte_pair_encoding(folders, name, seed, share):
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
    kept_merges = [pair for pair in vocabulary.bpe.merges if {*pair, "".join(pair)} <= after.ids.keys()]
    assert list(after.merges) == kept_merges
    bare = models.BPE(vocab=document["model"]["vocab"], merges=kept_merges)
    for token, number in document["model"]["vocab"].items():
        if vocabulary.bpe.parents(token):
            assert [t.id for t in bare.tokenize(token)] == [number]
            assert set(vocabulary.bpe.parents(token)) <= after.ids.keys()


@pytest.mark.parametrize("name", NAMES)
def test_parents_are_the_pair_that_the_tokenizer_merges(folders, name):
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
def test_any_text_round_trips(folders, tmp_path, name):
    vocabulary = Vocabulary.load(folders[name])
    after = vocabulary.write(half(vocabulary, 1, 0.1), tmp_path)

    @given(st.text(max_size=60) | st.lists(st.sampled_from([*MULTILINGUAL, *SENTENCES]), max_size=3).map(" ".join))
    @settings(max_examples=60, deadline=None)
    def check_round_trip(text):
        wanted = unicodedata.normalize("NFC", text) if name == "qwen2" else text
        assert after.plain.decode(after.encode(text), skip_special_tokens=False) == wanted

    check_round_trip()


@pytest.mark.parametrize("name", NAMES)
def test_texts_of_kept_tokens_are_tokenized_as_before(folders, tmp_path, name):
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
def test_chat_template_and_control_tokens_are_unchanged(folders, tmp_path, name):
    vocabulary = Vocabulary.load(folders[name])
    kept = half(vocabulary, 3, 1.0) - {max(vocabulary.document["model"]["vocab"].values())}
    new, after = renumbering(kept), vocabulary.write(kept, tmp_path)
    messages = (Message("user", "the fox 12"), Message("assistant", "dog"), Message("user", "<|end|> <|eot_id|>"))
    before = vocabulary.tokenizer
    assert after.chat(messages) == [new[i] for i in before.chat(messages)]
    assert after.control == {new[i] for i in before.control}
    assert after.answer("fox") == [new[i] for i in before.answer("fox")]
    # includes the begin-of-text token
    assert after.raw.encode("fox").ids == [new[i] for i in before.raw.encode("fox").ids]


@given(st.dictionaries(st.integers(0, 50), st.integers(1, 9), min_size=1), st.floats(0.01, 1))
def test_cover_is_minimal(counts, share):
    chosen = cover(counts, share)
    covered = sum(counts[i] for i in chosen)
    assert covered >= share * sum(counts.values()) > covered - min(counts[i] for i in chosen)
    assert min(counts[i] for i in chosen) >= max((n for i, n in counts.items() if i not in chosen), default=0)


def test_given_size_is_met_exactly_with_parents_kept(folders):
    bpe = Vocabulary.load(folders["own"]).bpe
    always = bpe.closed(token for token in bpe.ids if len(token) == 1)
    for size in range(len(always), len(bpe.ids) + 1, 7):
        kept = of_size(bpe, {600: 5, 500: 9}, size, always)
        assert len(kept) == size
        assert bpe.closed(kept) == kept
    with pytest.raises(DataError, match="size: 255 is too small: 256 tokens are always kept"):
        of_size(bpe, {}, 255, always)


@pytest.mark.parametrize("name", NAMES)
def test_code_symbols_and_numbers_keep_their_tokens(folders, name):
    vocabulary = Vocabulary.load(folders[name])
    kept = trim.Choice.by(vocabulary, [], ["x"]).of(0.9)
    assert len(kept) < len(vocabulary.bpe.ids)
    for text in ("    ", "\n", " (", "==", "12", " return", "é", "∑", " Δ"):
        ids = vocabulary.tokenizer.encode(text)
        assert kept.issuperset(ids) or (text == " return" and len(ids) > 1)
