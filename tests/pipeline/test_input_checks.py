"""Inputs are checked before any step runs, and `plan` and `build` report the same messages."""

import pytest
import yaml

from cogumi.core.errors import RecipeError
from cogumi.core.registry import stage
from cogumi.pipeline.build import build
from cogumi.pipeline.input_checks import input_problems
from cogumi.pipeline.plan.recipe_plan import plan
from cogumi.pipeline.recipe import builtin_recipes, load_recipe, parse_recipe


def problems_of(name, given, **config):
    module = stage(name)
    return list(input_problems(module, module.Config(**config), given))


def test_missing_input_is_named_with_the_given_ones():
    assert problems_of("tokenizer", {}) == ["the stage needs an input 'examples'; given: none"]
    assert problems_of("acceptance", {"data": "examples", "base": "gguf"}) == [
        "the stage needs an input 'draft_*'; given: data, base"
    ]


def test_input_of_another_kind_is_named_with_both_kinds():
    assert problems_of("tokenizer", {"examples": "model"}) == [
        "input 'examples' is of kind model, not examples; take another step's"
    ]
    assert problems_of("gguf", {"model": "model", "adapter": "examples"}) == [
        "input 'adapter' is of kind examples, not adapter or backbone or model; take another step's"
    ]


def test_unknown_input_is_named_with_the_nearest_role():
    assert problems_of("gguf", {"model": "model", "importnace": "importance"}) == [
        "the stage has no input 'importnace'; did you mean 'importance'?"
    ]


def test_input_of_unknown_kind_is_not_checked():
    assert problems_of("tokenizer", {"examples": None}) == []


def test_inputs_required_by_the_config():
    data, whole = {"examples": "examples"}, {"examples": "examples", "model": "model"}
    assert problems_of("sft", data, init="some/model") == []
    assert problems_of("sft", data) == ["the stage needs an input 'tokenizer'; given: examples"]
    assert problems_of("recover", whole) == []
    assert problems_of("recover", whole, by="rise") == ["the stage needs an input 'original'; given: examples, model"]
    assert problems_of("compress_adapter", whole | {"adapter": "adapter"}, loop={"steps": 2}) == [
        "the stage needs an input 'responses'; given: examples, model, adapter"
    ]
    assert problems_of("archive", {"model": "model"}) == []
    assert problems_of("archive", {}) == ["the stage needs an input 'bundle'; given: none"]


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_recipes_give_all_required_inputs(name):
    recipe = load_recipe(name)
    stages = {step.name: stage(step.stage) for step in recipe.steps}
    for step in recipe.steps:
        module = stages[step.name]
        given = {role: stages[parent].KIND for role, parent in step.inputs.items()}
        assert not list(input_problems(module, module.Config.model_validate(step.config), given)), step.name


WRONG = (
    ({"examples": "data", "tokeniser": "data"}, "the stage needs an input 'tokenizer'"),
    ({"examples": "data", "tokenizer": "data"}, "input 'tokenizer' is of kind examples, not tokenizer"),
)


@pytest.mark.parametrize(("inputs", "message"), WRONG)
def test_plan_and_build_refuse_with_the_same_message_before_any_step(tmp_path, inputs, message):
    steps = [{"name": "data", "stage": "world"}, {"name": "base", "stage": "sft", "inputs": inputs}]
    recipe = parse_recipe(yaml.safe_dump({"name": "mine", "steps": steps}), "mine", tmp_path)
    problem = plan(recipe).problems[0]
    assert problem.startswith(f"step 'base': {message}")
    with pytest.raises(RecipeError) as refused:
        build(recipe, tmp_path / "runs")
    assert str(refused.value) == f"recipe mine, {problem}"
    assert not (tmp_path / "runs").exists()
