"""Which inputs a step cannot do without, and of which kind each must be (SPEC D1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cogumi.pipeline.recipe import Step

NEEDS: Mapping[str, Mapping[str, str]] = {
    "tokenizer": {"examples": "examples"},
    "sft": {"examples": "examples"},
    "respond": {"examples": "examples", "model": "model"},
    "draft": {"examples": "examples", "responses": "responses", "model": "model"},
    "modifier": {"examples": "examples", "responses": "responses", "model": "model"},
    "trim": {"examples": "examples", "model": "model"},
    "prune": {"examples": "examples", "model": "model"},
    "shrink": {"examples": "examples", "model": "model"},
    "recover": {"examples": "examples", "model": "model"},
    "importance": {"examples": "examples", "model": "model"},
    "awq": {"examples": "examples", "model": "model"},
    "gptq": {"examples": "examples", "model": "model"},
    "chain": {"data": "examples"},
    "compress_adapter": {"examples": "examples", "model": "model", "adapter": "adapter"},
    "gguf": {"model": "model"},
    "router": {"draft_gguf": "gguf", "data": "examples"},
    "calibrate": {"data": "examples", "base": "gguf", "draft": "gguf", "draft_model": "model", "router": "router"},
    "critic": {"data": "examples", "base": "gguf"},
    "bundle": {
        "base": "gguf",
        "difficulty": "model",
        "router": "router",
        "calibration": "calibration",
    },
    "report": {"data": "examples", "bundle": "bundle"},
}
"""Stage -> the inputs it cannot do without, each with the kind of artifact it must be."""


def needed(step: Step, config: Any) -> dict[str, str]:
    """The inputs of one step with their kinds: those of its stage, and what its config asks for beside."""
    found = dict(NEEDS.get(step.stage, {}))
    if step.stage == "sft" and config.init == "scratch":
        found["tokenizer"] = "tokenizer"
    elif step.stage == "chain":
        found |= dict.fromkeys((*config.steps, *config.beside), "gguf")
    elif step.stage == "archive":
        packed = "model" if "model" in step.inputs else "bundle"
        found[packed] = packed
    return found
