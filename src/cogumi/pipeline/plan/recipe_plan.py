"""Costs and problems of the steps of a recipe, before anything is built (SPEC D1).

Each stage estimates its own steps (`core.estimate`); this module orders them and makes the checks common to all stages.
It loads and downloads nothing.
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
from cogumi.data.sources.containers import problem_of_path, within
from cogumi.pipeline.input_checks import input_problems
from cogumi.pipeline.recipe import Recipe, Step, explain

COLUMNS = ("step", "method", "weights", "trained", "steps", "tokens", "peak memory", "disk")
UNKNOWN = Hardware()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The estimated cost of a step."""

    name: str
    stage: str
    cost: Cost
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Plan:
    """All steps of a recipe, facts about their artifacts, and a line for each problem that would stop the build."""

    recipe: Recipe
    steps: list[StepPlan] = field(default_factory=list)
    facts: dict[str, tuple[object, ...]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def known(self, of: type[T]) -> dict[str, T]:
        """The known facts of one type, by step."""
        return {name: fact for name, facts in self.facts.items() for fact in facts if isinstance(fact, of)}

    @property
    def bundle(self) -> Parts | None:
        """The last bundle of the recipe, under the recipe's name; None if there is none or a shape is unknown."""
        found = self._last_bundle
        return found[1].named(self.recipe.name) if found else None

    @property
    def beside(self) -> dict[str, Weights]:
        """The GGUF models outside that bundle, by step."""
        last = self._last_bundle[0] if self._last_bundle else ""
        held = {name for step in self.recipe.steps if step.name == last for name in step.inputs.values()}
        return {name: weights for name, weights in self.known(Weights).items() if name not in held}

    @property
    def _last_bundle(self) -> tuple[str, Parts] | None:
        return next(reversed(self.known(Parts).items()), None)

    def document(self) -> dict[str, Any]:
        """All figures as a JSON-compatible dictionary."""
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
    """A row of `COLUMNS` for each step with a model."""
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
    """The notes of the steps: one line for all steps with the same notes."""
    steps: dict[str, list[str]] = {}
    for step in found.steps:
        notes = [*step.notes, "needs a GPU"] if step.cost.needs_gpu else step.notes
        if notes:
            steps.setdefault("; ".join(notes), []).append(step.name)
    return [f"{', '.join(names)}: {notes}" for notes, names in steps.items()]


def plan(recipe: Recipe, hardware: Hardware = UNKNOWN, length: int | None = None) -> Plan:
    """Plan all steps of a recipe; `length` overrides the estimated tokens of the longest row."""
    planner = _Planner(recipe, hardware, length)
    for step in recipe.steps:
        planner.add(step)
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


@dataclass(frozen=True, slots=True)
class TooLong:
    """The longest row, at `where`, has about `tokens` tokens, more than a `context`: of a model, or the config's."""

    where: str
    tokens: int
    context: int

    def line(self, key: str) -> str:
        """The problem as text; `key` of the step's config sets the context (empty: the model does)."""
        row = f"the longest row ({self.where})" if self.where else "the longest row"
        way = f"raise `{key}`" if key else "choose another model"
        return f"{row} has about {self.tokens} tokens, the context is {self.context}; shorten it or {way}"


def _too_long(given: Given, config: Any, made: tuple[object, ...]) -> Iterator[tuple[TooLong, str]]:
    """Rows that exceed the context of the model that a step makes or uses, or of its config; with the config's key."""
    own = [fact for fact in made if isinstance(fact, ModelFacts)]
    models = own or [model for role in given.inputs if (model := given.find(role, ModelFacts))]
    for model in models[:1]:
        for rows in filter(None, (given.rows(role, model) for role in given.inputs)):
            context, key = (
                model.shape.context,
                "shape.context" if own and getattr(config, "init", "") == "scratch" else "",
            )
            asked = rows.question + getattr(config, "max_tokens", 0)
            if isinstance(limit := getattr(config, "context", None), int) and asked > limit:
                yield TooLong(rows.where, asked, limit), "context"
            elif (longest := max(rows.longest, asked)) > context:
                yield TooLong(rows.where, longest, context), key


class _Planner:
    """Plans the steps in order and keeps the facts about each for later steps."""

    def __init__(self, recipe: Recipe, hardware: Hardware, length: int | None) -> None:
        self.recipe, self.hardware, self.length = recipe, hardware, length
        self.result = Plan(recipe)
        self.stages: dict[str, Stage] = {}
        self.too_long: set[tuple[str, int]] = set()

    def add(self, step: Step) -> None:
        """Plan one step; its problems are collected, and later steps are planned nevertheless."""
        inputs = {role: Input(name, self.result.facts.get(name, ())) for role, name in step.inputs.items()}
        given = Given(step.name, self.recipe.root, inputs, self.hardware, self.length)
        try:
            module = stage(step.stage)
            config: Any = module.Config.model_validate(step.config)
            self.stages[step.name] = module
            self._report(step, self._input_problems(step, module, config))
            found = estimate(module, config, given)
        except ValidationError as error:
            self._report(step, [explain(error, module.Config)])
            return
        except CogumiError as error:
            self._report(step, [str(error)])
            return
        facts = tuple(fact for fact in found.facts if fact is not None)
        self.result.facts[step.name] = facts
        self._report(step, [*self._new_problems(given, config, facts), *found.problems])
        self.result.steps.append(StepPlan(step.name, step.stage, found.cost, found.notes))

    def _new_problems(self, given: Given, config: Any, facts: tuple[object, ...]) -> Iterator[str]:
        """A line for each context that a row exceeds; later steps with the same context are not mentioned again."""
        for problem, key in _too_long(given, config, facts):
            if (place := (problem.where, problem.context)) not in self.too_long:
                self.too_long.add(place)
                yield problem.line(key)

    def _report(self, step: Step, problems: Iterator[str] | list[str]) -> None:
        self.result.problems += [f"step '{step.name}': {problem}" for problem in problems]

    def _input_problems(self, step: Step, module: Stage, config: Any) -> Iterator[str]:
        """Problems with the inputs and files of a step."""
        makers = {role: self.stages.get(name) for role, name in step.inputs.items()}
        kinds = {role: maker.KIND if maker else None for role, maker in makers.items()}
        yield from input_problems(module, config, kinds)
        for path in _paths(config.model_dump()):
            if problem := problem_of_path(within(self.recipe.root, path)):
                yield problem
