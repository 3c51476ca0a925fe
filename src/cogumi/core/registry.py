"""Tables of stages and engines, name -> module; modules are imported on first use."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, cast

from cogumi.core.errors import RecipeError
from cogumi.core.packages import load
from cogumi.core.stage import DECLARED, Stage

STAGES: dict[str, str] = {
    "world": "cogumi.data.world.questions",
    "load": "cogumi.data.load",
    "synthesize": "cogumi.teach.synthesize",
    "language": "cogumi.data.curation.language",
    "deduplicate": "cogumi.data.curation.deduplicate",
    "score": "cogumi.data.curation.score",
    "filter": "cogumi.data.curation.filter",
    "decontaminate": "cogumi.data.curation.decontaminate",
    "mix": "cogumi.data.curation.mix",
    "curation_report": "cogumi.data.curation.curation_report",
    "bidirectional": "cogumi.data.bidirectional",
    "split": "cogumi.data.split",
    "tokenizer": "cogumi.data.train_tokenizer",
    "sft": "cogumi.train.sft",
    "respond": "cogumi.teach.respond",
    "draft": "cogumi.train.draft",
    "distill": "cogumi.train.distill",
    "merge": "cogumi.train.merge",
    "acceptance": "cogumi.evaluate.acceptance",
    "depth": "cogumi.train.depth",
    "depth_report": "cogumi.evaluate.depth_report",
    "modifier": "cogumi.train.modifier",
    "prune": "cogumi.compress.prune.prune",
    "shrink": "cogumi.compress.shrink.shrink",
    "trim": "cogumi.compress.trim.trim",
    "importance": "cogumi.compress.gguf.importance",
    "gguf": "cogumi.compress.gguf.export",
    "gguf_file": "cogumi.compress.gguf.gguf_file",
    "convert": "cogumi.compress.gguf.convert",
    "awq": "cogumi.compress.quantize.awq",
    "gptq": "cogumi.compress.quantize.gptq",
    "reader": "cogumi.train.reader",
    "router": "cogumi.train.router",
    "answers": "cogumi.teach.tier_answers",
    "calibrate": "cogumi.train.calibrate",
    "bundle": "cogumi.compress.pack.bundle",
    "gain": "cogumi.evaluate.adapter_gain",
    "report": "cogumi.evaluate.report",
    "embedder": "cogumi.train.sentence_encoder",
    "escalation": "cogumi.train.followup_classifier",
    "critic": "cogumi.train.critic",
    "fewshot": "cogumi.evaluate.few_shot_gain",
    "anil": "cogumi.train.anil",
    "episodes": "cogumi.data.episodes",
    "recover": "cogumi.train.recover",
    "paths": "cogumi.teach.solution_paths",
    "chain": "cogumi.evaluate.chain",
    "backbone": "cogumi.train.backbone",
    "archive": "cogumi.compress.pack.archive",
    "compress_adapter": "cogumi.compress.compress_adapter",
}

REPLACED: dict[str, str] = {
    "files": "'load' reads your files, and 'split' makes the five sets of what it read; write these two steps",
}
"""Stages of earlier versions, and their replacements."""

ENGINES: dict[str, str] = {  # those that need optional packages; llama.cpp is always there
    "torch": "cogumi.engine.torch:TorchEngine",
    "remote": "cogumi.engine.remote:RemoteEngine",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that ends an error message: the known name closest to `name`, or all if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known) or 'none'}"


def stage(name: str) -> Stage:
    """The stage module of that name; `RecipeError` names the closest one, or the missing declarations."""
    if name in REPLACED:
        raise RecipeError(f"there is no stage '{name}' any more: {REPLACED[name]}")
    if name not in STAGES:
        raise RecipeError(f"unknown stage '{name}'; {nearest(name, STAGES)}")
    module = load(STAGES[name], f"stage '{name}'")
    if missing := [each for each in DECLARED if not hasattr(module, each)]:
        raise RecipeError(
            f"stage '{name}': its module {module.__name__} does not declare {', '.join(missing)}; "
            "CONTRIBUTING.md says what a stage declares"
        )
    return cast(Stage, module)


def engine(name: str) -> type[Any]:
    """The engine class of that name; `RecipeError` names the closest one."""
    if name not in ENGINES:
        raise RecipeError(f"unknown engine '{name}'; {nearest(name, ENGINES)}")
    module, attribute = ENGINES[name].split(":")
    return cast(type[Any], getattr(load(module, f"engine '{name}'"), attribute))
