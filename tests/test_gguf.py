"""GGUF export: llama.cpp computes what torch does and tokenizes as the tokenizer does, or it is refused."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tarfile
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaForCausalLM

from cogumi.artifact import sha256
from cogumi.compress.gguf import TYPES, Config, export_adapter, export_model, run
from cogumi.compress.layout import rotary_order
from cogumi.compress.vocabulary import Vocabulary
from cogumi.errors import ExportError
from cogumi.models.text import HFTokenizer
from cogumi.types import Artifact, Message, Request
from pico import SENTENCES, SPECIALS, TEMPLATE, make_adapter, make_model

DATA = Path(os.environ.get("COGUMI_TEST_DATA") or Path(__file__).parents[1] / "../shared/data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no public data at {DATA} (set COGUMI_TEST_DATA)")
F32_CACHE = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}


@pytest.fixture(scope="module")
def pico(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("pico"), hidden=128)  # 4 heads, 2 key-value heads


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, pico) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), pico)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Hidden 256, and sure of itself on SENTENCES: random weights leave near-ties that any rounding turns."""
    folder = make_model(tmp_path_factory.mktemp("trained"), hidden=256, scale=0.05)
    model = LlamaForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    ids = torch.tensor([text_ids(folder)])
    for _ in range(9):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def text_ids(folder: Path) -> list[int]:
    return HFTokenizer.load(folder).encode("\n".join(SENTENCES))


@pytest.fixture
def copy(tmp_path, pico) -> Path:
    """A copy of the pico model to break."""
    return Path(shutil.copytree(pico, tmp_path / "copy"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change, name: str = "model.safetensors") -> None:
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name)


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))


def plain_tokenizer() -> Tokenizer:
    """Byte-level BPE without digit splitting, whose merges join digits, so that a wrong `pre` shows."""
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


def llama(path: Path, **options) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        str(path), verbose=False, n_threads=1, n_threads_batch=1, **{"n_ctx": 512} | options
    )


