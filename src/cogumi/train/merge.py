"""Stage `merge`: add an adapter to its base's weights, if the merged model is as good (SPEC C11)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import TrainingError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import ModelFacts
from cogumi.core.files import sha256
from cogumi.core.model_fingerprint import model_fingerprint
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.examples import read_examples, split_path
from cogumi.models.folders import load, save
from cogumi.models.lora import merged, with_adapter
from cogumi.models.tokenization import HFTokenizer
from cogumi.train.batches import make_rows
from cogumi.train.validation import applied, judge_answers

VERSION = 1
KIND = "model"
INPUTS = {"examples": "examples", "model": "model", "adapter": "adapter"}


class Config(BaseModel):
    """`tolerance`: permitted increase of nats per token of the merged model over base and separate adapter."""

    model_config = ConfigDict(extra="forbid")
    tolerance: float = Field(0.01, ge=0, description="share of the perplexity, about nats per token")


def estimate(config: Config, given: Given) -> Estimate:
    """A model of the same shape."""
    return Estimate((given.find("model", ModelFacts),))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples`, `model` and `adapter` (a PEFT folder) -> a model folder.

    Raises `TrainingError` for an adapter of another base, and if merging costs more than `tolerance`.
    """
    torch.set_num_threads(context.threads)
    folder, adapter = inputs["model"].path, inputs["adapter"]
    trained_on = adapter.metrics.get("base_sha256")
    if trained_on and trained_on != model_fingerprint(inputs["model"]):
        raise TrainingError(
            f"the adapter {adapter.path} was trained on another base than {folder}; merge it into its own base"
        )
    tokenizer = HFTokenizer.load(folder)
    model = load(folder)
    rows = make_rows(
        read_examples(split_path(inputs["examples"].path, "selection")), tokenizer, model.config.max_position_embeddings
    )
    figures = {"base": judge_answers(applied(model), rows)}
    model = with_adapter(model, adapter.path)
    figures["attached"] = judge_answers(applied(model), rows)
    model = merged(model)
    figures["merged"] = judge_answers(applied(model), rows)
    lost = figures["merged"]["loss"] - figures["attached"]["loss"]
    if lost > config.tolerance:
        raise TrainingError(
            f"merging costs {lost:.3f} nats per token; export the adapter as a separate file (stage 'gguf')"
        )
    save(model, folder, out)
    return {**figures, "model_sha256": sha256(out / "model.safetensors")}
