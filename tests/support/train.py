"""Helpers of the training tests: examples of additions, and a training run of a pico model in a separate process."""

import json
import sys
from pathlib import Path

import torch

from cogumi.core.stage import Context
from cogumi.core.types import Example, Message
from cogumi.data.examples import example_id
from cogumi.models.folders import Shape, build, save_tensors
from cogumi.models.lora import LoraShape, attach
from cogumi.models.tokenization import HFTokenizer
from cogumi.train.batches import make_rows
from cogumi.train.checkpoint import trained
from cogumi.train.loop import LoopConfig, train
from cogumi.train.losses import answer_loss
from cogumi.train.validation import judge_answers
from support import pico

SHAPE = Shape(hidden=32, layers=1, heads=1, feed_forward=64)


def example(question, answer, difficulty=1, domain="math"):
    messages = (Message("user", question),)
    return Example(example_id(domain, messages), domain, difficulty, messages, answer)


def context(seed=3, progress=lambda done, total, figures: None, **more):
    return Context(seed, 1, Path(), progress, **more)


def sums(tokenizer, n=10):
    return make_rows([example(f"{a} plus {b}", str(a + b)) for a in range(n) for b in range(n)], tokenizer, 64)


def run(root, out, config, lora=None):
    """Train a pico model on additions in `out`; writes `weights.safetensors` and `curve.json`."""
    if not (root / "tokenizer.json").exists():
        pico.make_tokenizer(root)
    tokenizer = HFTokenizer.load(root)
    model = build(SHAPE, tokenizer, 0)
    if lora:
        model = attach(model, LoraShape(**lora), 0)
    rows = sums(tokenizer)
    at = train(
        model,
        rows,
        answer_loss,
        LoopConfig(**config),
        out,
        context(progress=lambda done, total, figures: print(done, flush=True)),
        lambda apply: judge_answers(apply, rows[::7]),
    )
    tensors = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in trained(model).items()}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        save_tensors({n: t.detach().contiguous() for n, t in tensors.items()}, out / "weights.safetensors", {})
        curve = {"losses": at.losses, "validations": at.validations}
        (out / "curve.json").write_text(json.dumps(curve))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3]))