def llama_logits(path: Path, ids: list[int], **options) -> np.ndarray:
    """[ids, vocabulary] of stock llama.cpp."""
    model = llama(path, logits_all=True, **options)
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def torch_logits(model, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def some_ids(count: int = 300, vocabulary: int = 512) -> list[int]:
    return random.Random(1).choices(range(5, vocabulary), k=count)


# --- the model ---


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_f32_is_torch(tmp_path, tied):
    folder = make_model(tmp_path / "m", hidden=128, tied=tied)
    export_model(folder, tmp_path / "m.gguf", "f32")
    ids = some_ids()
    expected = torch_logits(LlamaForCausalLM.from_pretrained(folder), ids)
    got = llama_logits(tmp_path / "m.gguf", ids, **F32_CACHE)
    assert np.abs(got - expected).max() < 2e-4 * np.abs(expected).max()
    names = {t.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert ("output.weight" in names) != tied


def test_one_key_value_head_and_a_theta_of_its_own(tmp_path):
    folder = make_model(tmp_path / "m", hidden=64)  # 2 heads share 1
    edit(
        folder / "config.json",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        rms_norm_eps=1e-3,
    )
    export_model(folder, tmp_path / "m.gguf", "f32")
    ids = some_ids()
    expected = torch_logits(LlamaForCausalLM.from_pretrained(folder), ids)
    got = llama_logits(tmp_path / "m.gguf", ids, **F32_CACHE)
    assert np.abs(got - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("type", "agreement"), [("f16", 0.99), ("q8_0", 0.95), ("q4_k_m", 0.90)])
def test_smaller_types_agree_with_torch(tmp_path, trained, type, agreement):
    export_model(trained, tmp_path / "m.gguf", type)
    ids = text_ids(trained)
    expected = torch_logits(LlamaForCausalLM.from_pretrained(trained), ids)
    got = llama_logits(tmp_path / "m.gguf", ids)
    assert (got.argmax(1) == expected.argmax(1)).mean() >= agreement
    types = [t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors]
    assert types.count({"f16": "F16", "q8_0": "Q8_0", "q4_k_m": "Q4_K"}[type]) >= 8
    assert list(tmp_path.iterdir()) == [tmp_path / "m.gguf"]


def test_q8_0_is_what_llama_cpp_makes(tmp_path, pico):
    from cogumi.runtime.llama import quantize

    export_model(pico, tmp_path / "f32.gguf", "f32")
    export_model(pico, tmp_path / "ours.gguf", "q8_0")
    quantize(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", "q8_0")
    ours, theirs = (GGUFReader(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    stored = {t.name: t for t in theirs.tensors}
    for tensor in ours.tensors:
        assert tensor.tensor_type == stored[tensor.name].tensor_type, tensor.name
        assert np.array_equal(tensor.data, stored[tensor.name].data), tensor.name


def test_bfloat16_weights_are_read(tmp_path, copy):
    edit_weights(copy, lambda w: w.update({name: value.bfloat16() for name, value in w.items()}))
    export_model(copy, tmp_path / "m.gguf", "f32")
    ids = some_ids(50)
    expected = torch_logits(LlamaForCausalLM.from_pretrained(copy, dtype=torch.float32), ids)
    got = llama_logits(tmp_path / "m.gguf", ids, **F32_CACHE)
    assert np.abs(got - expected).max() < 2e-4 * np.abs(expected).max()


def test_narrow_rows_stay_f16(tmp_path):
    folder = make_model(tmp_path / "m", hidden=64)
    edit(folder / "config.json", intermediate_size=80)
    LlamaForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True).save_pretrained(folder)
    export_model(folder, tmp_path / "m.gguf", "q8_0")
    types = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert llama(tmp_path / "m.gguf").create_completion([7, 8, 9], max_tokens=4)["usage"]["completion_tokens"]


@pytest.mark.parametrize("type", ["f32", "f16", "q8_0", "q4_k_m"])
def test_stock_llama_answers_a_chat(tmp_path, pico, type):
    export_model(pico, tmp_path / "m.gguf", type)
    model = llama(tmp_path / "m.gguf")
    assert model.metadata["tokenizer.chat_template"] == TEMPLATE
    assert model.metadata["llama.context_length"] == "1024"
    assert model.token_eos() == SPECIALS.index("<|end|>")
    assert model._model.add_bos_token() is False
    reply = model.create_chat_completion([{"role": "user", "content": "2 + 3?"}], max_tokens=4)
    prompt = HFTokenizer.load(pico).render(Request(messages=(Message("user", "2 + 3?"),)))
    assert reply["usage"]["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize("type", ["f32", "q8_0", "q4_k_m"])
def test_same_input_same_bytes(tmp_path, pico, type):
    elsewhere = shutil.copytree(pico, tmp_path / "another name")
    export_model(pico, tmp_path / "a.gguf", type)
    export_model(elsewhere, tmp_path / "b.gguf", type)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@given(heads=st.integers(1, 4), half=st.integers(1, 8), columns=st.integers(1, 3))
def test_rotary_order_pairs_the_halves(heads, half, columns):
    rows = np.arange(heads * 2 * half * columns).reshape(-1, columns)
    ordered = rotary_order(rows, heads).reshape(heads, half, 2, columns)
    split = rows.reshape(heads, 2, half, columns)
    assert np.array_equal(ordered[:, :, 0], split[:, 0])
    assert np.array_equal(ordered[:, :, 1], split[:, 1])


# --- the adapter ---


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_adapter_is_peft(tmp_path, tied):
    from peft import PeftModel

    base = make_model(tmp_path / "m", hidden=128, tied=tied)
    folder = make_adapter(tmp_path / "a", base, rank=3)
    export_model(base, tmp_path / "m.gguf", "f32")
    export_adapter(folder, base, tmp_path / "a.gguf")
    ids = some_ids()
    model = LlamaForCausalLM.from_pretrained(base)
    bare = torch_logits(model, ids)
    expected = torch_logits(PeftModel.from_pretrained(model, folder), ids)
    got = llama_logits(tmp_path / "m.gguf", ids, lora_path=str(tmp_path / "a.gguf"), **F32_CACHE)
    assert np.abs(expected - bare).max() > 0.1 * np.abs(bare).max()  # the adapter does something
    assert np.abs(got - expected).max() < 2e-4 * np.abs(expected).max()


def test_adapter_on_the_output_layer_of_an_untied_model(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = make_model(tmp_path / "m", tied=False)
    export_model(base, tmp_path / "m.gguf", "f32")
    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(
        tmp_path / "a", save_embedding_layers=False
    )
    export_adapter(tmp_path / "a", base, tmp_path / "a.gguf")
    ids = some_ids(100)
    expected = torch_logits(
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "a"), ids
    )
    got = llama_logits(tmp_path / "m.gguf", ids, lora_path=str(tmp_path / "a.gguf"), **F32_CACHE)
    assert np.abs(got - expected).max() < 2e-4 * np.abs(expected).max()


def test_adapter_files_are_reproducible(tmp_path, pico, adapter):
    export_adapter(adapter, pico, tmp_path / "a.gguf")
    export_adapter(Path(shutil.copytree(adapter, tmp_path / "elsewhere")), pico, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def rename(old: str, new: str):
    def change(weights):
        for name in [n for n in weights if old in n]:
            weights[name.replace(old, new)] = weights.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename("layers.1.mlp.up_proj.lora", "embed_tokens.lora_embedding"), "embed_tokens.lora_embedding_A"),
        (
            rename("layers.1.mlp.up_proj", "layers.7.mlp.up_proj"),
            "model.layers.7.mlp.up_proj.weight is no proj",
        ),
        (rename("layers.1.mlp.up_proj", "lm_head"), "model.lm_head.weight is no projection"),
        (rename("0.mlp.up_proj.lora_B", "0.mlp.down_proj.lora_X"), "down_proj.lora_X"),
        (
            lambda w: w.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"),
            "up_proj.weight lacks lora_B",
        ),
        (
            lambda w: w["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].fill_(torch.nan),
            "up_proj.lora_B",
        ),
    ],
)
def test_adapters_that_cannot_be_mapped_are_named(tmp_path, pico, adapter, change, message):
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    edit_weights(folder, change, "adapter_model.safetensors")
    with pytest.raises(ExportError, match=re.escape(message)):
        export_adapter(folder, pico, tmp_path / "a.gguf")
    assert not list(tmp_path.glob("a.gguf*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 9}, "rank 4"),
    ],
)
def test_unknown_kinds_of_adapter_are_refused(tmp_path, pico, adapter, change, message):
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    edit(folder / "adapter_config.json", **change)
    with pytest.raises(ExportError, match=message):
        export_adapter(folder, pico, tmp_path / "a.gguf")


def test_adapter_of_another_width_is_refused(tmp_path, adapter):
    other = make_model(tmp_path / "other", hidden=64)
    with pytest.raises(ExportError, match=r"shape .* config.json asks for"):
        export_adapter(adapter, other, tmp_path / "a.gguf")


# --- refusals of models ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM; supported: LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type is 'llama3'"),
        (
            {"num_key_value_heads": 4},
            r"k_proj.weight has shape \(64, 128\), config.json asks for \(128, 128\)",
        ),
        ({"num_hidden_layers": 3}, "lack model.layers.2"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight"),
        ({"tie_word_embeddings": False}, "lack lm_head.weight"),
        ({"vocab_size": 400}, "highest id is 511"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path, copy, change, message):
    edit(copy / "config.json", **change)
    with pytest.raises(ExportError, match=message):
        export_model(copy, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))


@pytest.mark.parametrize("type", ["f32", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named(tmp_path, copy, type, value):
    edit_weights(copy, lambda w: w["model.layers.1.mlp.down_proj.weight"].view(-1)[77:78].fill_(value))
    (tmp_path / "m.gguf").write_text("an earlier file")
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds NaN or infinity"):
        export_model(copy, tmp_path / "m.gguf", type)
    assert (tmp_path / "m.gguf").read_text() == "an earlier file"
    assert list(tmp_path.glob("m.gguf*")) == [tmp_path / "m.gguf"]


def test_values_beyond_f16_are_refused_there(tmp_path, copy):
    edit_weights(copy, lambda w: w["model.embed_tokens.weight"][3].fill_(7e4))
    with pytest.raises(
        ExportError, match=r"embed_tokens.weight holds values too large for f16; export as f32"
    ):
        export_model(copy, tmp_path / "m.gguf", "f16")
    export_model(copy, tmp_path / "m.gguf", "f32")


@pytest.mark.parametrize("keep", [0, 5, 500, 0.5, -1])
def test_weights_cut_short_are_refused(tmp_path, copy, keep):
    path = copy / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep % size)
    with pytest.raises(ExportError, match="cut short or damaged"):
        export_model(copy, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_missing_files_are_named(tmp_path, copy, name):
    (copy / name).unlink()
    with pytest.raises(ExportError, match=f"{re.escape(name)} is missing"):
        export_model(copy, tmp_path / "m.gguf")


def test_broken_json_and_missing_keys_are_named(tmp_path, copy):
    config = json.loads((copy / "config.json").read_text())
    del config["hidden_size"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="lacks 'hidden_size'"):
        export_model(copy, tmp_path / "m.gguf")
    (copy / "config.json").write_text("{")
    with pytest.raises(ExportError, match=r"config\.json is not JSON"):
        export_model(copy, tmp_path / "m.gguf")


def test_a_full_disk_leaves_no_file(tmp_path, pico):
    import resource
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the closest to a full disk without root
    try:
        with pytest.raises(OSError):
            export_model(pico, tmp_path / "m.gguf", "f32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.glob("m.gguf*"))


def test_unknown_types_are_refused(tmp_path, pico):
    with pytest.raises(ExportError, match=r"'q8'; known: f32, f16, .*q4_k_m"):
        export_model(pico, tmp_path / "m.gguf", "q8")
    with pytest.raises(ValidationError, match="unknown type 'q8'"):
        Config(type="q8")
    assert Config().type == "q8_0"
    assert {"f32", "f16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"} <= set(TYPES)


# --- the tokenizer ---

MULTILINGUAL = [
    "Ich hätte gern zwei Stück Käsekuchen, bitte – für 3,50 €.",
    "L'été, j'aime manger des crêpes à l'Orangerie; c'est l'idéal !",
    "¿Dónde está el baño? ¡Mañana será 29 de año!",
    "Съешь же ещё этих мягких французских булок, да выпей чаю в 18:30.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία το 2024.",
    "今日は天気がいいですね。明日は2月29日です。",
    "我能吞下玻璃而不伤身体，价格是一百二十三元。",
    "다람쥐 헌 쳇바퀴에 타고파. 12시 30분.",
    "أنا قادر على أكل الزجاج و هذا لا يؤلمني ١٢٣٤٥.",
    "אני יכול לאכול זכוכית וזה לא מזיק לי.",
    "मैं काँच खा सकता हूँ, मुझे उस से कोई पीडा नहीं होती १२३.",
    "ฉันกินกระจกได้ แต่มันไม่ทำให้ฉันเจ็บ ๑๒๓",
    "Mogę jeść szkło i mi nie szkodzi, źdźbło żółci.",
    "Tôi có thể ăn thủy tinh mà không hại gì. Đường số 7.",
    "Cam yiyebilirim, bana zararı dokunmaz. İIıi ŞĞ",
    "আমি কাঁচ খেতে পারি, তাতে আমার কোনো ক্ষতি হয় না ১২৩",
    "நான் கண்ணாடி சாப்பிடுவேன் ௧௨௩",
    "მინას ვჭამ და არა მტკივა. Կրնամ ապակի ուտել ᎣᏏᏲ",
    "ſtraße ﬁne Ⅷ ½ ² ₃ ①⑳ ㊿ 𝟘𝟙𝟚 𝓗𝓮𝓵𝓵𝓸 Z͑ͫ̓a̴l̷g̶o̸ e\u0301 é",
]
CODE = [
    "def f(x: int) -> int:\n\t\treturn x**2 + 0x1F - 1_000  # comment\n",
    'for(int i=0;i<10;++i){ printf("%d\\n", a[i]); }',
    "SELECT * FROM t WHERE id != 42 AND name LIKE '%x%';",
    "<div class=\"a b\" id='c'>&nbsp;</div>\r\n\r\n",
    "x = {'a': [1, 2.5e-10, None], **kw}; y @= z >> 3",
    "#!/bin/sh\nset -e; echo \"$HOME/${x:-1}\" | grep -E '^[a-z]+' && exit 0",
]
EMOJI = ["🙂", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "👍🏽", "❤️", "1️⃣", "🤦🏿‍♂️", "☺", "🫠"]
CONTRACTIONS = ["I'm", "we'll", "you've", "they'd", "it's", "don't", "'S", "'LL", "o'clock's", "''re", "’s"]
SPACES = [
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\n\n\n",
    "\u00a0",
    "\u3000",
    "\u2003",
    "\u200b",
    "\x0b\x0c",
    "\x85",
    "\u2028",
]
CONTROL = [
    *SPECIALS,
    "<|pad|",
    "<|end|><|end|>",
    "<tool>",
    "</s>",
    "<|endoftext|>",
    "[PAD3]",
    "    <tool>    ",
]


def foreign_text(count: int) -> list[str]:
    """Seeded strings of every kind a user might send and no training set holds."""
    draw = random.Random(20)
    words = [w for s in (*MULTILINGUAL, *CODE, *SENTENCES) for w in s.split(" ")]
    makers = [
        lambda: "".join(
            map(
                chr,
                (draw.choice((draw.randrange(0xD800), draw.randrange(0xE000, 0x110000))) for _ in range(20)),
            )
        ),
        lambda: "".join(chr(draw.randrange(0x20, 0x3000)) for _ in range(draw.randrange(1, 30))),
        lambda: "".join(chr(draw.randrange(256)) for _ in range(draw.randrange(1, 40))),
        lambda: " ".join(draw.choices(words, k=draw.randrange(1, 12))),
        lambda: draw.choice(MULTILINGUAL)[draw.randrange(10) :] + draw.choice(CODE),
        lambda: "".join(draw.choices([*SPACES, "a", "1", "!", "é"], k=draw.randrange(1, 30))),
        lambda: "".join(draw.choices("0123456789.,-+ ٣५Ⅷ½²", k=draw.randrange(1, 30))),
        lambda: "".join(draw.choices([*EMOJI, *CONTRACTIONS, " ", "7"], k=draw.randrange(1, 12))),
        lambda: "".join(draw.choices([*CONTROL, *words[:50], *SPACES], k=draw.randrange(1, 8))),
    ]
    return [draw.choice(makers)() for _ in range(count)]


def public_lines(count: int) -> list[str]:
    """Lines of books, encyclopedia articles and source code; none where the data is missing."""
    if not DATA.is_dir():
        return []
    lines = [
        line
        for name in ("input.txt", "test.txt", "1342.txt", "2701.txt")
        for line in (DATA / "corpus_text" / name).read_text(encoding="utf-8", errors="replace").split("\n")
    ]
    with tarfile.open(DATA / "corpus_code" / "TheAlgorithms+Python.py.tar.gz") as archive:
        for member in archive.getmembers()[:400]:
            if member.isfile():
                text = archive.extractfile(member).read().decode("utf-8", errors="replace")
                lines += [text[i : i + 200] for i in range(0, len(text), 200)]  # cut anywhere, newlines kept
    return random.Random(3).sample(lines, count)


def mismatches(path: Path, tokenizer: HFTokenizer, texts: list[str]) -> list[str]:
    model = llama(path, vocab_only=True)
    return [
        text
        for text in texts
        for special in (False, True)
        if model.tokenize(text.encode(), add_bos=False, special=special)
        != tokenizer.encode(text, special=special)
    ]


@pytest.mark.parametrize("kind", ["smollm", "gpt-2"])
def test_tokenization_is_the_tokenizers(tmp_path, copy, kind):
    if kind == "gpt-2":
        save_tokenizer(copy, plain_tokenizer())
    export_model(copy, tmp_path / "m.gguf")
    assert llama(tmp_path / "m.gguf", vocab_only=True).metadata["tokenizer.ggml.pre"] == kind
    texts = foreign_text(11_000) + public_lines(2_000)
    assert len(set(texts)) > 10_000
    assert mismatches(tmp_path / "m.gguf", HFTokenizer.load(copy), texts) == []


def test_foreign_text_tells_the_two_apart(tmp_path, copy):
    """The strings above would show a wrong `pre`: an exporter that wrote one name for both fails them."""
    export_model(copy, tmp_path / "m.gguf")
    save_tokenizer(copy, plain_tokenizer())
    export_model(copy, tmp_path / "plain.gguf")
    document = json.loads((copy / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, document["pre_tokenizer"]]}
    (copy / "tokenizer.json").write_text(json.dumps(document))
    assert len(mismatches(tmp_path / "plain.gguf", HFTokenizer.load(copy), foreign_text(500))) > 50


@needs_data
def test_a_real_vocabulary_with_plain_added_tokens(tmp_path):
    """phi-2's 50,295 tokens: plain byte-level, with runs of spaces and tabs as tokens not special."""
    tokenizer = Tokenizer.from_file(str(DATA / "tokenizer_hf" / "phi-2" / "tokenizer.json"))
    folder = real_folder(tmp_path / "m", tokenizer)
    export_model(folder, tmp_path / "m.gguf")
    texts = foreign_text(1_000) + public_lines(1_000)
    assert mismatches(tmp_path / "m.gguf", HFTokenizer.load(folder), texts) == []


@needs_data
def test_the_public_gpt_2_vectors(tmp_path):
    source = DATA / "tokenizer_hf"
    model = models.BPE.from_file(str(source / "gpt2.vocab"), str(source / "gpt2.merges.txt"))
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    export_model(real_folder(tmp_path / "m", tokenizer), tmp_path / "m.gguf")
    stock = llama(tmp_path / "m.gguf", vocab_only=True)
    vectors = DATA / "tokenizers_llamacpp" / "ggml-vocab-gpt-2.gguf"
    texts = Path(f"{vectors}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = [[int(i) for i in line.split()] for line in Path(f"{vectors}.out").read_text().splitlines()]
    got = [stock.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
    assert got[: len(expected)] == expected
    assert len(expected) > 30


def real_folder(folder: Path, tokenizer: Tokenizer) -> Path:
    """A pico model as wide in vocabulary as a real tokenizer."""
    make_model(folder, hidden=32)
    edit(folder / "config.json", vocab_size=tokenizer.get_vocab_size(), eos_token_id=50256)
    LlamaForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True).save_pretrained(folder)
    save_tokenizer(folder, tokenizer)
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>", pad_token=None)
    return folder


def test_special_text_typed_by_a_user_stays_text(tmp_path, pico):
    export_model(pico, tmp_path / "m.gguf")
    model = llama(tmp_path / "m.gguf", vocab_only=True)
    for number, text in enumerate(SPECIALS):
        assert model.tokenize(text.encode(), add_bos=False, special=True) == [number]
        typed = model.tokenize(f"a {text} b".encode(), add_bos=False, special=False)
        assert not set(typed) & set(range(len(SPECIALS)))
        assert model.detokenize(typed).decode() == f"a {text} b"


def test_unused_rows_of_the_embedding_become_unused_tokens(tmp_path, copy):
    save_tokenizer(copy, plain_tokenizer())  # 502 tokens, 512 rows
    export_model(copy, tmp_path / "m.gguf")
    assert llama(tmp_path / "m.gguf", vocab_only=True).n_vocab() == 512
    types = GGUFReader(tmp_path / "m.gguf").get_field("tokenizer.ggml.token_type").contents()
    assert types == [3] * 5 + [1] * 495 + [4] * 2 + [5] * 10


@pytest.mark.parametrize("explicit", [None, False], ids=["post-processor", "switched off"])
def test_bos_is_added_when_the_tokenizer_says_so(tmp_path, copy, explicit):
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<|user|> $A", special_tokens=[("<|user|>", 2)])
    save_tokenizer(copy, tokenizer)
    edit(copy / "tokenizer_config.json", bos_token={"content": "<|user|>"}, add_bos_token=explicit)
    export_model(copy, tmp_path / "m.gguf")
    model = llama(tmp_path / "m.gguf", vocab_only=True)
    assert model.token_bos() == 2
    assert model._model.add_bos_token() is (explicit is None)


def test_chat_template_may_lie_in_its_own_file(tmp_path, copy):
    edit(copy / "tokenizer_config.json", chat_template=None)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    export_model(copy, tmp_path / "m.gguf")
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
def test_tokenizers_llama_cpp_would_get_wrong_are_refused(tmp_path, copy, change, message):
    edit(copy / "tokenizer.json", **change)
    with pytest.raises(ExportError, match=message):
        export_model(copy, tmp_path / "m.gguf")


def test_vocabularies_that_lose_text_or_lack_an_end_are_refused(copy):
    document = json.loads((copy / "tokenizer.json").read_text())
    for change, message in (
        ({"ignore_merges": True}, "ignore_merges"),
        ({"merges": []}, "no merges"),
        ({"type": "WordLevel"}, "WordLevel"),
        (
            {"vocab": {k: v for k, v in document["model"]["vocab"].items() if k != "Ġ"}},
            "lacks 1 of the 256 bytes",
        ),
    ):
        (copy / "tokenizer.json").write_text(json.dumps(document | {"model": document["model"] | change}))
        with pytest.raises(ExportError, match=message):
            Vocabulary.load(copy)
    (copy / "tokenizer.json").write_text(json.dumps(document))
    edit(copy / "tokenizer_config.json", eos_token="<|stop|>")
    with pytest.raises(ExportError, match=r"eos_token '<\|stop\|>'"):
        Vocabulary.load(copy)
    edit(copy / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ExportError, match="names no eos_token"):
        Vocabulary.load(copy)


def test_tokenizer_hash_follows_the_ids_alone(copy, pico):
    same = Vocabulary.load(pico).sha256
    edit(copy / "tokenizer_config.json", chat_template="{{ 1 }}")
    assert Vocabulary.load(copy).sha256 == same
    save_tokenizer(copy, plain_tokenizer())
    assert Vocabulary.load(copy).sha256 != same


# --- the stage ---


def test_stage_writes_models_and_adapters(tmp_path, pico, adapter):
    inputs = {"model": Artifact("model", pico, ""), "adapter": Artifact("adapter", adapter, "")}
    model = run(Config(type="f16"), {"model": inputs["model"]}, tmp_path, None)
    lora = run(Config(), inputs, tmp_path, None)
    assert model["bytes"] == (tmp_path / "model.gguf").stat().st_size
    assert lora["bytes"] == (tmp_path / "adapter.gguf").stat().st_size
    assert (model["type"], lora["type"]) == ("f16", "f32")
    assert model["base_fingerprint"] == lora["base_fingerprint"] == sha256(pico / "model.safetensors")
    assert model["tokenizer_sha256"] == lora["tokenizer_sha256"] == Vocabulary.load(pico).sha256
