"""Models for the tests of stage `trim`, and a function that runs the stage."""

from __future__ import annotations

import json
import random
from pathlib import Path

from cogumi.compress.trim import trim
from cogumi.compress.trim.trimmed_vocabulary import Vocabulary
from cogumi.core.types import Artifact
from cogumi.data.examples import SPLITS, split_path, write_examples
from support.pico import make_model
from support.real import llama3, qwen2
from support.train import context, example

CONTEXT = context()


def make_folders(root: Path) -> dict[str, Path]:
    """Models with tokenizers like those of Llama 3 and Qwen2, and one of the pico models, by the names of `NAMES`."""
    found = {
        "llama3": llama3(root / "llama3", tied=False),
        "qwen2": qwen2(root / "qwen2"),
        "own": make_model(root / "own", vocab=700, hidden=32, layers=1),
    }
    eos = json.loads((found["llama3"] / "config.json").read_text())["eos_token_id"]
    (found["llama3"] / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, eos - 1]}))
    return found


NAMES = ("llama3", "qwen2", "own")


def artifact(path: Path) -> Artifact:
    return Artifact("test", path, "0", {}, {})


def examples(folder: Path, train: list[str], selection: list[str]) -> Path:
    for split in SPLITS:
        texts = {"train": train, "selection": selection}.get(split, [])
        write_examples(split_path(folder, split), [example(f"Say it {i}.", text) for i, text in enumerate(texts)])
    return folder


def run(model: Path, data: Path, out: Path, follow: Path | None = None, **config):
    out.mkdir()
    inputs = {"model": model, "examples": data} | ({"tokenizer": follow} if follow else {})
    return trim.run(trim.Config(**config), {name: artifact(path) for name, path in inputs.items()}, out, CONTEXT)


def half(vocabulary: Vocabulary, seed: int, share: float = 0.5) -> set[int]:
    """A random choice of tokens together with the tokens that must be kept."""
    draw = random.Random(seed)
    added = [token["content"] for token in vocabulary.document["added_tokens"]]
    drawn = [token for token in vocabulary.bpe.ids if len(token) == 1 or draw.random() < share]
    return {vocabulary.bpe.ids[token] for token in vocabulary.bpe.closed([*drawn, *added])}
