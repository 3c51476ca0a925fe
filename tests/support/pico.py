"""Pico models for tests: random-weight Llama folders with a real tokenizer, made in well under a second."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

SPECIALS = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SENTENCES = [
    "The quick brown fox jumps over the lazy dog while 123 other foxes watch.",
    "def add(a, b):\n    return a + b\n\nassert add(2, 3) == 5",
    "Tom is taller than Ann. Ann is taller than Bob. Who is the tallest of the three?",
    '{"tool": "weather", "args": {"city": "Paris", "day": 7}}',
    "What is 48 plus 57? It is 105. I don't know. Yes, no, maybe, naïve café, 日本語, 🙂.",
]


def make_tokenizer(folder: Path, vocab: int = 512) -> Tokenizer:
    """Train a byte-level BPE with individual digits and the five special tokens, and save it in `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    draw = random.Random(0)
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(4000)]
    tokenizer.train_from_iterator([*SENTENCES, " ".join(words)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def make_model(
    folder: Path,
    hidden: int = 64,
    layers: int = 2,
    vocab: int = 512,
    seed: int = 0,
    scale: float = 0.15,
    tied: bool = True,
    perturb: float = 0.0,
) -> Path:
    """Write a Llama folder (config, fp32 safetensors, tokenizer, chat template) with random weights.

    `scale` is the standard deviation of the weights: large enough that outputs are far from uniform.
    `perturb` adds noise of that share to the weights of the same seed: a draft that agrees with its base
    often, not always. Heads are 32 wide.
    """
    tokenizer = make_tokenizer(folder, vocab)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=SPECIALS.index("<|end|>"),
        pad_token_id=SPECIALS.index("<|pad|>"),
    )
    model = LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            extra = perturb * torch.randn(parameter.shape, generator=noise)
            if parameter.dim() == 1:  # norms stay near one
                parameter.copy_(1 + 0.1 * (drawn + extra))
            else:
                parameter.copy_(scale * (drawn + extra))
    model.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, rank: int = 4, seed: int = 0, scale: float = 0.1) -> Path:
    """Write a PEFT LoRA folder for `base` on all linear layers; B is random, so that it changes outputs."""
    from peft import LoraConfig, get_peft_model

    model = LlamaForCausalLM.from_pretrained(base)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return folder
