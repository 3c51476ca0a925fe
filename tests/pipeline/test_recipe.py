"""`pipeline.recipe`: parsing, and one-line errors with the location and the nearest valid name."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.core import registry
from cogumi.core.errors import PackageError, RecipeError
from cogumi.pipeline.recipe import builtin_recipes, load_recipe, parse_recipe

GOOD = """
name: small
seed: 7
steps:
  - {name: data, stage: load, config: {path: rows.jsonl}}
  - name: base
    stage: sft
    inputs: {examples: data}
    gates: [{metric: loss, at_most: 2}, {metric: accuracy.math, at_least: 0.9, relative_to: data}]
"""


def test_recipe_file_is_read_with_paths_relative_to_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    recipe = load_recipe(path)
    assert (recipe.name, recipe.seed, recipe.root) == ("small", 7, tmp_path)
    data, base = recipe.steps
    assert data.config == {"path": "rows.jsonl"}
    assert base.inputs == {"examples": "data"}
    assert base.gates[1].relative_to == "data"
    assert load_recipe(str(path)) == recipe


def test_steps_may_be_listed_in_any_order():
    """They are sorted so that inputs come first, and otherwise keep the order of the file."""
    document = yaml.safe_load(GOOD)
    later = [{"name": "late", "stage": "s", "inputs": {"model": "base"}}, {"name": "alone", "stage": "s"}]
    document["steps"] = later + document["steps"][::-1]
    steps = parse_recipe(yaml.safe_dump(document), "x", Path()).steps
    assert [step.name for step in steps] == ["alone", "data", "base", "late"]
    compared = {"metric": "m", "at_least": 1, "relative_to": "b"}
    document["steps"] = [{"name": "a", "stage": "s", "gates": [compared]}, {"name": "b", "stage": "s"}]
    assert [step.name for step in parse_recipe(yaml.safe_dump(document), "x", Path()).steps] == ["b", "a"]


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_recipes_keep_their_order(name):
    recipe, below = load_recipe(name), yaml.safe_load(builtin_recipes()[name])
    assert [step.name for step in recipe.steps][-len(below["steps"]) :] == [step["name"] for step in below["steps"]]


STEP = "name: x\nsteps:\n  - {name: a, stage: s}\n"
WRONG = {
    "unknown key 'stesp'; did you mean 'steps'?": "name: x\nstesp: [{name: a, stage: s}]",
    "step 'base': unknown key 'stag'; did you mean 'stage'?": "name: x\nsteps: [{name: base, stag: s}]",
    "gates.0: unknown key 'at_lest'; did you mean 'at_least'?": STEP[:-2] + ", gates: [{metric: m, at_lest: 1}]}",
    "step 1: the key 'name' is missing": "name: x\nsteps: [{stage: s}]",
    "line 2: the key 'name' appears twice": "name: x\nname: y\nsteps: []",
    "line 3: the key 'stage' appears twice": "name: x\nsteps:\n  - {name: a, stage: s, stage: t}",
    "line 2: not YAML": "name: x\nsteps: [",
    "not YAML: unacceptable character": "\x00",
    "could not determine a constructor": "name: !!python/object/apply:os.getcwd []",
    "a recipe has the keys name, description, seed, extends, steps": "",
    "a recipe has the keys": "- 1",
    "nested too deeply": "[" * 2000,
    "name: string should match": "name: ../x\nsteps: [{name: a, stage: s}]",
    "step '../a': name: string should match": "name: x\nsteps: [{name: ../a, stage: s}]",
    "step 'a': there are two steps of this name": STEP + "  - {name: a, stage: s}",
    "input 'i' is not a step of this recipe: 'aa'; did you mean 'a'?": STEP
    + "  - {name: b, stage: s, inputs: {i: aa}}",
    "relative_to is not a step of this recipe: 'c'": STEP
    + "  - {name: b, stage: s, gates: [{metric: m, at_least: 1, relative_to: c}]}",
    "the steps form a cycle: 'b' needs 'b'; remove one of these inputs": STEP
    + "  - {name: b, stage: s, inputs: {i: b}}",
    "the steps form a cycle: 'c' needs 'd' and 'd' needs 'c'; remove one of these inputs": STEP
    + "  - {name: b, stage: s, inputs: {i: a, j: c}}\n  - {name: c, stage: s, inputs: {i: d}}\n"
    + "  - {name: d, stage: s, inputs: {i: a}, gates: [{metric: m, at_least: 1, relative_to: c}]}",
    "give either at_least or at_most": STEP[:-2] + ", gates: [{metric: m}]}",
    "seed: input should be a valid integer": "name: x\nseed: soon\nsteps: [{name: a, stage: s}]",
    "steps: list should have at least 1 item": "name: x\nsteps: []",
    "steps.0: input should be a valid dictionary": "name: x\nsteps: [3]",
}


@pytest.mark.parametrize(("message", "text"), WRONG.items(), ids=list(WRONG))
def test_invalid_recipe_is_refused_in_one_line(message, text):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "tiny.yaml", Path())
    assert str(caught.value).startswith("recipe tiny.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(
    st.text()
    | st.recursive(st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)).map(yaml.dump)
)
def test_any_text_gives_a_recipe_or_a_recipe_error(text):
    try:
        parse_recipe(text, "x", Path())
    except RecipeError as error:
        assert str(error).startswith("recipe x")  # noqa: PT017 - most texts raise, a few may not


def test_unreadable_recipe_files_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"there is no recipe file .*nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"name: \xff")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "x.yaml")


def test_builtin_recipes_are_found_by_name():
    for name in builtin_recipes():
        assert load_recipe(name).name == name
    with pytest.raises(RecipeError, match="no built-in recipe is called 'tinny'"):
        load_recipe("tinny")


def test_registry_error_contains_the_nearest_name():
    with pytest.raises(RecipeError, match="unknown stage 'tokeniser'; did you mean 'tokenizer'"):
        registry.stage("tokeniser")
    with pytest.raises(RecipeError, match="unknown engine 'remot'; did you mean 'remote'"):
        registry.engine("remot")


def test_registry_error_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "needy_stage.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.STAGES, "needy", "needy_stage")
    with pytest.raises(PackageError, match=r"no_such_package_anywhere.*cogumi\[build\]"):
        registry.stage("needy")
