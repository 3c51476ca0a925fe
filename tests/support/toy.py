"""A small real stage for pipeline tests, and a command that builds its recipe in a separate process."""

import hashlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import save_file

from cogumi.core import registry
from cogumi.core.environment import usable_threads
from cogumi.core.errors import CogumiError, TrainingError
from cogumi.core.files import sha256, write_json
from cogumi.pipeline.build import build
from cogumi.pipeline.build_progress import Silent
from cogumi.pipeline.recipe import load_recipe

VERSION = 1
KIND = "toy"
INPUTS: dict[str, str] = {}
OPTIONAL = {"*": "toy"}


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rate: float = 0.5


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")
    steps: int = 4
    delay: float = 0.0
    score: float = 0.5
    writer: str = "bytes"
    fail: bool = False
    inner: Inner = Inner()
    source: Path | None = None


def pass_moment(name):
    """A point at which the process kills itself if `name` matches the pattern in the environment variable `KILL_AT`."""
    if re.match(os.environ.get("KILL_AT", "never"), name):
        os.kill(os.getpid(), signal.SIGKILL)


def say(*words):
    """Print a line, so that a test can follow the process; the line is also a point for `KILL_AT`."""
    print(*words, flush=True)
    pass_moment(" ".join(map(str, words)))


def run(config, inputs, out, context):
    """A chain of hashes, checkpointed at every link, written out as several files in several pieces."""
    saved = out / "checkpoint" / "links.json"
    links = json.loads(saved.read_text()) if saved.exists() else []
    resumed = len(links)
    start = "".join(sha256(i.path / "weights-0.bin") for i in inputs.values()) + str(context.seed)
    for step in range(len(links), config.steps):
        links.append(hashlib.sha256((links[-1] if links else start).encode()).hexdigest())
        write_json(saved, links)
        context.progress(step + 1, config.steps, {"resumed": resumed})
        time.sleep(config.delay)
    if config.fail:
        raise TrainingError("the loss is not a number; lower the learning rate")
    for i, link in enumerate(links):
        with (out / f"weights-{i}.bin").open("wb") as file:
            for piece in range(4):
                file.write(bytes.fromhex(link) * 500)
                file.flush()
                pass_moment(f"wrote {out.name} {i} {piece}")
    if config.writer == "full":
        Path("/dev/full").write_bytes(b"x" * 10_000)
    if config.writer == "safetensors":
        save_file({"w": np.zeros(50_000, np.float32)}, out / "weights.safetensors")
    if config.source is not None:
        (out / "copy.txt").write_bytes((context.root / config.source).read_bytes())
    (out / "nested").mkdir(exist_ok=True)
    (out / "nested" / "notes.txt").write_text(links[-1])
    (out / "report.md").write_text("# What was measured\n")
    (out / "curve.png").write_bytes(b"\x89PNG")
    figures = {"score": config.score, "by": {"math": np.float32(0.25)}, "missing": float("nan")}
    return figures | {"pid": os.getpid(), "usable_threads": usable_threads()}


class Lines(Silent):
    """One line per event."""

    def started(self, step, stage, number, of, reason):
        say("started", step, reason)

    def advanced(self, step, done, total, figures):
        say("advanced", step, done, int(figures["resumed"]))

    def finished(self, step, seconds, skipped, metrics):
        say("finished", step, skipped)

    def failed(self, step, reason, running):
        say("failed", reason, "; running:", *running)


if __name__ == "__main__":
    registry.STAGES |= {"toy": "support.toy", "actor": "support.actor"}
    try:
        build(load_recipe(sys.argv[1]), Path(sys.argv[2]), jobs=int(sys.argv[3]), progress=Lines())
    except CogumiError as error:
        sys.exit(f"error: {error}")
