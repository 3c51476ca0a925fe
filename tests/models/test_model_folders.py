"""Model folders in every layout that transformers writes: training, engines and export read them alike."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from cogumi.compress.gguf.export import export_model
from cogumi.compress.gguf.gguf_vocabulary import Vocabulary
from cogumi.compress.gguf.layout import Llama
from cogumi.core.errors import ArtifactError, CogumiError, DataError, TrainingError
from cogumi.core.shapes import find_shape
from cogumi.core.types import Message
from cogumi.models.folders import load, save
from cogumi.models.lora import LoraShape, attach, unknown_targets
from cogumi.models.tokenization import HFTokenizer
from support.gguf import F32_CACHE, edit, llama_logits, some_ids, torch_logits
from support.pico import TEMPLATE, make_model, make_tokenizer

OTHER = "{% for message in messages %}{{ message.content | trim + '<|end|>' }}{% endfor %}"
MORE = "additional_chat_templates/"
CHAT = [Message("system", "Be brief. "), Message("user", " 2 + 2?\n")]


@pytest.fixture(scope="module")
def pico(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("pico"))


def config(folder: Path, **changes) -> None:
    edit(folder / "tokenizer_config.json", **changes)


def jinja(folder: Path, text: str = OTHER, name: str = "chat_template.jinja") -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)


def entries(**templates) -> list[dict]:
    return [{"name": name, "template": template} for name, template in templates.items()]


def token(text: str) -> dict:
    return {"__type": "AddedToken", "content": text, "lstrip": False, "normalized": False, "rstrip": False}


def resave(folder: Path) -> None:
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def resave_several(folder: Path) -> None:
    config(folder, chat_template=entries(tool_use="TOOLS", default=OTHER))
    resave(folder)
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


def old_map(folder: Path) -> None:
    config(folder, eos_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": token("<|end|>") | {"special": True}}))


def normalize(folder: Path, *normalizers: dict) -> None:
    edit(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": list(normalizers)})


LAYOUTS = {
    "template in the settings": (lambda folder: None, TEMPLATE),
    "template in its own file": (lambda folder: (config(folder, chat_template=None), jinja(folder)), OTHER),
    "own file before settings": (jinja, OTHER),
    "list": (lambda folder: config(folder, chat_template=entries(tool_use="TOOLS", default=OTHER)), OTHER),
    "further files": (lambda folder: (jinja(folder), jinja(folder, "T", MORE + "tool_use.jinja")), OTHER),
    "default among further files": (lambda folder: jinja(folder, OTHER, MORE + "default.jinja"), OTHER),
    "saved by transformers": (resave, TEMPLATE),
    "several saved by transformers": (resave_several, OTHER),
    "end token as an object": (lambda folder: config(folder, eos_token=token("<|end|>")), TEMPLATE),
    "end token in the old map": (old_map, TEMPLATE),
    "empty normalizer": (lambda folder: normalize(folder), TEMPLATE),
    "normalizer in a sequence": (lambda folder: normalize(folder, {"type": "NFC"}), TEMPLATE),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_and_export_use_the_template_that_transformers_uses(tmp_path, pico, name):
    change, template = LAYOUTS[name]
    folder = Path(shutil.copytree(pico, tmp_path / "m"))
    change(folder)
    ours, theirs = HFTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.template == Vocabulary.load(folder).template == template
    assert ours.eos_text == theirs.eos_token == "<|end|>"
    chat = [{"role": m.role, "content": m.content} for m in CHAT]
    assert ours.chat(CHAT) == theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)["input_ids"]
    (out := tmp_path / "out").mkdir()
    save(load(folder), folder, out)
    saved = HFTokenizer.load(out)
    assert (saved.template, saved.eos, saved.chat(CHAT)) == (template, ours.eos, ours.chat(CHAT))
    assert Vocabulary.load(out).template == template


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: config(f, chat_template=entries(a="x", b="y")), r"templates \(a, b\), none named 'default'"),
        (lambda f: jinja(f, "x", "additional_chat_templates/rag.jinja"), r"several chat templates \(rag\)"),
        (lambda f: config(f, chat_template=7), "chat_template is not text"),
        (lambda f: config(f, chat_template=None), "lacks chat_template or eos_token"),
        (lambda f: config(f, eos_token=None), "lacks chat_template or eos_token"),
        (lambda f: config(f, eos_token="</s>"), "eos_token '</s>' is not in tokenizer.json"),
        (lambda f: config(f, bos_token=token("<s>")), "bos_token '<s>' is not in tokenizer.json"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json is not JSON"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json is not a JSON object"),
        (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe"), "chat_template.jinja is not UTF-8"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    ],
)
def test_unusable_tokenizer_settings_are_refused_in_one_line(tmp_path, change, message):
    make_tokenizer(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        HFTokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_generation_ends_with_every_declared_end_token(tmp_path, pico):
    folder = Path(shutil.copytree(pico, tmp_path / "m"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 0]}))
    config(folder, eos_token="<|system|>")
    tokenizer = HFTokenizer.load(folder)
    assert (tokenizer.eos, tokenizer.ends) == (4, {0, 1, 4})  # closed by <|end|>, ended by <|pad|>, <|system|> and it


def test_added_tokens_that_are_not_special_stand_for_their_text(tmp_path):
    from tokenizers import AddedToken

    raw = make_tokenizer(tmp_path)
    raw.add_tokens([AddedToken("<tool é>", special=False)])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HFTokenizer.load(tmp_path)
    assert b"".join(map(tokenizer.piece, tokenizer.encode("a <tool é> 日"))).decode() == "a <tool é> 日"


def test_sharded_weights_are_read(tmp_path, pico):
    folder = Path(shutil.copytree(pico, tmp_path / "m"))
    (folder / "model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(pico).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    ids = some_ids(50)
    expected = torch_logits(LlamaForCausalLM.from_pretrained(pico), ids)
    assert (torch_logits(load(folder), ids) == expected).all()
    assert find_shape("m", tmp_path) == find_shape(pico.name, pico.parent)
    export_model(folder, tmp_path / "m.gguf", "f32")
    export_model(pico, tmp_path / "one.gguf", "f32")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_folders_with_pickled_weights_only_are_refused_before_any_work(tmp_path, pico, name):
    folder = Path(shutil.copytree(pico, tmp_path / "m"))
    (folder / "model.safetensors").rename(folder / name)
    for work in (load, lambda f: find_shape(f.name, f.parent), lambda f: export_model(f, tmp_path / "m.gguf")):
        with pytest.raises(CogumiError, match=f"weights in {name} only; save the model as safetensors") as caught:
            work(folder)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def untied(tmp_path_factory, pico) -> Path:
    """A folder whose config ties head and embedding, though it stores two different ones."""
    folder = tmp_path_factory.mktemp("untied") / "m"
    shutil.copytree(pico, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = 0.1 * torch.randn(weights["model.embed_tokens.weight"].shape)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_stored_head_is_used_even_if_the_config_ties_it(tmp_path, untied):
    ids = some_ids(100)
    stored = load_file(untied / "model.safetensors")["lm_head.weight"]
    model = load(untied)
    expected = torch_logits(model, ids)
    assert torch.equal(model.lm_head.weight, stored)
    assert not model.config.tie_word_embeddings
    (tmp_path / "out").mkdir()
    save(model, untied, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert (torch_logits(load(tmp_path / "out"), ids) == expected).all()
    for folder in (untied, tmp_path / "out"):
        assert not find_shape(str(folder), Path()).tied
        export_model(folder, tmp_path / "m.gguf", "f32")
        got = llama_logits(tmp_path / "m.gguf", ids, **F32_CACHE)
        assert abs(got - expected).max() < 2e-4 * abs(expected).max()


def test_a_stored_head_equal_to_the_embedding_stays_tied(tmp_path, pico):
    folder = Path(shutil.copytree(pico, tmp_path / "m"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert load(folder).config.tie_word_embeddings
    assert find_shape("m", tmp_path).tied
    assert Llama.load(folder).tied
    export_model(folder, tmp_path / "m.gguf", "f32")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_project"])
def test_targets_outside_the_layers_are_refused_by_training_as_by_the_plan(tmp_path, tied, target):
    folder, shape = make_model(tmp_path / "m", hidden=32, tied=tied), LoraShape(rank=2, targets=("q_proj", target))
    with pytest.raises(TrainingError) as caught:
        attach(load(folder), shape, 0)
    assert [str(caught.value)] == unknown_targets(shape, find_shape("m", tmp_path).linear)
    assert f"LoRA target '{target}' is not a layer of this model" in str(caught.value)


def test_damaged_weights_are_reported_by_whoever_loads_them(tmp_path, pico):
    folder = Path(shutil.copytree(pico, tmp_path / "m"))
    data = (folder / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(data) // 2):
        (folder / "model.safetensors").write_bytes(data[:size])
        assert find_shape("m", tmp_path).tied
        with pytest.raises(ArtifactError, match="holds no model that can be loaded"):
            load(folder)
