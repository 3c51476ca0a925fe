"""Stage `gptq`: weights rounded one column at a time, the rest making up for the error (SPEC D4; Frantar et al.,
2210.17323).

llm-compressor measures on calibration rows how inputs go together, and rounds. What is written are the rounded
weights, as fp32, on a grid of groups of their own. A GGUF type with another grid rounds them once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from cogumi.compress.quantize.search import Quantization, quantize
from cogumi.core.estimate import Estimate, Given, uncounted
from cogumi.core.facts import ModelFacts
from cogumi.core.stage import Context
from cogumi.core.types import Artifact

VERSION = 1
KIND = "model"
INPUTS = {"examples": "examples", "model": "model"}


class Config(Quantization):
    """`damping`, as a share of its mean, is added to the diagonal of the inputs' second moments."""

    damping: float = Field(0.01, gt=0)


def estimate(config: Config, given: Given) -> Estimate:
    """A model of the same shape."""
    return uncounted(given.find("model", ModelFacts))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`model`, `examples` -> a model folder, types.json (`gguf` takes it as `types`) and report.md."""
    from llmcompressor.modifiers.quantization import GPTQModifier  # seconds: not for reading a recipe

    def modifiers(groups: dict[str, Any]) -> Sequence[Any]:
        return [GPTQModifier(config_groups=groups, dampening_frac=config.damping)]

    return quantize(config, inputs, out, context, modifiers, keep_rounding=False)
