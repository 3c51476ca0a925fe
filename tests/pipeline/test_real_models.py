"""Every step of the recipes for published models, on small models of the same architecture."""

import random
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cogumi.compress.gguf.export import export_adapter, export_model
from cogumi.core.errors import TrainingError
from cogumi.core.types import Message
from cogumi.models.folders import load
from cogumi.models.lora import LoraShape, attach, save
from cogumi.models.tokenization import HFTokenizer
from cogumi.pipeline.build import build
from cogumi.pipeline.recipe import Recipe, load_recipe
from support.gguf import CODE, EMOJI, MULTILINGUAL, SPACES, disagreement, llama
from support.real import llama3, qwen2

HUB = {
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5",
}
F32_CACHE = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
SMALLER = {
    "world": {"train": 6, "selection": 2, "fit": 4, "threshold": 4, "heldout": 2, "unanswerable": 2},
    "tokenizer": {"vocabulary": 400},
    "trim": {"size": 640},
    "respond": {"rows": 60, "max_tokens": 2},
    "router": {"rows": 40, "epochs": 2},
    "answers": {"max_tokens": 2, "rows": 60},
    "report": {"max_tokens": 2, "rows": 20, "speculation_prompts": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    llama3(root / "llama-3.1", tied=False)
    llama3(root / "llama-3.2", tied=True)
    qwen2(root / "qwen2.5")
    return root


def shrunk(name: str, models: Path) -> Recipe:
    """The recipe with little data, few steps, small models instead of those on the Hub, and fp32 instead of NF4."""
    document = load_recipe(name).model_dump()
    for step in document["steps"]:
        config = step["config"]
        step["gates"] = []
        config.update(SMALLER.get(step["stage"], {}))
        config.pop("weights", None)
        config.pop("quantize", None)
        if "init" in config:
            config["init"] = str(models / HUB[config["init"]])
        if "shape" in config:
            config["shape"] = {"hidden": 64, "layers": 1, "heads": 2, "feed_forward": 96}
        if "loop" in config:
            config["loop"] = config["loop"] | {"steps": 2, "batch": 8, "evaluate_every": 2}
    return Recipe.model_validate(document)


@pytest.mark.parametrize("name", ["small", "cogumi-8b", "laptop-890mb"])
def test_every_step_runs(name, models, tmp_path):
    recipe = shrunk(name, models)
    report = build(recipe, tmp_path)
    assert [step["name"] for step in report["steps"]] == [step.name for step in load_recipe(name).steps]
    for step in recipe.steps:
        if step.stage in ("sft", "draft", "modifier"):
            metrics = next(s["metrics"] for s in report["steps"] if s["name"] == step.name)
            assert metrics["steps"] == 2
            assert all(np.isfinite(figures["loss"]) for _, figures in metrics["curve"]["selection"])


@pytest.mark.parametrize("stage", ["sft", "modifier"])
def test_nf4_without_a_gpu_is_refused_in_one_line(stage, models):
    steps = [step for step in load_recipe("cogumi-8b").steps if step.stage == stage]
    assert {step.config["quantize"] for step in steps} == {"nf4"}
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(TrainingError, match="needs a CUDA GPU") as refused:
        load(models / "llama-3.1", "nf4")
    assert "\n" not in str(refused.value)


def ids_of(folder: Path) -> list[int]:
    return HFTokenizer.load(folder).encode("\n".join([*MULTILINGUAL, *CODE]))[:400]


@pytest.mark.parametrize("name", HUB.values())
def test_logits_of_the_exported_file_equal_torch(name, models, tmp_path):
    export_model(models / name, tmp_path / "m.gguf", "f32")
    model = AutoModelForCausalLM.from_pretrained(models / name)
    assert disagreement(model, tmp_path / "m.gguf", ids_of(models / name)) < 2e-4


@pytest.mark.parametrize("name", HUB.values())
def test_logits_of_an_adapter_with_mixed_ranks_equal_torch(name, models, tmp_path):
    """Ranks, and therefore scales, differ by target as in the recipes; llama.cpp has one alpha for all."""
    shape = LoraShape(rank=6, alpha=12, ranks={"gate_proj": 3, "up_proj": 3, "down_proj": 3})
    model = attach(load(models / name), shape, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.requires_grad):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    folder = tmp_path / "adapter"
    folder.mkdir()
    save(model, folder)
    export_model(models / name, tmp_path / "m.gguf", "f32")
    export_adapter(folder, models / name, tmp_path / "a.gguf")
    ids = ids_of(models / name)
    assert disagreement(model, tmp_path / "m.gguf", ids, lora_path=str(tmp_path / "a.gguf")) < 2e-4
    assert disagreement(model, tmp_path / "m.gguf", ids) > 1e-2  # the adapter has an effect


@pytest.mark.parametrize("name", HUB.values())
def test_exported_tokenizer_gives_the_same_ids(name, models, tmp_path):
    export_model(models / name, tmp_path / "m.gguf")
    engine, tokenizer = llama(tmp_path / "m.gguf", vocab_only=True), HFTokenizer.load(models / name)
    draw = random.Random(0)
    words = [*" ".join([*MULTILINGUAL[:-1], *CODE]).split(" "), *SPACES, *EMOJI, "12345", "I'LL", "<|eot_id|>"]
    texts = [*MULTILINGUAL[:-1], *CODE, *(" ".join(draw.choices(words, k=8)) for _ in range(300))]
    for text in texts:
        assert engine.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)
    messages = [Message("user", "What is 48 plus 57?")]
    assert (
        engine.detokenize(tokenizer.chat(messages), special=True)
        .decode()
        .endswith(("assistant\n", "<|end_header_id|>\n\n"))
    )
