"""A recipe: the steps that build a cascade, read from YAML.

An invalid recipe is rejected before anything runs. Errors are one line with the location and, for an unknown name, the
closest known one.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from cogumi.core.errors import RecipeError
from cogumi.core.registry import nearest
from cogumi.pipeline.graph import in_order

LOGS = "logs"
"""The folder of TensorBoard logs, beside the steps' folders."""
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class GateSpec(BaseModel):
    """A bound on one metric, given by its dotted path.

    With `relative_to`, the bound is a factor on the same metric of that step, which runs first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    relative_to: str | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> GateSpec:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"gate on '{self.metric}': give either at_least or at_most")
        return self


class Step(BaseModel):
    """One run of a stage; `inputs` maps the stage's roles to other steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: FolderName
    stage: str
    inputs: dict[str, str] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    gates: list[GateSpec] = Field(default_factory=list)

    @property
    def needs(self) -> tuple[str, ...]:
        """The steps that must finish before this one: its inputs and the steps that its gates compare with."""
        compared = (gate.relative_to for gate in self.gates if gate.relative_to is not None)
        return tuple(dict.fromkeys((*self.inputs.values(), *compared)))


class Recipe(BaseModel):
    """Steps in topological order. Relative paths in their configs start at `root`.

    The YAML file may list the steps in any order. A recipe that `extends` another (a built-in name, or a file in the
    same folder) adds steps to it, builds in its folder and uses its seed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: FolderName
    description: str = ""
    seed: int = 0
    extends: str | None = None
    steps: list[Step] = Field(min_length=1)
    _root: Path = PrivateAttr(default_factory=Path.cwd)
    _folder: str | None = PrivateAttr(None)

    @property
    def root(self) -> Path:
        """The folder of the recipe's file; the working folder for a built-in recipe."""
        return self._root

    @property
    def folder(self) -> str:
        """Name of the folder that contains the steps' folders."""
        return self._folder or self.name

    @property
    def graph(self) -> dict[str, tuple[str, ...]]:
        """Step -> the steps it depends on."""
        return {step.name: step.needs for step in self.steps}

    @field_validator("steps")
    @classmethod
    def _in_order(cls, steps: list[Step]) -> list[Step]:
        by_name: dict[str, Step] = {}
        for step in steps:
            if step.name in by_name:
                raise ValueError(f"step '{step.name}': there are two steps of this name")
            if step.name == LOGS:
                raise ValueError(f"step '{step.name}': the folder of training curves has this name; choose another")
            by_name[step.name] = step
        for step in steps:
            named = {f"input '{role}'": name for role, name in step.inputs.items()}
            named |= {
                f"gate on '{g.metric}': relative_to": g.relative_to for g in step.gates if g.relative_to is not None
            }
            for what, name in named.items():
                if name not in by_name:
                    hint = nearest(name, by_name.keys() - {step.name})
                    raise ValueError(f"step '{step.name}': {what} is not a step of this recipe: '{name}'; {hint}")
        return [by_name[name] for name in in_order({step.name: step.needs for step in steps})]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _first(error: ValidationError) -> ErrorDetails:
    """The problem to show: an unknown key before a missing one, which is often its correct spelling."""
    return min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The problem to show of those pydantic found in `model`, in one line; for an unknown key with the closest one."""
    first = _first(error)
    *path, last = first["loc"] or ("",)
    prefix = "".join(f"{part}: " for part in [".".join(map(str, path))] if part)
    if first["type"] == "extra_forbidden":
        for part in path:
            field = model.model_fields.get(str(part))
            model = next(_models(field.annotation), model) if field else model
        return f"{prefix}unknown key '{last}'; {nearest(str(last), model.model_fields)}"
    if first["type"] == "missing":
        return f"{prefix}the key '{last}' is missing"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    given = f" (not {first['input']!r})" if isinstance(first["input"], (str, int, float)) else ""
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}{given}"


def _place(error: ValidationError, data: dict[str, Any]) -> tuple[str, ValidationError]:
    """The step that contains an error, as text, and the error with a location relative to that step."""
    loc: tuple[Any, ...] = _first(error)["loc"]
    if len(loc) < 3 or loc[0] != "steps":
        return "", error
    step = data["steps"][loc[1]]
    name = step.get("name") if isinstance(step, dict) else None
    try:
        Step.model_validate(step)
    except ValidationError as inner:
        return f", step '{name}'" if name else f", step {loc[1] + 1}", inner
    return "", error


def _refuse_duplicates(node: yaml.Node | None, seen: set[int]) -> None:
    """Raise `RecipeError` for a duplicate key; PyYAML would silently keep the last one."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in keys:
                line = key.start_mark.line + 1
                raise RecipeError(f"line {line}: the key '{name}' appears twice; keep one of them")
            keys.add(name)
            _refuse_duplicates(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, seen)


def parse_recipe(text: str, where: str, root: Path, above: tuple[str, ...] = ()) -> Recipe:
    """Parse a recipe; `where` names it in errors, `above` are the recipes that extend it."""
    try:
        _refuse_duplicates(yaml.compose(text, Loader=yaml.SafeLoader), set())
        data = yaml.safe_load(text)
    except RecipeError as error:
        raise RecipeError(f"recipe {where}, {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"recipe {where}{line}: not YAML: {error.problem}") from error
    except RecursionError as error:
        raise RecipeError(f"recipe {where}: nested too deeply to be a recipe") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {where}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {where}: a recipe has the keys {', '.join(Recipe.model_fields)}; see recipes/")
    below = _extended(data, where, root, above)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        place, inner = _place(error, data)
        raise RecipeError(f"recipe {where}{place}: {explain(inner, Step if place else Recipe)}") from error
    recipe._root = root
    recipe._folder = below.folder if below else None
    return recipe


def _extended(data: dict[str, Any], where: str, root: Path, above: tuple[str, ...]) -> Recipe | None:
    """Insert the steps of the extended recipe before those of `data`; returns that recipe, or None."""
    name, steps = data.get("extends"), data.get("steps")
    if not isinstance(name, str) or not isinstance(steps, list):
        return None
    if where in above:
        raise RecipeError(f"recipe {where} extends itself; name another")
    below = load_recipe(name if name in builtin_recipes() else root / name, (*above, where))
    if "seed" in data:
        raise RecipeError(f"recipe {where}: the seed is that of '{name}', which it extends; leave it out")
    data["seed"] = below.seed
    data["steps"] = [step.model_dump() for step in below.steps] + steps
    return below


def builtin_recipes() -> dict[str, str]:
    """Name -> YAML text of the recipes in the package."""
    folder = importlib.resources.files("cogumi.pipeline") / "recipes"
    if not folder.is_dir():
        return {}
    files = [f for f in folder.iterdir() if f.name.endswith(".yaml")]
    return {f.name.removesuffix(".yaml"): f.read_text("utf-8") for f in files}


def load_recipe(source: str | Path, above: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe from a `.yaml` file, or a built-in one by name; `RecipeError` if it is invalid."""
    path = Path(source)
    if path.suffix not in (".yaml", ".yml") and len(path.parts) == 1:
        builtin = builtin_recipes()
        if path.name not in builtin:
            raise RecipeError(f"no built-in recipe is called '{path.name}'; {nearest(path.name, builtin)}")
        return parse_recipe(builtin[path.name], path.name, Path.cwd(), above)
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe file {path}; check the path") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error
    return parse_recipe(text, path.name, path.resolve().parent, above)
