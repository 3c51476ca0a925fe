"""Stage `prune`: weights that matter least become zero (SPEC D2).

At once, or in phases: the shares rise in equal parts, and after every rise the model is trained on with its zeros held.
A grid tries several sparsities and methods and keeps the best by quality kept minus bytes kept.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open

from cogumi.artifact import sha256
from cogumi.compress.calibration import Draw, draw_rows
from cogumi.compress.layout import Llama
from cogumi.compress.masks import Method, Pruner, Structure, check, held, matrices
from cogumi.compress.prune_report import write_report
from cogumi.compress.sparsity import PARTS, Mix, front, scaled, score
from cogumi.data.examples import read_examples, split_path
from cogumi.errors import RecipeError, TrainingError
from cogumi.models.build import load, save, save_tensors
from cogumi.models.text import HFTokenizer
from cogumi.registry import nearest
from cogumi.stage import CHECKPOINT, Context
from cogumi.train.batches import Row, make_rows
from cogumi.train.loop import Apply, LoopConfig, train
from cogumi.train.losses import answer_loss
from cogumi.train.validation import applied, judge_answers
from cogumi.types import Artifact

VERSION = 1
KIND = "model"

ZSTD_LEVEL = 10
"""Of the size that counts: the documents pack with this level."""

Share = Annotated[float, Field(ge=0, lt=1)]


class Between(LoopConfig):
    """`steps` are those of all phases together. The rate is cautious: what is trained is a finished model."""

    steps: int = Field(2000, ge=1)
    batch: int = Field(16, ge=1)
    lr: float = Field(1e-5, gt=0)


class Gradual(BaseModel):
    """0, then in four rises of 16.25% to 65%: that is what the documents' 2,000 steps lie between."""

    model_config = ConfigDict(extra="forbid")
    phases: int = Field(4, ge=1)
    loop: Between = Between()

    @model_validator(mode="after")
    def _steps_for_all(self) -> Gradual:
        if self.loop.steps % self.phases:
            raise ValueError(f"{self.loop.steps} steps cannot be shared by {self.phases} phases; give a multiple")
        return self


class Grid(BaseModel):
    """What is tried: every method at every overall sparsity of the parts, whose shares keep their ratio."""

    model_config = ConfigDict(extra="forbid")
    sparsities: tuple[Share, ...] = Field((0.6, 0.65, 0.7), min_length=1)
    methods: tuple[Method, ...] = Field(("magnitude", "wanda", "sparsegpt"), min_length=1)


