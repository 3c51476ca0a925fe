"""Published architectures at small size: random weights, a small vocabulary, otherwise the published settings."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from cogumi.data.world import DIFFICULTIES, DOMAINS, make
from support.gguf import MULTILINGUAL
from support.pico import SENTENCES

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
QWEN_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def _tokenizer(folder: Path, digits: str, control: list[str], settings: dict, llama: bool) -> int:
    """A byte-level BPE with the pre-tokenizer of a published model; returns the number of its ids."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=llama))
    if not llama:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS + digits + REST), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    texts = [make(domain, level, rng).question for domain in DOMAINS for level in DIFFICULTIES for _ in range(10)]
    trainer = trainers.BpeTrainer(
        vocab_size=700 if llama else 640,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *SENTENCES, *MULTILINGUAL], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    if llama:
        bos = settings["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"clean_up_tokenization_spaces": False} | settings))
    return tokenizer.get_vocab_size()


def _save(model: torch.nn.Module, folder: Path) -> Path:
    """Weights large enough that outputs are far from uniform; norms near one, biases far from zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.1 * drawn if "norm" in name else 0.15 * drawn)
    model.save_pretrained(folder)
    return folder


def llama3(folder: Path, tied: bool) -> Path:
    """Llama 3.1 (untied head) or 3.2 (tied): grouped-query attention, scaled rotary frequencies."""
    control = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    settings = {"bos_token": control[0], "eos_token": control[3], "chat_template": LLAMA_TEMPLATE}
    size = _tokenizer(folder, r"\p{N}{1,3}", control, settings, llama=True)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        bos_token_id=size - 4,
        eos_token_id=size - 1,
    )
    return _save(LlamaForCausalLM(config), folder)


def qwen2(folder: Path) -> Path:
    """Qwen2.5: biases on queries, keys and values, a tied head, more embedding rows than ids."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    settings = {"bos_token": None, "eos_token": control[2], "pad_token": control[0], "chat_template": QWEN_TEMPLATE}
    size = _tokenizer(folder, r"\p{N}", control, settings, llama=False)
    config = Qwen2Config(
        vocab_size=size + 21,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        bos_token_id=None,
        eos_token_id=size - 1,
    )
    return _save(Qwen2ForCausalLM(config), folder)
