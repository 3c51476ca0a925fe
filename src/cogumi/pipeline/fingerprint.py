"""Checks a whole recipe against its stages and fingerprints every step, before anything runs.

A step's fingerprint is a hash of its stage, the stage's version, config, seed and the fingerprints of its inputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from cogumi.core import artifact
from cogumi.core.errors import CogumiError, RecipeError
from cogumi.core.files import sha256
from cogumi.core.registry import stage
from cogumi.core.stage import Stage
from cogumi.pipeline.input_checks import input_problems
from cogumi.pipeline.recipe import Recipe, Step, explain


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step with its stage, validated config and fingerprint."""

    step: Step
    stage: Stage
    config: BaseModel
    fingerprint: str

    @property
    def name(self) -> str:
        """The step's name."""
        return self.step.name

    @property
    def trains(self) -> bool:
        """Whether all processes of a launch run it together: stages that train declare `TRAINS = True`."""
        return getattr(self.stage, "TRAINS", False)

    @property
    def light(self) -> bool:
        """Whether its stage takes seconds only (`LIGHT = True`)."""
        return getattr(self.stage, "LIGHT", False)

    @property
    def reports(self) -> bool:
        """Whether its metrics and page become those of the build: such stages declare `REPORTS = True`."""
        return getattr(self.stage, "REPORTS", False)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, in hexadecimal; independent of the order of keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _with_content(value: Any, root: Path) -> Any:
    """A config value in which each path is replaced by the path and the hashes of its files."""
    if isinstance(value, Mapping):
        return {key: _with_content(item, root) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_content(item, root) for item in value]
    if not isinstance(value, Path):
        return value
    path = root / value
    if not path.exists():
        raise RecipeError(f"there is no file {path}; check the path")
    names = artifact.file_names(path) if path.is_dir() else [path.name]
    folder = path if path.is_dir() else path.parent
    return [value.as_posix(), {name: sha256(folder / name) for name in names}]


def _identity(module: Stage, config: BaseModel, root: Path) -> Any:
    """What stands for the config in a step's fingerprint."""
    hook = getattr(module, "identity", None)
    return hook(config, root) if hook else _with_content(config.model_dump(), root)


def plan(recipe: Recipe, seed: int | None = None) -> list[PlannedStep]:
    """All steps of a recipe in order, with fingerprints; `RecipeError` names an invalid step."""
    seed = recipe.seed if seed is None else seed
    plans: dict[str, PlannedStep] = {}
    for step in recipe.steps:
        where = f"recipe {recipe.name}, step '{step.name}'"
        try:
            module = stage(step.stage)
            config = module.Config.model_validate(step.config)
            kinds = {role: plans[name].stage.KIND for role, name in step.inputs.items()}
            for problem in input_problems(module, config, kinds):
                raise RecipeError(problem)
            identity = {
                "stage": step.stage,
                "version": module.VERSION,
                "config": _identity(module, config, recipe.root),
                "seed": seed,
                "inputs": {role: plans[name].fingerprint for role, name in step.inputs.items()},
            }
        except CogumiError as error:
            raise RecipeError(f"{where}: {error}") from error
        except ValidationError as error:
            raise RecipeError(f"{where}: {explain(error, module.Config)}") from error
        plans[step.name] = PlannedStep(step, module, config, digest(identity))
    return list(plans.values())