class Config(BaseModel):
    """`parts` are the shares to prune: by default 60% of attention, 70% of feed_forward and 50% of embeddings, which is
    about 65% of all; with `2:4` half of each. A `head` of its own is pruned only if named.

    `mix` is the importance that `magnitude` goes by, and embeddings under any method. With a `grid` its methods and
    sparsities take the place of `method` and of the overall sparsity.
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
        half = {"attention": 0.5, "feed_forward": 0.5, "embeddings": 0.5}
        return self.parts or (
            half if self.structure == "2:4" else {"attention": 0.6, "feed_forward": 0.7, "embeddings": 0.5}
        )

    @property
    def phases(self) -> int:
        """Rises of the shares."""
        return self.gradual.phases if self.gradual else 1

    @model_validator(mode="after")
    def _can_be_done(self) -> Config:
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
            if self.phases > 2:
                raise ValueError("2:4 is reached by way of 1:4 at most, so in 1 or 2 phases")
        return self


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A way to prune: its name, how, and the share of each part."""

    name: str
    pruner: Pruner
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Work:
    """What all candidates share."""

    config: Config
    folder: Path
    llama: Llama
    calibration: Sequence[Row]
    rows: Sequence[Row]
    selection: Sequence[Row]
    out: Path
    context: Context

    def judge(self, model: Any) -> dict[str, float]:
        """Selection figures of a model as it is."""
        return _figures(judge_answers(applied(model), self.selection))

    def prune(self, candidate: _Candidate, number: int, of: int) -> tuple[Any, list[dict[str, Any]]]:
        """The pruned model, and what every phase did. A phase that is done is read back."""
        model, phases = load(self.folder), self.config.phases
        kept = self.out / CHECKPOINT / candidate.name / "pruned.safetensors"
        records = _resume(model, kept)
        for k in range(len(records) + 1, phases + 1):
            shares = {part: share * k / phases for part, share in candidate.shares.items()}
            candidate.pruner.prune(model, self.llama, shares, self.calibration, self.context)
            record: dict[str, Any] = {"asked": shares, "reached": reached(model), "cut": self.judge(model)}
            if self.config.gradual:
                context = self._part_of_context(candidate.name, k, (number * phases + k - 1, of * phases))
                record |= self._train(model, self.config.gradual, kept.parent / f"phase-{k}", context)
                model.cpu()
            records.append(record)
            kept.parent.mkdir(parents=True, exist_ok=True)
            weights = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
            save_tensors(weights, kept, {"phases": json.dumps(records)})
            shutil.rmtree(kept.parent / f"phase-{k}", ignore_errors=True)
        return model, records

    def _train(self, model: Any, gradual: Gradual, folder: Path, context: Context) -> dict[str, Any]:
        loop = gradual.loop.model_copy(update={"steps": gradual.loop.steps // gradual.phases})

        def validate(apply: Apply) -> dict[str, float]:
            return judge_answers(apply, self.selection)

        with held(model) as after_step:
            at = train(model, self.rows, answer_loss, loop, folder, context, validate, after_step=after_step)
        return {
            "trained": self.judge(model),
            "steps": at.step,
            "stopped": at.stopped,
            "curve": {"training": at.losses, "selection": at.validations},
        }

    def _part_of_context(self, name: str, phase: int, at: tuple[int, int]) -> Context:
        """A phase's own order of rows and log; progress that counts `at` (done, all) phases as equally long."""
        context, (done, all_phases) = self.context, at

        def progress(step: int, total: int | None, figures: Mapping[str, float]) -> None:
            context.progress(done * (total or 0) + step, total and all_phases * total, figures)

        logs = context.logs and context.logs / f"{name}-{phase}"
        return replace(context, seed=context.seed + phase, progress=progress, logs=logs)


def _figures(found: Mapping[str, float]) -> dict[str, float]:
    return {"nats": found["loss"], "perplexity": math.exp(found["loss"]), "exact": found["exact"]}


def _resume(model: Any, kept: Path) -> list[dict[str, Any]]:
    """Give a model the weights of the last phase that is done; what the phases did."""
    if not kept.exists():
        return []
    try:
        with safe_open(kept, "pt") as file, torch.no_grad():
            records: list[dict[str, Any]] = json.loads(file.metadata()["phases"])
            for name, weight in model.named_parameters():
                weight.copy_(file.get_tensor(name))
    except (SafetensorError, OSError, ValueError) as error:
        raise TrainingError(f"{kept} cannot be read ({error}); delete its folder to prune again") from error
    return records


def reached(model: Any) -> dict[str, float]:
    """Share of weights that are exactly 0, by part."""
    return {part: _zeros(names) / _weights(names) for part, names in matrices(model).items()}


def _zeros(names: Mapping[str, Any]) -> int:
    return sum(int((weight == 0).sum()) for weight in names.values())


def _weights(names: Mapping[str, Any]) -> int:
    return sum(weight.numel() for weight in names.values())


def zstd_bytes(model: Any) -> int:
    """Bytes of all weights as fp32 packed by zstd: what sparsity saves on disk before any quantization."""
    import zstandard

    packer = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj()
    sizes = [len(packer.compress(w.detach().cpu().float().numpy().tobytes())) for w in model.parameters()]
    return sum(sizes) + len(packer.flush())


def candidates(config: Config, weights: Mapping[str, int]) -> list[_Candidate]:
    """What the config asks to try, with `weights` in each part. `RecipeError` if a part would lose all."""
    if config.grid is None:
        return [_Candidate(config.method, Pruner(config.method, config.structure, config.mix), config.shares)]
    found = []
    for method in config.grid.methods:
        for sparsity in config.grid.sparsities:
            try:
                shares = scaled(config.shares, weights, sparsity)
            except ValueError as error:
                raise RecipeError(f"grid: {error}; give parts that are closer to each other") from error
            found.append(_Candidate(f"{method}-{sparsity:g}", Pruner(method, config.structure, config.mix), shares))
    return found


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`model` and `examples` -> a model folder; with a grid also `report.md` and `grid.png`."""
    torch.set_num_threads(context.threads)
    folder, data = inputs["model"].path, inputs["examples"].path
    tokenizer, llama, model = HFTokenizer.load(folder), Llama.load(folder), load(folder)
    check(model, config.shares, config.structure, folder)
    room = model.config.max_position_embeddings
    calibration = draw_rows(data, tokenizer, room, config.calibration, context.seed)
    selection = make_rows(read_examples(split_path(data, "selection")), tokenizer, room)
    rows = make_rows(read_examples(split_path(data, "train")), tokenizer, room) if config.gradual else []
    work = _Work(config, folder, llama, calibration, rows, selection, out, context)
    weights = {part: _weights(names) for part, names in matrices(model).items()}
    tried = candidates(config, weights)
    dense, dense_bytes = work.judge(model), zstd_bytes(model)
    results, best, zeros = [], -math.inf, _zeros(dict(model.named_parameters()))
    for number, candidate in enumerate(tried):
        pruned, phases = work.prune(candidate, number, len(tried))
        found = _result(candidate, pruned, phases, dense, dense_bytes)
        results.append(found)
        if found["score"] > best:
            best, model = found["score"], pruned
    for found, optimal in zip(results, front([(r["quality"], r["size"]) for r in results]), strict=True):
        found["front"] = optimal
    chosen = max(results, key=lambda found: found["score"])
    save(model, folder, out)
    if config.grid:
        write_report(out, results, chosen["name"], dense)
    return {
        "method": chosen["method"],
        "structure": config.structure,
        "calibration_rows": len(calibration),
        "parts": {
            part: {"weights": weights[part], "asked": share, "reached": chosen["reached"][part]}
            for part, share in chosen["asked"].items()
        },
        "zeros": {"before": zeros, "after": chosen["zeros"]},
        "sparsity": chosen["sparsity"],
        "dense": dense,
        "pruned": chosen["pruned"],
        "zstd_bytes": {"dense": dense_bytes, "pruned": chosen["zstd_bytes"], "ratio": chosen["size"]},
        "phases": chosen["phases"],
        "grid": {found["name"]: found for found in results} if config.grid else {},
        "chosen": chosen["name"],
        "model_sha256": sha256(out / "model.safetensors"),
    }


def _result(
    candidate: _Candidate, model: Any, phases: list[dict[str, Any]], dense: Mapping[str, float], dense_bytes: int
) -> dict[str, Any]:
    """Figures of a candidate; `sparsity` is over all weights of the model, pruned parts or not."""
    last = phases[-1]
    pruned = last.get("trained", last["cut"])
    size = zstd_bytes(model)
    kept = math.exp(dense["nats"] - pruned["nats"])
    right = pruned["exact"] / dense["exact"] if dense["exact"] else kept
    quality = (kept + right) / 2
    everything = dict(model.named_parameters())
    zeros = _zeros(everything)
    return {
        "name": candidate.name,
        "method": candidate.pruner.method,
        "asked": dict(candidate.shares),
        "reached": last["reached"],
        "zeros": zeros,
        "sparsity": zeros / _weights(everything),
        "pruned": pruned,
        "zstd_bytes": size,
        "size": size / dense_bytes,
        "quality": quality,
        "score": score(quality, size / dense_bytes),
        "phases": phases,
    }
