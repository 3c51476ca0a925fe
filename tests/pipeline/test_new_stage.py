"""A new stage is one file and one row: this module is such a stage, planned and built beside the others."""

import yaml
from pydantic import BaseModel, ConfigDict, Field

from cogumi.core import registry
from cogumi.core.artifact import load
from cogumi.core.estimate import Cost, Estimate
from cogumi.core.facts import RowFacts
from cogumi.data.examples import SPLITS, read_examples, split_path, write_examples
from cogumi.pipeline.build import build
from cogumi.pipeline.plan.recipe_plan import plan
from cogumi.pipeline.recipe import parse_recipe

VERSION = 1
KIND = "examples"
INPUTS = {"examples": "examples"}


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")
    longest: int = Field(60, ge=1)


def estimate(config, given):
    """Rows no longer than asked."""
    rows = given.find("examples", RowFacts)
    if rows is None:
        return Estimate()
    left = RowFacts(rows.count, min(rows.longest, config.longest), rows.answer, min(rows.mean, config.longest))
    return Estimate((left,), Cost("filter", output=config.longest * rows.count), notes=("keeps short rows",))


def run(config, inputs, out, context):
    kept = 0
    for name in SPLITS:
        rows = read_examples(split_path(inputs["examples"].path, name))
        short = [e for e in rows if len((e.messages[-1].content + e.answer).encode()) <= config.longest]
        write_examples(split_path(out, name), short)
        kept += len(short)
    return {"rows": kept}


def test_it_is_planned_and_built_without_touching_anything_else(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.STAGES, "short", __name__)
    steps = [
        {"name": "data", "stage": "world", "config": dict.fromkeys((*SPLITS, "unanswerable"), 2)},
        {"name": "less", "stage": "short", "inputs": {"examples": "data"}, "config": {"longest": 50}},
        {"name": "words", "stage": "tokenizer", "inputs": {"examples": "less"}, "config": {"vocabulary": 300}},
        {"name": "base", "stage": "sft", "inputs": {"examples": "less", "tokenizer": "words"}},
    ]
    recipe = parse_recipe(yaml.safe_dump({"name": "mine", "steps": steps}), "mine", tmp_path)
    planned = plan(recipe)
    assert not planned.problems
    by_name = {step.name: step for step in planned.steps}
    assert by_name["less"].cost.method == "filter"
    assert by_name["less"].notes == ("keeps short rows",)
    assert planned.known(RowFacts)["less"].longest == 50
    assert planned.known(RowFacts)["data"].longest > 50
    assert by_name["base"].cost.tokens < 64 * 500 * (6 + 50 / 3)  # batch, steps, tokens of the longest row

    built = parse_recipe(yaml.safe_dump({"name": "mine", "steps": steps[:3]}), "mine", tmp_path)
    report = build(built, tmp_path / "runs")
    kept = {row["name"]: row["metrics"] for row in report["steps"]}["less"]["rows"]
    assert 0 < kept < sum(load(tmp_path / "runs/mine/data").metrics["rows"].values())
