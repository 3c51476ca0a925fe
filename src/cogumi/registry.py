"""Two small tables, name -> where it lives; nothing is imported before it is asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any, cast

from cogumi.errors import RecipeError
from cogumi.stage import Stage

STAGES: dict[str, str] = {
    "world": "cogumi.data.world.stage",
    "files": "cogumi.data.files",
    "tokenizer": "cogumi.data.tokenizer",
    "sft": "cogumi.train.sft",
    "respond": "cogumi.evaluate.respond",
    "draft": "cogumi.train.draft",
    "distill": "cogumi.train.distill",
    "merge": "cogumi.train.merge",
    "acceptance": "cogumi.evaluate.acceptance",
    "depth": "cogumi.train.depth",
    "depth_report": "cogumi.evaluate.depth",
    "modifier": "cogumi.train.modifier",
    "prune": "cogumi.compress.pruning.prune",
    "shrink": "cogumi.compress.shrinking.shrink",
    "trim": "cogumi.compress.trimming.trim",
    "importance": "cogumi.compress.formats.importance",
    "gguf": "cogumi.compress.formats.gguf",
    "awq": "cogumi.compress.quantization.awq",
    "gptq": "cogumi.compress.quantization.gptq",
    "router": "cogumi.train.router",
    "calibrate": "cogumi.evaluate.calibrate",
    "bundle": "cogumi.compress.packing.bundle",
    "report": "cogumi.evaluate.report",
    "embedder": "cogumi.train.embedder",
    "escalation": "cogumi.train.escalation",
    "critic": "cogumi.evaluate.critic",
    "fewshot": "cogumi.evaluate.fewshot",
    "anil": "cogumi.train.anil",
    "episodes": "cogumi.data.episodes",
    "recover": "cogumi.train.recover",
    "paths": "cogumi.evaluate.paths",
    "chain": "cogumi.evaluate.chain",
    "backbone": "cogumi.train.backbone",
    "archive": "cogumi.compress.packing.archive",
    "compress_adapter": "cogumi.compress.adapters",
}

ENGINES: dict[str, str] = {
    "llama": "cogumi.runtime.llama_engine:LlamaEngine",
    "torch": "cogumi.runtime.torch_engine:TorchEngine",
    "remote": "cogumi.runtime.remote:RemoteEngine",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that ends an error message: the known name closest to `name`, or all if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known) or 'none'}"


def _import(module: str, wanted_by: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "cogumi":
            raise
        raise RecipeError(f"{wanted_by} needs the package '{error.name}': pip install 'cogumi[build]'") from error


def stage(name: str) -> Stage:
    """The stage module of that name; `RecipeError` names the nearest if there is none."""
    if name not in STAGES:
        raise RecipeError(f"unknown stage '{name}'; {nearest(name, STAGES)}")
    return cast(Stage, _import(STAGES[name], f"stage '{name}'"))


def engine(name: str) -> type[Any]:
    """The engine class of that name; `RecipeError` names the nearest if there is none."""
    if name not in ENGINES:
        raise RecipeError(f"unknown engine '{name}'; {nearest(name, ENGINES)}")
    module, attribute = ENGINES[name].split(":")
    return cast(type[Any], getattr(_import(module, f"engine '{name}'"), attribute))
