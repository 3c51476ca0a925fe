"""Stage `tokenizer`: a byte-level BPE vocabulary trained on the training split, and a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import TokenizerFacts
from cogumi.core.files import write_text
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.examples import read_examples, split_path

VERSION = 1
KIND = "tokenizer"
LIGHT = True
INPUTS = {"examples": "examples"}

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Config(BaseModel):
    """`vocabulary` includes 256 bytes and 5 control tokens; merges are learned from `rows` of the training split."""

    model_config = ConfigDict(extra="forbid")
    vocabulary: int = Field(1024, ge=261)
    rows: int = Field(20_000, ge=1)


def train(texts: list[str], vocabulary: int) -> Any:
    """Byte-level BPE with single digits (so that a number has one tokenization); returns a `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [PAD, *(f"<|{role}|>" for role in ROLES), END]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in control],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def estimate(config: Config, given: Given) -> Estimate:
    """A new vocabulary of the configured size."""
    return Estimate((TokenizerFacts(given.step, config.vocabulary),))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples` -> tokenizer.json and tokenizer_config.json."""
    examples = read_examples(split_path(inputs["examples"].path, "train"))[: config.rows]
    texts = [text for e in examples for text in (*(m.content for m in e.messages), e.answer)]
    tokenizer = train(texts, config.vocabulary)
    write_text(out / "tokenizer.json", tokenizer.to_str(pretty=True))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    write_text(out / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))
    return {
        "vocabulary": tokenizer.get_vocab_size(),
        "bytes_per_token": round(sum(len(t.encode()) for t in texts) / max(tokens, 1), 3),
    }
