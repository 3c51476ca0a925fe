"""Row `adapter_training`: LoRA on the upper third of a model over cached states, against all layers (SPEC M5)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cogumi.core.shapes import ModelShape
from cogumi.core.stage import Context
from cogumi.evaluate.bench.paired import Row, Setup, alternate
from cogumi.evaluate.bench.synthetic_models import SHAPES
from cogumi.models.lora import LoraShape, attach
from cogumi.models.tokenization import Row as Tokens
from cogumi.models.upper_layers import only
from cogumi.train.batches import collate
from cogumi.train.losses import answer_loss
from cogumi.train.trunk_cache import Collate, TrunkCache

SHAPE = ModelShape(576, 1536, 30, 9, 3, 64, 49_152, 8192, tied=True)
"""The shape of SmolLM2-135M."""
ROWS, BATCH, ANSWER = 64, 16, 20
"""Number of rows, rows of a batch, and tokens of an answer."""
LENGTHS = (50, 71)
"""Range of the rows' lengths in tokens."""


def adapter_training(setup: Setup) -> Row:
    """Tokens per second of training, prompts included. Conditions: the upper third without a cache, and the cache's own
    pass, which happens once. Weights are random; `--shape pico` takes that shape.
    """
    torch.set_num_threads(setup.threads)
    shape: Any = SHAPES["pico"] if setup.shape == "pico" else SHAPE
    rng = np.random.default_rng(0)
    lengths = sorted(rng.integers(*LENGTHS, ROWS).tolist())
    rows = [Tokens(tuple(rng.integers(3, shape.vocabulary, n).tolist()), n - ANSWER, str(n)) for n in lengths]
    below = shape.layers - max(shape.layers // 3, 1)
    with TemporaryDirectory() as folder:
        cached = _model(shape)
        cache = TrunkCache(Path(folder) / "trunk", rows, below, shape.hidden, "fp16")
        began = time.perf_counter()
        cache.fill(cached, Context(0, setup.threads, Path(), lambda done, total, figures: None), range(ROWS))
        filling = sum(lengths) / (time.perf_counter() - began)
        upper = range(below, shape.layers)
        ours = _steps(attach(cached, LoraShape(), 0, upper), rows, cache.collate_from(0), below)
        plain = _steps(attach(_model(shape), LoraShape(), 0, upper), rows, collate, 0)
        theirs = _steps(attach(_model(shape), LoraShape(), 0), rows, collate, 0)
        for measure in (ours, plain, theirs):
            measure()
        found = alternate(ours, theirs, setup.tick).row("adapter_training", "tokens/s", least=3)
        uncached = alternate(plain, theirs, lambda share: None, 3).ratio
    more = {"against": "LoRA on all layers", "without_cache": round(uncached, 2), "caching_tokens_s": round(filling)}
    return replace(found, conditions=found.conditions | more)


def _model(shape: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.feed_forward,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head,
            tie_word_embeddings=True,
        )
    )


def _steps(model: Any, rows: Sequence[Tokens], collate: Collate, below: int) -> Callable[[], float]:
    """A function that takes one training step on the next batch, above the `below` lower layers: tokens per second."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, number = torch.optim.AdamW(weights, lr=1e-3), count()

    def step() -> float:
        first = next(number) * BATCH % len(rows)
        index = range(first, first + BATCH)
        began = time.perf_counter()
        with only(model, below):
            torch.autograd.backward(answer_loss(model, collate(rows, index))[0])
        optimizer.step()
        optimizer.zero_grad()
        return sum(rows[i].size for i in index) / (time.perf_counter() - began)

    return step
