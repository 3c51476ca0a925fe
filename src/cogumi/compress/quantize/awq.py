"""Stage `awq`: activation-aware scaling of weights before quantization (SPEC D4; Lin et al., 2306.00978).

Columns of a linear layer with large inputs are scaled up, and the operation before (a norm, the rows of the previous
layer) is scaled down by the same factor. The model's function does not change, but the rounding error of important
columns gets smaller. llm-compressor searches the scales on calibration rows. The weights written are not rounded: step
`gguf` does that.
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
    """`grid`: number of scales tried for each group of linear layers with a common input. `round` writes weights that
    are rounded as in the search, instead of leaving the rounding to step `gguf`.
    """

    grid: int = Field(20, ge=3)
    round: bool = False


def estimate(config: Config, given: Given) -> Estimate:
    """A model of the same shape."""
    return uncounted(given.find("model", ModelFacts))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`model`, `examples` -> a model folder, types.json (`gguf` takes it as `types`) and report.md."""
    from llmcompressor.modifiers.quantization import QuantizationModifier  # takes seconds; not needed to read a recipe
    from llmcompressor.modifiers.transform.awq import AWQModifier

    def modifiers(groups: dict[str, Any]) -> Sequence[Any]:
        return [AWQModifier(n_grid=config.grid), QuantizationModifier(config_groups=groups)]

    return quantize(config, inputs, out, context, modifiers, config.round)
