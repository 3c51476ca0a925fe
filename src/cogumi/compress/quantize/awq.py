"""Stage `awq`: weights made easier to round, by scales that activations ask for (SPEC D4; Lin et al., 2306.00978).

Columns of a linear map whose inputs are large are scaled up, and what makes these inputs (a norm, the rows of the map
before) is scaled down as much, so that the model computes what it did; rounding then costs the important columns less.
llm-compressor searches the scales on calibration rows. What is written is not rounded: the step `gguf` does that.
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
    """`grid` scales are tried for each group of linear maps that share an input. `round` keeps the rounding that they
    were searched for, instead of leaving it to the step `gguf`.
    """

    grid: int = Field(20, ge=3)
    round: bool = False


def estimate(config: Config, given: Given) -> Estimate:
    """A model of the same shape."""
    return uncounted(given.find("model", ModelFacts))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`model`, `examples` -> a model folder, types.json (`gguf` takes it as `types`) and report.md."""
    from llmcompressor.modifiers.quantization import QuantizationModifier  # seconds: not for reading a recipe
    from llmcompressor.modifiers.transform.awq import AWQModifier

    def modifiers(groups: dict[str, Any]) -> Sequence[Any]:
        return [AWQModifier(n_grid=config.grid), QuantizationModifier(config_groups=groups)]

    return quantize(config, inputs, out, context, modifiers, config.round)
