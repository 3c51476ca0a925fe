"""A new stage is one file and one row: this module is a filter between `load` and `split`, planned and built."""

import json

import yaml
from pydantic import BaseModel, ConfigDict, Field

from cogumi.core import registry
from cogumi.core.artifact import load
from cogumi.core.estimate import Cost, Estimate
from cogumi.core.facts import RowFacts
from cogumi.data.examples import POOL, SPLITS, iterate_examples, read_examples, split_path, write_examples
from cogumi.pipeline.build import build
from cogumi.pipeline.plan.recipe_plan import plan
from cogumi.pipeline.recipe import parse_recipe

VERSION = 1
KIND = "pool"
INPUTS = {"pool": "pool"}


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")
    longest: int = Field(60, ge=1)


def estimate(config, given):
    """Rows of at most `longest` bytes."""
    rows = given.find("pool", RowFacts)
    if rows is None:
        return Estimate()
    left = RowFacts(rows.count, min(rows.longest, config.longest), rows.answer, min(rows.mean, config.longest))
    return Estimate((left,), Cost("filter", output=config.longest * rows.count), notes=("keeps short rows",))


def run(config, inputs, out, context):
    rows = iterate_examples(inputs["pool"].path / POOL)
    short = (e for e in rows if len((e.messages[-1].content + e.answer).encode()) <= config.longest)
    return {"rows": write_examples(out / POOL, short)}


def test_it_is_planned_and_built_without_touching_anything_else(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.STAGES, "short", __name__)
    steps = [
        {"name": "mine", "stage": "load", "config": {"files": {"math": ["rows.jsonl"]}}},
        {"name": "less", "stage": "short", "inputs": {"pool": "mine"}, "config": {"longest": 20}},
        {"name": "data", "stage": "split", "inputs": {"pool": "less"}},
        {"name": "words", "stage": "tokenizer", "inputs": {"examples": "data"}, "config": {"vocabulary": 300}},
        {"name": "base", "stage": "sft", "inputs": {"examples": "data", "tokenizer": "words"}},
    ]
    rows = [{"instruction": f"Add {i} to {i}{', please' * (i % 3)}.", "output": str(2 * i)} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parse_recipe(yaml.safe_dump({"name": "mine", "steps": steps}), "mine", tmp_path)
    planned = plan(recipe)
    assert not planned.problems
    by_name = {step.name: step for step in planned.steps}
    assert by_name["less"].cost.method == "filter"
    assert by_name["less"].notes == ("keeps short rows",)
    assert planned.known(RowFacts)["mine"].longest > planned.known(RowFacts)["less"].longest == 20
    assert by_name["base"].cost.tokens < 64 * 500 * (6 + 20 / 3)  # batch, steps, tokens of the longest row

    built = parse_recipe(yaml.safe_dump({"name": "mine", "steps": steps[:3]}), "mine", tmp_path)
    build(built, tmp_path / "runs")
    kept = load(tmp_path / "runs/mine/less").metrics["rows"]
    assert 0 < kept < 200
    assert sum(len(read_examples(split_path(tmp_path / "runs/mine/data", name))) for name in SPLITS) == kept
