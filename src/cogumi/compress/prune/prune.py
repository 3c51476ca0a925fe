"""Stage `prune`: set the least important weights to zero (SPEC D2).

Pruning runs in one shot or in phases with training between them. A grid tries several sparsities and methods and keeps
the candidate with the highest score: quality kept minus bytes kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cogumi.bundle.packed import LEVEL
from cogumi.compress.calibration_rows import Draw, draw_rows
from cogumi.compress.gguf.layout import Llama
from cogumi.compress.prune.masks import Method, Pruner, Structure, check, matrices, weights, zeros
from cogumi.compress.prune.phases import Candidate, Gradual, PhaseRunner
from cogumi.compress.prune.prune_report import write_report
from cogumi.compress.prune.sparsity import PARTS, Mix, front, scaled, score
from cogumi.core.errors import RecipeError
from cogumi.core.estimate import Estimate, Given, uncounted
from cogumi.core.facts import ModelFacts
from cogumi.core.files import sha256
from cogumi.core.registry import nearest
from cogumi.core.stage import CHECKPOINT, Context
from cogumi.core.types import Artifact
from cogumi.data.examples import read_examples, split_path
from cogumi.models.folders import load, save
from cogumi.models.tokenization import HFTokenizer
from cogumi.train.batches import make_rows

VERSION = 1
KIND = "model"
INPUTS = {"examples": "examples", "model": "model"}

Share = Annotated[float, Field(ge=0, lt=1)]


class Grid(BaseModel):
    """Candidates: every method at every overall sparsity; the shares of the parts keep their ratio."""

    model_config = ConfigDict(extra="forbid")
    sparsities: tuple[Share, ...] = Field((0.6, 0.65, 0.7), min_length=1)
    methods: tuple[Method, ...] = Field(("magnitude", "wanda", "sparsegpt"), min_length=1)


class Config(BaseModel):
    """`parts` are the shares to prune: by default 60% of attention, 70% of feed_forward and 50% of embeddings, which is
    about 65% of all; with `2:4` half of each. An untied `head` is pruned only if named.

    `mix` is the importance used by `magnitude`, and for embeddings by every method. The methods and sparsities of a
    `grid` replace `method` and the overall sparsity.
    """

    model_config = ConfigDict(extra="forbid")
    method: Method = "sparsegpt"
    structure: Structure = "unstructured"
    parts: dict[str, Share] | None = Field(None, min_length=1)
    mix: Mix = Mix()
    calibration: Draw = Draw()
    gradual: Gradual | None = None
    grid: Grid | None = None

    @property
    def shares(self) -> dict[str, float]:
        """The share to prune of each part."""
        if self.parts is not None:
            return self.parts
        if self.structure == "2:4":
            return {"attention": 0.5, "feed_forward": 0.5, "embeddings": 0.5}
        return {"attention": 0.6, "feed_forward": 0.7, "embeddings": 0.5}

    @model_validator(mode="after")
    def _structure_fits_shares(self) -> Config:
        for part in self.shares:
            if part not in PARTS:
                raise ValueError(f"there is no part '{part}'; {nearest(part, PARTS)}")
        if self.structure == "2:4":
            asked = {*self.shares.values(), *(self.grid.sparsities if self.grid else ())}
            if other := sorted(asked - {0.5}):
                raise ValueError(
                    f"2:4 keeps 2 of every 4 weights, so exactly 50% go, never {other[0]:.4g}; "
                    "ask for 0.5, or use structure: unstructured"
                )
            if self.gradual and self.gradual.phases > 2:
                raise ValueError("2:4 has only 1:4 as an intermediate step, so it is pruned in 1 or 2 phases")
        return self


def candidates(config: Config, counts: Mapping[str, int]) -> list[Candidate]:
    """The candidates of a config; `counts` are weights by part. `RecipeError` if a part would lose all its weights."""
    if config.grid is None:
        return [Candidate(config.method, Pruner(config.method, config.structure, config.mix), config.shares)]
    found = []
    for method in config.grid.methods:
        for sparsity in config.grid.sparsities:
            try:
                shares = scaled(config.shares, counts, sparsity)
            except ValueError as error:
                raise RecipeError(f"grid: {error}; give parts whose shares are closer to each other") from error
            found.append(Candidate(f"{method}-{sparsity:g}", Pruner(method, config.structure, config.mix), shares))
    return found


def zstd_bytes(model: Any) -> int:
    """Bytes of all weights as fp32 after zstd: the size on disk before any quantization."""
    import zstandard

    packer = zstandard.ZstdCompressor(level=LEVEL).compressobj()
    sizes = [len(packer.compress(w.detach().cpu().float().numpy().tobytes())) for w in model.parameters()]
    return sum(sizes) + len(packer.flush())


def estimate(config: Config, given: Given) -> Estimate:
    """A model of the same shape, and the steps of all phases together."""
    model = given.find("model", ModelFacts)
    return uncounted(model, model=model, steps=config.gradual.loop.steps if config.gradual else None)


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`model` and `examples` -> a model folder; with a grid also `report.md` and `grid.png`."""
    torch.set_num_threads(context.threads)
    folder, data = inputs["model"].path, inputs["examples"].path
    tokenizer, llama, model = HFTokenizer.load(folder), Llama.load(folder), load(folder)
    check(model, config.shares, config.structure)
    room = model.config.max_position_embeddings
    calibration = draw_rows(data, tokenizer, room, config.calibration, context.seed)
    selection = make_rows(read_examples(split_path(data, "selection")), tokenizer, room)
    rows = make_rows(read_examples(split_path(data, "train")), tokenizer, room) if config.gradual else []
    counts = {part: weights(names) for part, names in matrices(model).items()}
    tried = candidates(config, counts)
    runner = PhaseRunner(folder, llama, calibration, rows, selection, config.gradual, out / CHECKPOINT, context)
    dense = {**runner.judge(model), "zeros": zeros(dict(model.named_parameters())), "zstd_bytes": zstd_bytes(model)}
    results: dict[str, dict[str, Any]] = {}
    for number, candidate in enumerate(tried):
        pruned, phases = runner.prune(candidate, number, len(tried))
        found = _result(candidate, pruned, phases, dense)
        if found["score"] > max((other["score"] for other in results.values()), default=-math.inf):
            model, chosen = pruned, candidate.name
        results[candidate.name] = found
    optimal = front([(found["quality"], found["size"]) for found in results.values()])
    for found, on in zip(results.values(), optimal, strict=True):
        found["front"] = on
    save(model, folder, out)
    if config.grid:
        write_report(out, results, chosen, dense)
    best = results[chosen]
    context.progress(1, 1, {"zeros": best["sparsity"], "exact": best["pruned"]["exact"], "before": dense["exact"]})
    return {
        "method": best["method"],
        "structure": config.structure,
        "calibration_rows": len(calibration),
        "parts": {
            part: {"weights": counts[part], "asked": share, "reached": best["reached"][part]}
            for part, share in best["asked"].items()
        },
        "zeros": {"before": dense["zeros"], "after": best["zeros"]},
        "sparsity": best["sparsity"],
        "dense": {name: dense[name] for name in best["pruned"]},
        "pruned": best["pruned"],
        "zstd_bytes": {"dense": dense["zstd_bytes"], "pruned": best["zstd_bytes"], "ratio": best["size"]},
        "phases": best["phases"],
        "grid": results if config.grid else {},
        "chosen": chosen,
        "model_sha256": sha256(out / "model.safetensors"),
    }


def _result(
    candidate: Candidate, model: Any, phases: list[dict[str, Any]], dense: Mapping[str, float]
) -> dict[str, Any]:
    """Figures of a candidate; `sparsity` is the share of zeros among all weights of the model.

    `quality` is the mean of perplexity(dense) / perplexity and exact / exact(dense), or the first alone if the dense
    model has no exact answer.
    """
    pruned = phases[-1].get("trained", phases[-1]["cut"])
    kept = math.exp(dense["nats"] - pruned["nats"])
    quality = (kept + pruned["exact"] / dense["exact"]) / 2 if dense["exact"] else kept
    everything = dict(model.named_parameters())
    packed = zstd_bytes(model)
    size = packed / dense["zstd_bytes"]
    return {
        "method": candidate.pruner.method,
        "asked": dict(candidate.shares),
        "reached": phases[-1]["reached"],
        "zeros": zeros(everything),
        "sparsity": zeros(everything) / weights(everything),
        "pruned": pruned,
        "zstd_bytes": packed,
        "size": size,
        "quality": quality,
        "score": score(quality, size),
        "phases": phases,
    }
