"""`core.footprint`: predicted training memory equals measured memory, and each option that saves memory lowers it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cogumi.core.footprint import Training, footprint
from cogumi.core.shapes import KNOWN, ModelShape

MARGIN = 0.15
"""How far the planned peak may lie from the measured one, as a share of it."""
TARGETS = tuple(KNOWN["Llama-3.2-1B"].linear)

CHILD = """
import json, re, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from cogumi.models.lora import LoraShape, attach
from cogumi.core.stage import Context
from cogumi.models.tokenization import Row
from cogumi.train.loop import LoopConfig, train
from cogumi.train.losses import answer_loss

torch.set_num_threads(1)
out, shape, length, answer, cases = json.loads(sys.argv[1])

def run(config, rows, out, lora, loop):
    model = LlamaForCausalLM(LlamaConfig(**config))
    if lora:
        model = attach(model, LoraShape(rank=lora, alpha=1), 0)
    train(model, rows, answer_loss, LoopConfig(**loop), Path(out), Context(0, 1, Path(), lambda *_: None))

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

small = shape | dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64, head_dim=8)
ids = tuple(i % 60 for i in range(length))
for number, case in enumerate(cases):
    run(small, [Row((1, 2, 3), 1)] * 16, f"{out}/small{number}", *case)  # everything is imported and warm
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run(shape, [Row(ids, length - answer)] * 64, f"{out}/real{number}", *case)
    print(status("VmHWM") - before)
"""
SHAPE = ModelShape(256, 768, 6, 4, 2, 64, 8000, 512, tied=True)


def measured(tmp_path, shape, length, answer, cases):
    """Measured peak bytes of two training steps for each (LoRA rank, loop), in a child process."""
    config = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
    }
    common = {"steps": 2, "evaluate_every": 9, "checkpoint_every": 9}
    arguments = [str(tmp_path), config, length, answer, [(lora, common | loop) for lora, loop in cases]]
    # make malloc return freed memory at once; otherwise its caching is measured
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    command = [sys.executable, "-c", CHILD, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peak memory")
def test_predicted_memory_equals_measured_memory(tmp_path):
    size = {"rows": 8, "length": 96, "answer": 32, "fused": False}
    predictions = [
        footprint(Training(SHAPE, **size, **options)).peak
        for options in ({}, {"ranks": dict.fromkeys(TARGETS, 16)}, {"recompute": True, "parts": 2})
    ]
    cases = [(0, {"batch": 8}), (16, {"batch": 8}), (0, {"batch": 16, "accumulate": 2, "gradient_checkpointing": True})]
    taken = measured(tmp_path, SHAPE, 96, 32, cases)
    for predicted, used in zip(predictions, taken, strict=True):
        assert abs(predicted - used) < MARGIN * used, (predictions, taken)


def test_each_memory_option_lowers_the_peak():
    shape = KNOWN["Llama-3.1-8B"]
    ranks = dict.fromkeys(TARGETS, 64)
    size = {"rows": 8, "length": 1024, "answer": 256}
    peak = {
        name: footprint(Training(shape, **(size | options))).peak
        for name, options in {
            "full": {},
            "lora": {"ranks": ranks},
            "qlora": {"ranks": ranks, "nf4": True},
            "less": {"ranks": ranks, "nf4": True, "bf16": True, "recompute": True},
            "parts": {"ranks": ranks, "nf4": True, "bf16": True, "recompute": True, "rows": 2, "parts": 4},
        }.items()
    }
    assert list(peak.values()) == sorted(peak.values(), reverse=True)
    assert peak["parts"] < 24e9 < 80e9 < peak["full"]  # QLoRA fits a 24 GB GPU where full training does not fit 80 GB
    four = footprint(Training(shape, **size, gpus=4))
    assert four.optimizer == footprint(Training(shape, **size)).optimizer // 4
