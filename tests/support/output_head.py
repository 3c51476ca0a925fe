"""An adaptable output head with random weights, in memory and as a file."""

import json

import numpy as np
from safetensors.numpy import save_file

from cogumi.engine.llama.output_head import LowRank

WIDTH, IDS = 64, 512


def low_rank(rank=4, width=WIDTH, ids=IDS, seed=0, size=0.3):
    draw = np.random.default_rng(seed)
    a, b = (draw.normal(0, size, shape).astype(np.float32) for shape in ((rank, width), (ids, rank)))
    return LowRank(a, b, 0.5)


def write_head(path, *, lr=0.5, steps=3, base="one", seed=0, size=0.3, width=WIDTH, ids=IDS):
    start = low_rank(seed=seed, size=size, width=width, ids=ids)
    known = {"scale": "0.5", "lr": str(lr), "steps": str(steps), "base_sha256": base}
    save_file({"a": start.a, "b": start.b}, path, metadata={"head": json.dumps(known)})
    return path
