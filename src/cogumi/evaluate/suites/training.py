"""Suite `training`: overhead of the training loop against a minimal one, and memory saved by LoRA (SPEC C1).

Speed is a ratio measured in one run: the same model, rows, batches and optimizer with `train` and with a minimal loop,
in turns. Memory is the peak of a process that trains all weights against that of one that trains an adapter.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cogumi.core.environment import usable_threads
from cogumi.core.errors import CogumiError
from cogumi.core.stage import Context
from cogumi.evaluate.suite import Figure, Findings, Task
from cogumi.models.lora import LoraShape, attach
from cogumi.models.tokenization import Row
from cogumi.train.batches import Order, collate
from cogumi.train.loop import LoopConfig, train
from cogumi.train.losses import answer_loss

ROUNDS, STEPS, BATCH = 9, 20, 64
LOOP = LoopConfig(steps=STEPS, batch=BATCH, warmup=0, evaluate_every=STEPS + 1, checkpoint_every=STEPS + 1)
SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 512}
LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 8192}
"""The shape of the tiny base, and one whose weights (120 million) take more memory than the libraries."""


def run(task: Task) -> Findings:
    """Measure speed and memory; needs neither bundle nor data."""
    torch.set_num_threads(usable_threads())
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        _turn(Path(folder) / "warm", task.seed)
        for done in range(ROUNDS):
            ratios.append(_turn(Path(folder) / str(done), task.seed))
            task.progress(done + 1, ROUNDS + 2, {})
    peaks = {}
    for done, kind in enumerate(("full", "lora")):
        peaks[kind] = _peak(kind)
        task.progress(ROUNDS + done + 1, ROUNDS + 2, {})
    figures = [
        Figure(
            "throughput against a bare loop",
            median(ratios),
            ">= 0.9",
            min(ratios),
            max(ratios),
            "lowest, highest round",
        ),
        Figure("peak memory of LoRA against full training", peaks["lora"] / peaks["full"], "< 0.6"),
    ]
    weights = sum(p.numel() for p in _model(LARGE, 0).parameters())
    return Findings(
        figures, {"rounds": ROUNDS, "steps": STEPS, "batch": BATCH, "peak_bytes": peaks, "weights": weights}
    )


def _model(shape: dict[str, int], seed: int) -> Any:
    torch.manual_seed(seed)
    heads = {"num_attention_heads": shape["hidden_size"] // 32, "num_key_value_heads": shape["hidden_size"] // 32}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True, max_position_embeddings=512))


def _rows(seed: int, vocabulary: int, count: int = 600) -> list[Row]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 60, count)
    return [Row(tuple(rng.integers(0, vocabulary, n).tolist()), int(n) - 8) for n in lengths]


def _turn(folder: Path, seed: int) -> float:
    """Seconds of the minimal loop divided by those of `train`, for the same steps."""
    rows = _rows(seed, SMALL["vocab_size"])
    context = Context(seed, usable_threads(), folder, lambda done, total, figures: None)
    ours, theirs = _model(SMALL, seed), _model(SMALL, seed)
    began = time.perf_counter()
    train(ours, rows, answer_loss, LOOP, folder, context)
    middle = time.perf_counter()
    _minimal_loop(theirs, rows, seed)
    ended = time.perf_counter()
    if not torch.equal(ours.model.norm.weight, theirs.model.norm.weight):
        raise CogumiError("the two loops did not do the same work: their weights differ")
    return (ended - middle) / (middle - began)


def _minimal_loop(model: Any, rows: list[Row], seed: int) -> None:
    """The training steps of `train` with `LOOP`, without its other features."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LOOP.lr, weight_decay=LOOP.weight_decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, LOOP.lr * LOOP.final_lr)
    order = Order(tuple(row.size for row in rows), BATCH, seed)
    model.train()
    for step in range(STEPS):
        batch = collate(rows, order.epoch(step // order.per_epoch)[step % order.per_epoch])
        loss, _ = answer_loss(model, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), LOOP.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _peak(kind: str) -> int:
    """Peak resident bytes of a process that trains the large shape for some steps."""
    command = [sys.executable, "-m", "cogumi.evaluate.suites.training", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CogumiError(f"the process that trains '{kind}' failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout)


def _child(kind: str) -> None:
    model = _model(LARGE, 0)
    if kind == "lora":
        model = attach(model, LoraShape(), 0)
    rows = _rows(0, LARGE["vocab_size"], 16)
    context = Context(0, usable_threads(), Path(), lambda done, total, figures: None)
    with tempfile.TemporaryDirectory() as folder:
        train(model, rows, answer_loss, LoopConfig(steps=3, batch=2, checkpoint_every=9), Path(folder), context)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


if __name__ == "__main__":
    _child(sys.argv[1])
