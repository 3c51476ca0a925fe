"""Stage `gptq`: round weights column by column and correct the error in the remaining columns (SPEC D4; Frantar et al.,
2210.17323).

llm-compressor measures the second moments of the inputs on calibration rows, and rounds. The rounded weights are
written as fp32, on a quantization grid of their own; a GGUF type with another grid rounds them again.
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
    """`damping` times the mean of the diagonal is added to the diagonal of the inputs' second moments."""

    damping: float = Field(0.01, gt=0)


def estimate(config: Config, given: Given) -> Estimate:
    """A model of the same shape."""
    return uncounted(given.find("model", ModelFacts))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`model`, `examples` -> a model folder, types.json (`gguf` takes it as `types`) and report.md."""
    from llmcompressor.modifiers.quantization import GPTQModifier  # takes seconds; not needed to read a recipe

    def modifiers(groups: dict[str, Any]) -> Sequence[Any]:
        return [GPTQModifier(config_groups=groups, dampening_frac=config.damping)]

    return quantize(config, inputs, out, context, modifiers, keep_rounding=False)
