"""Stage `shrink`: remove layers, heads, neurons and channels, then distil from the original model (SPEC D3).

The parts with the weakest activations on calibration tokens are removed (`activity`, `cutting`). The smaller model then
learns the next-token distributions of the original, as in Minitron (Muralidharan et al., 2407.14679; Sreenivas et al.,
2408.11796) and Llama 3.2 1B and 3B (model card). `control: scratch` also trains a randomly initialized model of the
same shape on the same rows, steps and rates, for comparison.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from cogumi.compress.calibration_rows import Draw, draw_rows
from cogumi.compress.gguf.layout import read_json
from cogumi.compress.shrink.activity import measure
from cogumi.compress.shrink.cutting import BLOCK, Kept, choose, cut, smaller
from cogumi.compress.shrink.shrink_report import report
from cogumi.core.estimate import Estimate, Given, uncounted
from cogumi.core.facts import ModelFacts
from cogumi.core.files import sha256
from cogumi.core.shapes import ModelShape, shape_of
from cogumi.core.stage import CHECKPOINT, Context
from cogumi.core.types import Artifact
from cogumi.data.examples import read_examples, split_path
from cogumi.models.folders import load, parameters, save
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.batches import make_rows
from cogumi.train.checkpoint import Progress
from cogumi.train.loop import Apply, LoopConfig, Loss, train
from cogumi.train.losses import answer_loss, distillation
from cogumi.train.validation import applied, judge_answers

VERSION = 1
KIND = "model"
INPUTS = {"examples": "examples", "model": "model"}
TRAINS = True


class Config(BaseModel):
    """Sizes of the smaller model; a size that is not given stays. If only one of `heads` and `kv_heads` is given, whole
    groups of query heads are removed.

    `draw` selects the calibration rows. In `loop` the smaller model learns from the original (softened by
    `temperature`) and from the reference answers, whose share of the loss is `answers`; 1 turns distillation off.
    `loop: null` only cuts.
    """

    model_config = ConfigDict(extra="forbid")
    layers: int | None = Field(None, ge=1)
    feed_forward: int | None = Field(None, ge=BLOCK, multiple_of=BLOCK)
    heads: int | None = Field(None, ge=1)
    kv_heads: int | None = Field(None, ge=1)
    hidden: int | None = Field(None, ge=BLOCK, multiple_of=BLOCK)
    draw: Draw = Draw()
    temperature: float = Field(1.0, gt=0)
    answers: float = Field(0.5, ge=0, le=1)
    control: Literal["scratch"] | None = None
    loop: LoopConfig | None = LoopConfig()

    @property
    def asked(self) -> dict[str, int]:
        """The sizes that are given."""
        names = ("layers", "feed_forward", "heads", "kv_heads", "hidden")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def shrunk(model: Any, kept: Kept, target: ModelShape) -> Any:
    """A new model with the kept parts; the given model is not changed."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = target.layers
    config.intermediate_size = target.feed_forward
    config.num_attention_heads = target.heads
    config.num_key_value_heads = target.kv_heads
    config.hidden_size = target.hidden
    if getattr(config, "head_dim", None) or target.query != target.hidden:
        config.head_dim = target.head
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept.layers]
    small = type(model)(config).eval()
    small.load_state_dict(cut(model.state_dict(), kept))
    return small


@dataclass(frozen=True, slots=True)
class _Trainer:
    """Trains the shrunk model and its control on the same data, after `begun` of `total` units of progress."""

    rows: Sequence[Row]
    selection: Sequence[Row]
    loop: LoopConfig
    context: Context
    begun: int
    total: int

    def train(self, model: Any, loss: Loss, out: Path, name: str = "") -> Progress:
        """Train in place; a second run needs a `name` for its own log, checkpoint and share of the progress."""

        def validate(apply: Apply) -> dict[str, float]:
            return judge_answers(apply, self.selection)

        begun = self.begun + (self.loop.steps if name else 0)

        def progress(done: int, _: int | None, figures: Mapping[str, float]) -> None:
            self.context.progress(begun + done, self.total, figures)

        context = replace(self.context, progress=progress, logs=self.context.logs and self.context.logs / name)
        return train(model, self.rows, loss, self.loop, out / CHECKPOINT / name if name else out, context, validate)


