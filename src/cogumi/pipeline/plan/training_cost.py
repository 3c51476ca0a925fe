"""What a recipe will take, and what is wrong with it, before anything is built (SPEC D1, the part about training).

Nothing is loaded or downloaded: shapes come from `cogumi.core.shapes`, memory from `footprint`, row lengths from the
data itself, at a cautious number of bytes per token. How long a step takes is not guessed; its arithmetic is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cogumi.core.amounts import size
from cogumi.core.errors import ArtifactError, RecipeError
from cogumi.core.registry import nearest, stage
from cogumi.core.shapes import ModelShape
from cogumi.core.stage import Stage
from cogumi.pipeline.plan.footprint import FP32, Footprint, Training, footprint
from cogumi.pipeline.plan.inputs import needed
from cogumi.pipeline.plan.model_shapes import Model, cut, given, ranks_of
from cogumi.pipeline.plan.row_lengths import OWN_TEMPLATE, TEMPLATE, Rows, Sizes, file_sizes, world_sizes
from cogumi.pipeline.recipe import Recipe, Step, explain

ASKED = 256
"""The most that stage `respond` answers at once."""
VALIDATED = 4096
"""Tokens that a pass of validation reads at once (`train.validation.TOKENS`, which this must not import)."""

UNKNOWN_IDS = "how many ids stay will say the corpus; what follows is planned as if all did"
UNPLANNED = ("trim", "prune", "shrink", "awq", "gptq", "importance", "chain")
"""Stages that compute for long on a model without training it, of which nothing is counted here."""
COLUMNS = ("step", "method", "weights", "trained", "steps", "tokens", "peak memory", "disk")


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step will take. Sizes are bytes; a figure that has no meaning for the step, or is unknown, is None.

    `tokens` are read in training, `flops` the arithmetic on them; `memory` is that of each device; `output` and
    `checkpoint` (with its replacement beside it) lie on disk.
    """

    name: str
    stage: str
    method: str = ""
    shape: ModelShape | None = None
    parameters: int | None = None
    trained: int | None = None
    steps: int | None = None
    tokens: int | None = None
    flops: float | None = None
    memory: Footprint | None = None
    output: int | None = None
    checkpoint: int | None = None
    needs_gpu: bool = False
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Plan:
    """All steps of a recipe, the models that steps make, and one line for each thing that would stop it."""

    recipe: str
    steps: list[StepPlan] = field(default_factory=list)
    models: dict[str, Model] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Hardware:
    """What there is to train on: `gpus` alike, each with `memory` bytes (None: not asked)."""

    memory: int | None = None
    gpus: int = 1


def _count(n: int) -> str:
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"


def table(found: Plan) -> list[list[str]]:
    """What to show of the steps that compute: a row of `COLUMNS` each."""
    rows = []
    for step in found.steps:
        if step.shape is None:
            continue
        weights, trained, tokens = (_count(n) if n else "" for n in (step.parameters, step.trained, step.tokens))
        steps = f"{step.steps:,}" if step.steps else ""
        peak = size(step.memory.peak) if step.memory else ""
        disk = size(step.output + (step.checkpoint or 0)) if step.output else ""
        rows.append([step.name, step.method, weights, trained, steps, tokens, peak, disk])
    return rows


def remarks(found: Plan) -> list[str]:
    """What else there is to know of the steps, a line each."""
    lines = []
    for step in found.steps:
        notes = [*step.notes, "needs a GPU"] if step.needs_gpu else step.notes
        if notes:
            lines.append(f"{step.name}: {'; '.join(notes)}")
    return lines


def plan(recipe: Recipe, hardware: Hardware = Hardware(), length: int | None = None) -> Plan:
    """Look at every step of a recipe; `length` is the tokens of the longest row, where the data should not say."""
    planner = _Planner(recipe, hardware, length)
    for step in recipe.steps:
        planner.look(step)
    return planner.result


