"""Finds the recipe or model that a plan is about (SPEC D1)."""

from __future__ import annotations

from pathlib import Path

from cogumi.compress.gguf.planned_files import known_weights, weights_of_folder, weights_of_gguf
from cogumi.compress.pack.bundle_parts import Parts
from cogumi.core.errors import ArtifactError
from cogumi.core.facts import ModelFacts
from cogumi.core.registry import nearest
from cogumi.core.shapes import KNOWN, find_shape, known
from cogumi.pipeline.recipe import Recipe, builtin_recipes, load_recipe

CONFIG, GGUF = "config.json", ".gguf"


def look_up(name: str) -> Recipe | Parts:
    """A recipe by its built-in name or YAML file; or a model by a known name, a folder, its config.json or a GGUF file.

    Raises `RecipeError` or `ArtifactError` with the closest names if there is neither.
    """
    path = Path(name)
    if name in builtin_recipes() or path.suffix in (".yaml", ".yml"):
        return load_recipe(name)
    if path.suffix == GGUF:
        return Parts(path.name, weights_of_gguf(path))
    folder = path.parent if path.name == CONFIG else path
    if (folder / CONFIG).exists():
        shape = find_shape(str(folder), Path())
        return Parts(folder.resolve().name, weights_of_folder(ModelFacts(shape, name, folder=str(folder))))
    short = known(name)
    if short is None:
        hint = nearest(name.rsplit("/", 1)[-1], [*builtin_recipes(), *KNOWN])
        raise ArtifactError(f"'{name}' is not a recipe, a folder with a {CONFIG} or a model of known shape; {hint}")
    return Parts(short, known_weights(KNOWN[short]))