def estimate(config: Config, given: Given) -> Estimate:
    """The smaller model, and the steps of its training."""
    model = given.find("model", ModelFacts)
    if model:
        model = replace(model, shape=smaller(model.shape, config.asked))
    return uncounted(model, model=model, steps=config.loop.steps if config.loop else None)


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`model` and `examples` -> a smaller model folder with report.md, and curves.png if it was trained."""
    torch.set_num_threads(context.threads)
    folder, data = inputs["model"].path, inputs["examples"].path
    shape = shape_of(read_json(folder / "config.json"), str(folder))
    whole = load(folder).eval()
    target = smaller(shape, config.asked)
    tokenizer = HFTokenizer.load(folder)
    rows, selection = (
        make_rows(read_examples(split_path(data, name)), tokenizer, shape.context) for name in ("train", "selection")
    )
    calibration = draw_rows(data, tokenizer, shape.context, config.draw, context.seed)
    loop = config.loop if target != shape else None
    deep = target.layers < shape.layers
    passes = shape.layers + 1 if deep else 1
    total = passes + (loop.steps if loop else 0) * (2 if config.control else 1)
    found = measure(whole, shape, calibration, deep, lambda done: context.progress(done, total, {}))
    kept = choose(found, shape, target)
    small = shrunk(whole, kept, target)

    def judged(model: Any) -> dict[str, float]:
        figures = judge_answers(applied(model), selection)
        return {"nats": figures["loss"], "perplexity": math.exp(figures["loss"]), "exact": figures["exact"]}

    quality = {"before": judged(whole), "cut": judged(small)}
    runs: dict[str, Progress] = {}
    if loop:
        trainer = _Trainer(rows, selection, loop, context, passes, total)
        loss = answer_loss if config.answers == 1 else distillation(whole, config.temperature, config.answers)
        runs["after"] = trainer.train(small, loss, out)
        if config.control:
            torch.manual_seed(context.seed)
            control = type(whole)(copy.deepcopy(small.config))
            runs["control"] = trainer.train(control, answer_loss, out, "control")
            quality["control"] = judged(control)
    quality["after"] = judged(small) if loop else quality["cut"]
    save(small, folder, out)
    metrics = {
        "shape": {"before": asdict(shape), "after": asdict(target)},
        "parameters": {"before": parameters(whole), "after": parameters(small)},
        "calibration": {"rows": len(calibration), "tokens": sum(row.size for row in calibration)},
        "layers": {"kept": kept.layers, "nats_without": found.layers.tolist() if deep else []},
        **quality,
        **_ratios(quality),
        "steps": {name: at.step for name, at in runs.items()},
        "tokens": {name: at.tokens for name, at in runs.items()},
        "best_step": {name: at.best_step for name, at in runs.items()},
        "curve": {name: {"training": at.losses, "selection": at.validations} for name, at in runs.items()},
        "model_sha256": sha256(out / "model.safetensors"),
    }
    report(metrics, out)
    return metrics


def _ratios(quality: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    """`quality_ratio`: perplexity before over after; `exact_ratio`: exact answers after over before;
    `against_control`: the control's perplexity over that after, above 1 if cutting beats training from scratch.
    """
    before, after, control = quality["before"], quality["after"], quality.get("control")
    return {
        "quality_ratio": before["perplexity"] / after["perplexity"],
        "exact_ratio": after["exact"] / before["exact"] if before["exact"] else None,
        "against_control": control["perplexity"] / after["perplexity"] if control else None,
    }
