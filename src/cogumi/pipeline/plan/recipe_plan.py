"""What the steps of a recipe will take, and what is wrong with them, before anything is built (SPEC D1).

Each stage says it of itself (`core.estimate`); here are only the order of the steps and what holds for all of them.
Nothing is loaded or downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from cogumi.compress.gguf.planned_files import Weights
from cogumi.compress.pack.bundle_parts import Parts
from cogumi.core.amounts import size
from cogumi.core.errors import CogumiError
from cogumi.core.estimate import Cost, Given, Hardware, Input, estimate
from cogumi.core.facts import ModelFacts
from cogumi.core.registry import stage
from cogumi.core.stage import Stage
from cogumi.pipeline.input_checks import input_problems
from cogumi.pipeline.recipe import Recipe, Step, explain

COLUMNS = ("step", "method", "weights", "trained", "steps", "tokens", "peak memory", "disk")
UNKNOWN = Hardware()
WORKED_ON = ("model", "base")
"""What stages call the model that they read rows with."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step will take."""

    name: str
    stage: str
    cost: Cost
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Plan:
    """All steps of a recipe, what is known of their artifacts, and one line for each thing that would stop it."""

    recipe: Recipe
    steps: list[StepPlan] = field(default_factory=list)
    facts: dict[str, tuple[object, ...]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def known(self, of: type[T]) -> dict[str, T]:
        """What is known, of one type of record, by step."""
        return {name: fact for name, facts in self.facts.items() for fact in facts if isinstance(fact, of)}

    @property
    def bundle(self) -> Parts | None:
        """The last bundle that the recipe makes, under the recipe's name; None if it makes none of known shapes."""
        found = self._last_bundle
        return found[1].named(self.recipe.name) if found else None

    @property
    def beside(self) -> dict[str, Weights]:
        """The GGUF models that are no part of that bundle, by step."""
        last = self._last_bundle[0] if self._last_bundle else ""
        held = {name for step in self.recipe.steps if step.name == last for name in step.inputs.values()}
        return {name: weights for name, weights in self.known(Weights).items() if name not in held}

    @property
    def _last_bundle(self) -> tuple[str, Parts] | None:
        return next(reversed(self.known(Parts).items()), None)

    def document(self) -> dict[str, Any]:
        """All figures under plain names."""
        return {
            "recipe": self.recipe.name,
            "steps": [
                {"name": step.name, "stage": step.stage, **asdict(step.cost), "notes": step.notes}
                for step in self.steps
            ],
            "models": {name: asdict(model) for name, model in self.known(ModelFacts).items()},
            "problems": self.problems,
        }


def _count(n: int) -> str:
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"


def table(found: Plan) -> list[list[str]]:
    """What to show of the steps that compute: a row of `COLUMNS` each."""
    rows = []
    for step in found.steps:
        cost = step.cost
        if cost.shape is None:
            continue
        weights, trained, tokens = (_count(n) if n else "" for n in (cost.parameters, cost.trained, cost.tokens))
        steps = f"{cost.steps:,}" if cost.steps else ""
        peak = size(cost.memory.peak) if cost.memory else ""
        disk = size(cost.output + (cost.checkpoint or 0)) if cost.output else ""
        rows.append([step.name, cost.method, weights, trained, steps, tokens, peak, disk])
    return rows


def remarks(found: Plan) -> list[str]:
    """What else there is to know of the steps, a line each."""
    lines = []
    for step in found.steps:
        notes = [*step.notes, "needs a GPU"] if step.cost.needs_gpu else step.notes
        if notes:
            lines.append(f"{step.name}: {'; '.join(notes)}")
    return lines


def plan(recipe: Recipe, hardware: Hardware = UNKNOWN, length: int | None = None) -> Plan:
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


def _too_long(given: Given, made: tuple[object, ...]) -> Iterator[str]:
    """Whether rows do not fit the context of the model that a step makes, or else of the one that it works on."""
    models = [fact for fact in made if isinstance(fact, ModelFacts)]
    models = models or [model for role in WORKED_ON if (model := given.find(role, ModelFacts))]
    for model in models[:1]:
        longest = max((rows.longest for role in given.inputs if (rows := given.rows(role, model))), default=0)
        if longest > model.shape.context:
            yield (
                f"the longest rows have about {longest} tokens, the model's context is {model.shape.context}; "
                "shorten them or choose another model"
            )


class _Planner:
    """Goes through the steps in order, and remembers of each what later ones may know."""

    def __init__(self, recipe: Recipe, hardware: Hardware, length: int | None) -> None:
        self.recipe, self.hardware, self.length = recipe, hardware, length
        self.result = Plan(recipe)
        self.stages: dict[str, Stage] = {}

    def look(self, step: Step) -> None:
        """Plan one step; what is wrong with it goes to the problems, and later steps are planned all the same."""
        inputs = {role: Input(name, self.result.facts.get(name, ())) for role, name in step.inputs.items()}
        given = Given(step.name, self.recipe.root, inputs, self.hardware, self.length)
        try:
            module = stage(step.stage)
            config: Any = module.Config.model_validate(step.config)
            self.stages[step.name] = module
            self._tell(step, self._unfit(step, module, config))
            found = estimate(module, config, given)
        except ValidationError as error:
            self._tell(step, [explain(error, module.Config)])
            return
        except CogumiError as error:
            self._tell(step, [str(error)])
            return
        facts = tuple(fact for fact in found.facts if fact is not None)
        self.result.facts[step.name] = facts
        self._tell(step, [*_too_long(given, facts), *found.problems])
        self.result.steps.append(StepPlan(step.name, step.stage, found.cost, found.notes))

    def _tell(self, step: Step, problems: Iterator[str] | list[str]) -> None:
        self.result.problems += [f"step '{step.name}': {problem}" for problem in problems]

    def _unfit(self, step: Step, module: Stage, config: Any) -> Iterator[str]:
        """What of a step's inputs and files is not as the stage needs it."""
        makers = {role: self.stages.get(name) for role, name in step.inputs.items()}
        kinds = {role: maker.KIND if maker else None for role, maker in makers.items()}
        yield from input_problems(module, config, kinds)
        for path in _paths(config.model_dump()):
            if not (self.recipe.root / path).exists():
                yield f"there is no file {self.recipe.root / path}; put your own there"