def _paths(value: Any) -> Iterator[Path]:
    """Every path in a config."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _paths(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _paths(item)


def _loop(config: Any) -> Any:
    """How a step trains, all phases of a gradual one together; None if it does not."""
    return getattr(config, "loop", None) or getattr(getattr(config, "gradual", None), "loop", None)


def _notes(step: Step, config: Any) -> Iterator[str]:
    """What is not known of a step before it has run."""
    if step.stage in UNPLANNED:
        yield "not planned: its time and memory"
    if step.stage == "trim" and not config.size:
        yield UNKNOWN_IDS
    if step.stage == "gguf" and "types" in step.inputs:
        yield f"the types of step '{step.inputs['types']}' are known once it ran; planned as if none were given"


class _Planner:
    """Goes through the steps in order, and remembers of each what later ones need."""

    def __init__(self, recipe: Recipe, hardware: Hardware, length: int | None) -> None:
        self.recipe, self.hardware, self.length = recipe, hardware, length
        self.result = Plan(recipe.name)
        self.stages: dict[str, Stage] = {}
        self.vocabularies: dict[str, int] = {}
        self.sizes: dict[str, Sizes] = {}

    def look(self, step: Step) -> None:
        """Plan one step; what is wrong with it goes to the problems, and later steps are planned all the same."""
        try:
            module = stage(step.stage)
            config: Any = module.Config.model_validate(step.config)
            self.stages[step.name] = module
            self._check_inputs(step, config)
            self._measure(step, config)
            model = self._model_of(step, config)
        except (RecipeError, ArtifactError) as error:
            self._problem(step, str(error))
            return
        except ValidationError as error:
            self._problem(step, explain(error, module.Config))
            return
        if model and module.KIND in ("model", "gguf"):
            self.result.models[step.name] = model
        if step.stage == "tokenizer":
            self.vocabularies[step.name] = config.vocabulary
        found = StepPlan(step.name, step.stage, notes=tuple(_notes(step, config)))
        if model is not None:
            rows = self._rows(step, model)
            self._check_length(step, config, model, rows)
            if step.stage == "respond":
                found = self._answering(step, config, model, rows)
            elif _loop(config):
                found = self._training(step, module, config, model, rows)
        self.result.steps.append(found)

    def _problem(self, step: Step, what: str) -> None:
        self.result.problems.append(f"step '{step.name}': {what}")

    # --- what is given ---

    def _check_inputs(self, step: Step, config: Any) -> None:
        for role, kind in needed(step, config).items():
            if role not in step.inputs:
                self._problem(step, f"the stage needs an input '{role}'; given: {', '.join(step.inputs) or 'none'}")
                continue
            given = self.stages.get(step.inputs[role])
            if given and kind != given.KIND:
                self._problem(step, f"input '{role}' is of kind {given.KIND}, not {kind}; take another step's")
        for path in _paths(config.model_dump()):
            if not (self.recipe.root / path).exists():
                self._problem(step, f"there is no file {self.recipe.root / path}; put your own there")

    def _measure(self, step: Step, config: Any) -> None:
        """Remember how long the rows of this step are, those it makes or works on."""
        found: Sizes | None
        if step.stage == "world":
            found = world_sizes(config)
        elif step.stage == "files":
            found = file_sizes(config, self.recipe.root)
        else:
            found = self.sizes.get(step.inputs.get("examples") or step.inputs.get("data") or "")
        if found:
            self.sizes[step.name] = found

    def _rows(self, step: Step, model: Model) -> Rows | None:
        """Lengths of the rows of a step in the tokens of a model."""
        sizes = self.sizes.get(step.name)
        return sizes.rows(OWN_TEMPLATE if model.own else TEMPLATE, self.length) if sizes else None

    def _model_of(self, step: Step, config: Any) -> Model | None:
        """The model that a step trains, asks or exports; None where there is none, or an earlier problem hides it."""
        base = self.result.models.get(step.inputs.get("model", "")) or self.result.models.get(
            step.inputs.get("base", "")
        )
        init = getattr(config, "init", None)
        if init is None:
            return replace(base, shape=cut(step, config, base.shape)) if base else None
        if init != "scratch":
            return given(init, self.recipe.root)
        tokenizer = step.inputs.get("tokenizer", "")
        vocabulary = base.shape.vocabulary if base else self.vocabularies.get(tokenizer)
        if vocabulary is None:
            return None
        s = config.shape
        head = s.hidden // s.heads
        shape = ModelShape(s.hidden, s.feed_forward, s.layers, s.heads, s.heads, head, vocabulary, s.context, True)
        return Model(shape, base.tokenizer if base else tokenizer, base.own if base else True)

    # --- what it takes ---

    def _check_length(self, step: Step, config: Any, model: Model, rows: Rows | None) -> None:
        if rows and rows.longest > model.shape.context:
            self._problem(
                step,
                f"the longest rows have about {rows.longest} tokens, the model's context is {model.shape.context}; "
                "shorten them or choose another model",
            )

    def _training(self, step: Step, module: Stage, config: Any, model: Model, rows: Rows | None) -> StepPlan:
        shape, loop, lora = model.shape, _loop(config), getattr(config, "lora", None)
        if lora is None and step.stage not in ("sft", "draft"):
            return StepPlan(step.name, step.stage, shape=shape, steps=loop.steps, notes=("not planned: its memory",))
        ranks: dict[str, int] | None = None
        if lora is not None:
            for target in (*lora.targets, *lora.ranks):
                if target not in shape.linear:
                    self._problem(
                        step, f"LoRA target '{target}' is no layer of this model; {nearest(target, shape.linear)}"
                    )
            ranks = {target: rank for target, rank in ranks_of(lora).items() if target in shape.linear}
        nf4 = getattr(config, "quantize", None) == "nf4"
        notes = [] if rows else ["rows of unknown length: 512 tokens assumed"]
        rows = rows or Rows(0, 512, 512, 512)
        everywhere = step.stage == "draft" and config.question_weight > 0
        training = Training(
            shape,
            rows=math.ceil(loop.batch / (loop.accumulate * self.hardware.gpus)),
            length=rows.longest,
            answer=rows.longest if everywhere else rows.answer,
            judged=max(VALIDATED // rows.longest, 1),
            ranks=ranks,
            nf4=nf4,
            bf16=loop.precision == "bf16",
            recompute=loop.gradient_checkpointing,
            parts=loop.accumulate,
            gpus=self.hardware.gpus,
            muon=loop.muon_lr is not None,
        )
        memory = footprint(training)
        tokens = int(loop.steps * loop.batch * rows.mean)
        passes = 4 + (2 if lora is None else 0) + (2 if loop.gradient_checkpointing else 0)
        self._check_memory(step, memory, training)
        if step.stage == "draft":
            notes += self._drafting(step, model)
        kept = module.KIND == "adapter"
        return StepPlan(
            step.name,
            step.stage,
            method="full" if lora is None else "QLoRA nf4" if nf4 else "LoRA",
            shape=shape,
            parameters=shape.parameters,
            trained=training.trained + (shape.hidden + 1 if step.stage == "draft" else 0),  # its difficulty head
            steps=loop.steps,
            tokens=tokens,
            flops=float(passes * (shape.matrices + shape.head_weights) * tokens),
            memory=memory,
            output=FP32 * (training.trained if kept else shape.parameters),
            checkpoint=2 * (FP32 * training.trained + memory.optimizer * self.hardware.gpus)
            + (1 + loop.keep) * FP32 * training.trained,
            needs_gpu=nf4,
            notes=tuple(notes),
        )

    def _drafting(self, step: Step, model: Model) -> list[str]:
        """What becomes of a draft that speaks another vocabulary than its base."""
        base = self.result.models.get(step.inputs.get("model", ""))
        if base is None or base.tokenizer == model.tokenizer:
            return []
        for one in (base, model):
            if not one.bytewise:
                self._problem(
                    step,
                    f"the tokenizer {one.tokenizer} is none over bytes, so drafts cannot be bridged; use "
                    "a draft with the base's tokenizer",
                )
        return [f"tokenizer {model.tokenizer}, the base's is {base.tokenizer}: the runtime drafts through text"]

    def _answering(self, step: Step, config: Any, model: Model, rows: Rows | None) -> StepPlan:
        """Stage `respond`: weights in fp32, and a key-value cache for the answers of one batch."""
        shape, at_once = model.shape, min(ASKED, config.window)
        length = (rows.longest - rows.answer if rows else 512) + config.max_tokens
        cache = FP32 * shape.cache_values() * at_once * length
        weights = FP32 * shape.parameters
        memory = Footprint(weights, 0, 0, cache, 0, weights + cache)
        limit = self.hardware.memory
        if limit is not None and memory.peak > limit:
            what = f"answering takes {memory.peak / 1e9:.1f} GB on a GPU, and there are {limit / 1e9:.1f}"
            self._problem(step, f"{what}; try a smaller `window`, or hide the GPU from this step")
        return StepPlan(step.name, step.stage, "answers", shape, shape.parameters, memory=memory)

    def _check_memory(self, step: Step, memory: Footprint, training: Training) -> None:
        limit = self.hardware.memory
        if limit is None or memory.peak <= limit:
            return
        ways = {
            "gradient_checkpointing": not training.recompute,
            "more `accumulate`": training.rows > 1,
            "a `lora`": not training.ranks,
            "quantize: nf4": bool(training.ranks) and not training.nf4,
            "more --gpus": not training.nf4,
        }
        if memory.weights + memory.optimizer + memory.validation == memory.peak:
            ways = {"shorter rows": True}
        self._problem(
            step,
            f"takes {memory.peak / 1e9:.1f} GB on each GPU, and there are {limit / 1e9:.1f}; "
            f"try {' or '.join(way for way, helps in ways.items() if helps) or 'a smaller model'}",
        )
