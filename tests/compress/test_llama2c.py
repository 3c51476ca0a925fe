"""llama2.c checkpoints as GGUF: the published story is reproduced for any head size; invalid files are refused."""

import math
import struct
from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cogumi.core.errors import BundleError, DataError, ExportError
from cogumi.core.types import Request
from cogumi.engine.llama.binding.model import Model, load_tokenizer
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply, replies
from cogumi.evaluate.bench.cache_quality import perplexity
from support.gguf import F32_CACHE, MULTILINGUAL, llama
from support.llama2c import convert
from support.public_data import public_data

BOS, EOS = 1, 2


def checkpoint():
    return public_data("stories260k/stories260K.bin")


def vocabulary():
    return public_data("stories260k/tok512.bin")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Return a function that converts the checkpoint once per type and head size."""
    folder, done = tmp_path_factory.mktemp("stories"), {}

    def make(type="f32", head=None):
        if (type, head) not in done:
            file = folder / f"{type}-{head}.gguf"
            convert(checkpoint(), vocabulary(), file, type, head)
            done[type, head] = file
        return done[type, head]

    return make


@pytest.fixture(scope="module")
def story():
    """The output of run.c at temperature 0 in 256 steps, from its documentation."""
    document = public_data("stories260k/stories260K.md").read_text(encoding="utf-8")
    return document.split("-t 0.0\n")[1].split("```")[0].rstrip("\n")


@pytest.fixture(scope="module")
def stories(converted, story):
    """The published story and 8 that the model generates: about 3,000 tokens like its training data."""
    with closing(LlamaEngine(converted(), slots=8, lookup=False, cache="f16")) as engine:
        asked = [Request(prompt=(BOS,), max_tokens=500, temperature=1.0, seed=seed) for seed in range(8)]
        return "\n".join([story, *(reply.text.strip() for reply in replies(engine, asked))])


def greedy(path):
    with closing(LlamaEngine(path, slots=1, lookup=False, cache="f16")) as engine:
        return final_reply(engine.generate(Request(prompt=(BOS,), max_tokens=256))).text.removeprefix(" ")


@pytest.fixture(scope="module")
def book():
    return public_data("corpus_text/11.txt").read_text(encoding="utf-8", errors="replace")[2000:22000]


def logits(path, ids):
    model = llama(path, logits_all=True, **F32_CACHE)
    model.eval(list(ids))
    return np.array(model.scores[: len(ids)])


def test_published_story_is_reproduced(converted, story):
    assert greedy(converted()) == story


@pytest.mark.parametrize("head", [16, 32, 64])
def test_padding_heads_does_not_change_the_story(converted, story, head):
    ids = [BOS, *load_tokenizer(converted()).encode(story)]
    narrow, wide = logits(converted(), ids), logits(converted(head=head), ids)
    assert np.abs(narrow - wide).max() < 1e-4  # logits go up to 20
    assert greedy(converted(head=head)) == story


def test_untied_classifier(converted, story, tmp_path):
    width, *rest = struct.unpack("<7i", checkpoint().read_bytes()[:28])
    rows, body = rest[4], np.fromfile(checkpoint(), "<f4", offset=28)
    header = struct.pack("<7i", width, *rest[:4], -rows, rest[5])
    doubled = np.concatenate([body, 2 * body[: rows * width]])
    (tmp_path / "own.bin").write_bytes(header + doubled.tobytes())
    convert(tmp_path / "own.bin", vocabulary(), tmp_path / "own.gguf")
    ids = [BOS, *load_tokenizer(converted()).encode(story)[:50]]
    np.testing.assert_allclose(logits(tmp_path / "own.gguf", ids), 2 * logits(converted(), ids), atol=1e-4)


@pytest.mark.parametrize(("type", "head"), [("f16", None), ("q8_0", 32), ("q4_k_m", None)])
def test_smaller_types_keep_the_perplexity(converted, story, book, type, head):
    assert converted(type, head).stat().st_size < converted("f32", head).stat().st_size * 0.6
    exact = [perplexity(converted(), text, "f16", 512) for text in (story, book[:3000])]
    assert 1.1 < exact[0] < 3 < exact[1] < 512  # its own greedy text, and a book outside its training data
    for text, expected in zip((story, book[:3000]), exact, strict=True):
        assert perplexity(converted(type, head), text, "f16", 512) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("context", [64, 512])
def test_perplexity_counts_every_token_once(converted, story, context):
    ids = load_tokenizer(converted()).encode(story)
    nats = []
    for start in range(0, len(ids) - 1, context - 1):
        run = ids[start : start + context]
        rows = logits(converted(), run)[:-1].astype(np.float64)
        nats += (np.logaddexp.reduce(rows, axis=1) - rows[np.arange(len(run) - 1), run[1:]]).tolist()
    assert len(nats) == len(ids) - 1
    assert perplexity(converted(), story, "f16", context) == pytest.approx(math.exp(np.mean(nats)), rel=1e-3)


def test_perplexity_with_a_quantized_cache(converted, stories):
    """With head size 8, errors hardly average out, so q4_0 costs this model far more than larger ones."""
    assert len(load_tokenizer(converted()).encode(stories)) > 2000
    f16, q8_0, q4_0 = (perplexity(converted(head=32), stories, cache, 512) for cache in ("f16", "q8_0", "q4_0"))
    assert f16 == pytest.approx(perplexity(converted(), stories, "f16", 512), rel=1e-3)
    assert f16 == pytest.approx(4, abs=0.5)  # its training ended at 1.30 nats
    assert q8_0 == pytest.approx(f16, rel=0.01)
    assert 1.2 < q4_0 / f16 < 3
    with pytest.raises(BundleError):
        perplexity(converted(), stories, "q4_0", 512)


def test_perplexity_of_an_empty_text_is_refused(converted):
    with pytest.raises(DataError, match="two tokens"):
        perplexity(converted(), "", "f16", 512)


def test_special_tokens(converted):
    tokenizer = load_tokenizer(converted())
    assert tokenizer.size == 512
    assert [tokenizer.piece(i) for i in (0, BOS, EOS)] == [b"", b"", b""]
    assert [tokenizer.piece(3 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert tokenizer.ends == {BOS, EOS}  # run.c stops at the start of the next story
    model = llama(converted(), vocab_only=True)
    assert (model.token_bos(), model.token_eos()) == (BOS, EOS)
    assert model.tokenize(b"a", add_bos=True)[0] == BOS


def pieces_of(path):
    data, start, pieces = path.read_bytes(), 4, []
    while start < len(data):
        score, length = struct.unpack_from("<fi", data, start)
        start += 8 + length
        pieces.append((data[start - length : start].decode(), score))
    return pieces


def encode_like_run_c(text, pieces):
    """Like `encode` of run.c: characters or their bytes, then merge the best-scored neighbours until none is left."""
    known = {piece: i for i, (piece, _) in enumerate(pieces)}
    ids = [known[" "]] if text else []
    for character in text:
        ids += [known[character]] if character in known else [3 + byte for byte in character.encode()]
    while True:
        joined = [known.get(pieces[a][0] + pieces[b][0]) for a, b in pairwise(ids)]
        best = max((i for i, id in enumerate(joined) if id is not None), key=lambda i: pieces[joined[i]][1], default=-1)
        if best < 0:
            return ids
        ids[best : best + 2] = [joined[best]]


def test_tokenization_equals_run_c(converted, story, book):
    tokenizer, pieces = load_tokenizer(converted()), pieces_of(vocabulary())
    for text in (story, *book.splitlines(), *MULTILINGUAL, "", " ", "  two  spaces ", "<s> </s> <0x41>\t\n"):
        ids = tokenizer.encode(text)
        assert ids == encode_like_run_c(text, pieces)
        assert tokenizer.decode(ids) == (f" {text}" if text else "")

    # run.c ends at a NUL; "▁" is how SentencePiece writes a space, so llama.cpp reads it as one
    characters = st.sampled_from("  the and Lily's. \"\n!<s>é") | st.characters(exclude_characters="\0▁", codec="utf-8")

    @given(st.text(characters))
    @example("<s>\n</s>\n<unk>")
    def same(text):
        assert tokenizer.encode(text) == encode_like_run_c(text, pieces)

    same()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-4], "cut short or foreign"),
        (lambda data: data + b"\0", "cut short or foreign"),
        (lambda data: data[:20], "cut short"),
        (lambda data: b"24ka" + data[4:], "later version"),
        (lambda data: b"GGUF" + data[4:], "header makes no sense|cut short or foreign"),
        (lambda data: bytes(28) + data[28:], "header makes no sense"),
        (lambda data: data[:5000] + struct.pack("<f", math.nan) + data[5004:], "NaN"),
    ],
)
def test_invalid_checkpoints_are_refused(change, message, tmp_path):
    (tmp_path / "bad.bin").write_bytes(change(checkpoint().read_bytes()))
    refused(message, tmp_path, model=tmp_path / "bad.bin")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + data[-9:],
        lambda data: data[:2000],
        lambda data: b"",
        lambda data: data.replace(b"<0x41>", b"<0x4x>"),
        lambda data: data[:-1] + b"\xff",
        lambda data: data[:8] + struct.pack("<i", -50) + data[12:],
    ],
)
def test_invalid_vocabularies_are_refused(change, tmp_path):
    (tmp_path / "bad.bin").write_bytes(change(vocabulary().read_bytes()))
    refused("no llama2.c tokenizer", tmp_path, tokens=tmp_path / "bad.bin")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": 12}, "multiple of 8"),
        ({"head": 4}, "multiple of 8"),
        ({"head": -8}, "multiple of 8"),
        ({"type": "q4"}, "unknown type 'q4'; known: f32, f16, q4_0"),
    ],
)
def test_unsupported_types_and_head_sizes_are_refused(arguments, message, tmp_path):
    refused(message, tmp_path, **arguments)


def test_missing_files_are_refused_by_name(tmp_path):
    missing = tmp_path / "nowhere.bin"
    refused("nowhere.bin is missing", tmp_path, model=missing, tokens=missing)


def refused(message, folder, model=None, tokens=None, **arguments):
    before = sorted(folder.iterdir())
    with pytest.raises(ExportError, match=message) as caught:
        convert(model or checkpoint(), tokens or vocabulary(), folder / "out.gguf", **arguments)
    assert "\n" not in str(caught.value)
    assert sorted(folder.iterdir()) == before


def test_failed_conversion_keeps_the_old_file(converted, tmp_path):
    (tmp_path / "out.gguf").write_bytes(converted().read_bytes())
    data = checkpoint().read_bytes()
    (tmp_path / "bad.bin").write_bytes(data[:5000] + struct.pack("<f", math.inf) + data[5004:])
    refused("infinity", tmp_path, model=tmp_path / "bad.bin")
    assert Model(tmp_path / "out.gguf").tokenizer.size == 512
