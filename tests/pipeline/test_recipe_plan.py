"""The plan of a recipe: figures of every step, and one line for every problem."""

import importlib.resources
import json
import re
from dataclasses import replace

import pytest
import yaml
from typer.testing import CliRunner

from cogumi.cli.main import app
from cogumi.core.amounts import parse_bytes
from cogumi.core.estimate import Given, Hardware, Input, estimate
from cogumi.core.facts import OWN_TEMPLATE
from cogumi.core.registry import stage
from cogumi.pipeline.plan.recipe_plan import plan
from cogumi.pipeline.recipe import builtin_recipes, load_recipe, parse_recipe
from support.real import qwen2


@pytest.mark.parametrize("name", ["small", "cogumi-8b", "laptop-890mb"])
def test_recipes_for_published_models_have_no_problems(name):
    found = plan(load_recipe(name), Hardware(memory=parse_bytes("80GB")))
    assert not found.problems
    assert [step.name for step in found.steps] == [step.name for step in load_recipe(name).steps]
    for step in found.steps:
        if step.cost.steps:
            assert step.cost.memory.peak < 80e9
            assert 0 < step.cost.trained <= step.cost.parameters + step.cost.shape.hidden + 1
            assert min(step.cost.tokens, step.cost.flops, step.cost.output, step.cost.checkpoint) > 0


def test_plan_of_tiny_equals_the_build():
    """Parameter counts of the finished build: 984,192 for the base, 320,065 for the draft."""
    steps = {step.name: step for step in plan(load_recipe("tiny")).steps}
    assert steps["base"].cost.trained == 984_192
    assert steps["draft"].cost.trained == 320_065
    assert steps["math"].cost.trained == 307_200
    assert not steps["base"].cost.needs_gpu


def facts_of(name, root, **config):
    """The rows that a stage without inputs declares."""
    (rows,) = estimate(stage(name), stage(name).Config(**config), Given("data", root)).facts
    return rows


def test_rows_of_files_are_measured(tmp_path):
    rows = facts_of("world", tmp_path).rows(OWN_TEMPLATE)
    assert 10 < rows.answer < rows.longest < 200
    assert rows.mean < rows.longest
    lines = [{"instruction": "x" * 300, "output": "y" * 90}, {"instruction": "x" * 30, "output": "y" * 9}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sizes = facts_of("load", tmp_path, files={"code": ["a.jsonl"]})
    assert (sizes.longest, sizes.answer, sizes.mean) == (390, 90, 214.5)
    assert sizes.rows(10).longest == 140
    assert sizes.rows(10, length=50).longest == 50
    given = Given("data", tmp_path, {"pool": Input("mine", (replace(sizes, count=200),))})
    assert estimate(stage("split"), stage("split").Config(train=52), given).facts == (replace(sizes, count=113),)


BASE = {"name": "base", "stage": "sft", "inputs": {"examples": "data"}, "config": {"init": "Qwen/Qwen2.5-0.5B"}}
DATA = {"name": "data", "stage": "world"}
BASE_GGUF = {"name": "base_gguf", "stage": "gguf", "inputs": {"model": "base"}}
RESPONSES = {"name": "responses", "stage": "respond", "inputs": {"examples": "data", "model": "base_gguf"}}
TAUGHT = {"examples": "data", "responses": "responses", "model": "base"}


def problems(tmp_path, *steps, **options):
    document = yaml.safe_dump({"name": "mine", "steps": list(steps)})
    return plan(parse_recipe(document, "mine", tmp_path), **options).problems


def changed(step, **config):
    return step | {"config": step.get("config", {}) | config}


def test_too_long_row_is_named_once_with_file_line_and_key(tmp_path):
    rows = [{"question": "short", "answer": "x"}, {"question": "word " * 700, "answer": "y"}]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool = {"name": "pool", "stage": "load", "config": {"files": {"facts": ["facts.jsonl"]}}}
    data = {"name": "data", "stage": "split", "inputs": {"pool": "pool"}}
    tokenizer = {"name": "tokenizer", "stage": "tokenizer", "inputs": {"examples": "data"}}
    own = {"name": "base", "stage": "sft", "inputs": {"examples": "data", "tokenizer": "tokenizer"}}
    draft = {"name": "draft", "stage": "draft", "inputs": TAUGHT}
    (line,) = problems(tmp_path, pool, data, tokenizer, own, BASE_GGUF, RESPONSES, draft)
    assert re.fullmatch(
        r"step 'base': the longest row \(facts.jsonl:2\) has about \d+ tokens, the context is 512; "
        r"shorten it or raise `shape.context`",
        line,
    )


def test_draft_larger_than_its_base_is_a_problem(tmp_path):
    tokenizer = {"name": "tokenizer", "stage": "tokenizer", "inputs": {"examples": "data"}}
    own = {"name": "base", "stage": "sft", "inputs": {"examples": "data", "tokenizer": "tokenizer"}}
    large = {"name": "draft", "stage": "draft", "inputs": TAUGHT, "config": {"shape": {"layers": 40}}}
    (line,) = problems(tmp_path, DATA, tokenizer, own, BASE_GGUF, RESPONSES, large)
    assert re.search(r"the draft has [\d,]+ weights, more than the base with [\d,]+; give a smaller `shape`", line)
    assert not problems(tmp_path, DATA, tokenizer, own, BASE_GGUF, RESPONSES, changed(large, shape={"layers": 1}))


def test_each_problem_is_reported_in_one_line(tmp_path):
    def one(*steps, **options):
        (line,) = problems(tmp_path, *steps, **options)
        assert "\n" not in line
        return line

    assert not problems(tmp_path, DATA, BASE)
    assert re.search("'base': 'a/b' is neither a model folder", one(DATA, changed(BASE, init="a/b")))
    assert re.search("unknown key 'lorra'; did you mean 'lora'", one(DATA, changed(BASE, lorra={})))
    assert re.search("unknown stage 'sfd'; did you mean 'sft'", one(DATA, BASE | {"stage": "sfd"}))
    lora = {"targets": ["q_proj", "qkv_proj"]}
    assert re.search("LoRA target 'qkv_proj' is not a layer .* 'v_proj'", one(DATA, changed(BASE, lora=lora)))
    assert re.search(
        "longest row has about 40000 tokens, .* context is 32768; .* or choose another model",
        one(DATA, BASE, length=40_000),
    )
    assert re.search("needs an input 'examples'; given: none", one(DATA, BASE | {"inputs": {}}))
    assert re.search(
        "'examples' is of kind model, not examples",
        one(DATA, BASE, BASE | {"name": "two", "inputs": {"examples": "base"}}),
    )
    files = {"name": "mine", "stage": "load", "config": {"files": {"code": ["mine.jsonl"]}}}
    sets = {"name": "data", "stage": "split", "inputs": {"pool": "mine"}}
    assert re.search(r"there is no file .*mine\.jsonl", one(files, sets, BASE))
    wrong = {"name": "other", "stage": "split", "inputs": {"pool": "data"}}
    assert re.search("'pool' is of kind examples, not pool", one(DATA, wrong))


def test_inputs_of_compression_stages_are_checked(tmp_path):
    def problems_of(stage, inputs, **config):
        step = {"name": "made", "stage": stage, "inputs": inputs, "config": config}
        return problems(tmp_path, DATA, BASE, step)

    whole = {"examples": "data", "model": "base"}
    for name in ("awq", "gptq", "trim", "prune", "shrink", "importance", "recover"):
        assert not problems_of(name, whole)
        for role in whole:
            (line,) = problems_of(name, {role: whole[role]})
            assert f"the stage needs an input '{({*whole} - {role}).pop()}'" in line
    assert not problems_of("archive", {"model": "base"})
    assert re.search("needs an input 'bundle'; given: none", problems_of("archive", {})[0])
    assert re.search("'bundle' is of kind model, not bundle", problems_of("archive", {"bundle": "base"})[0])
    chain = problems_of("chain", {"data": "data", "whole": "base"}, steps=["whole", "small"])
    assert re.search("needs an input 'small'", chain[0])
    assert re.search("'whole' is of kind model, not gguf", chain[1])


def test_steps_without_a_cost_model_are_listed():
    steps = {step.name: step for step in plan(load_recipe("compression")).steps}
    assert steps["pruned"].cost.steps == 60
    for name in ("pruned", "trimmed", "scaled", "importance", "chain"):
        assert steps[name].notes[0].startswith("not planned: "), name
    assert not steps["small"].notes
    assert not steps["base"].notes


def test_memory_beyond_the_gpu_is_a_problem_solved_by_sharding_or_adapters(tmp_path):
    big = changed(BASE, init="meta-llama/Llama-3.1-8B-Instruct", loop={"batch": 8})
    card = Hardware(memory=parse_bytes("80GB"))
    (line,) = problems(tmp_path, DATA, big, hardware=card)
    assert re.search(r"takes \d+\.\d GB on each GPU, and there are 80\.0; try .*`lora`", line)
    assert not problems(tmp_path, DATA, big, hardware=Hardware(card.memory, gpus=4))
    assert not problems(tmp_path, DATA, changed(big, lora={}), hardware=card)


def test_draft_with_another_tokenizer_is_bridged_or_refused(tmp_path):
    draft = {"name": "draft", "stage": "draft", "inputs": TAUGHT, "config": {"init": "Llama-3.2-1B"}}
    document = yaml.safe_dump({"name": "mine", "steps": [DATA, BASE, BASE_GGUF, RESPONSES, draft]})
    found = plan(parse_recipe(document, "mine", tmp_path))
    assert not found.problems
    assert re.search("tokenizer Llama, the base's is Qwen2.5: the engine drafts through text", found.steps[-1].notes[0])
    folder = qwen2(tmp_path / "mine")
    own = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(own | {"pre_tokenizer": None, "decoder": None}))
    (line,) = problems(tmp_path, DATA, BASE, BASE_GGUF, RESPONSES, changed(draft, init="mine"))
    assert re.search("is not byte-level, so drafts cannot be bridged", line)
    (folder / "tokenizer.json").unlink()
    (line,) = problems(tmp_path, DATA, changed(BASE, init="mine"))
    assert "has no tokenizer.json" in line


def test_domain_presets_can_be_copied_as_modifiers():
    text = (importlib.resources.files("cogumi.pipeline") / "recipes" / "domains" / "modifiers.yaml").read_text("utf-8")
    presets = {s["name"]: stage("modifier").Config.model_validate(s["config"]) for s in yaml.safe_load(text)["steps"]}
    assert {name: presets[name].lora.rank for name in ("code", "reasoning", "automation", "code_light")} == {
        "code": 128,
        "reasoning": 112,
        "automation": 96,
        "code_light": 32,
    }
    assert "modifiers" not in builtin_recipes()


# --- the command ---


def cogumi(*words, **options):
    return CliRunner().invoke(app, ["plan", *words], **options)


def test_command_shows_checks_and_prints_json():
    done = cogumi("cogumi-8b", "--check", "--gpu-memory", "80GB", "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    base = found["steps"][1]
    assert (base["name"], base["method"], base["needs_gpu"]) == ("base", "QLoRA nf4", True)
    assert base["parameters"] == 8_030_261_248
    assert base["shape"]["vocabulary"] == 128_256
    assert found["problems"] == []
    short = cogumi("cogumi-8b", "--check", "--gpu-memory", "8GB")
    assert short.exit_code == 1
    assert all(line.startswith("step '") for line in short.stderr.splitlines())
    assert not short.stdout
    shown = cogumi("cogumi-8b", env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "QLoRA nf4" in shown.stdout
    assert "8.03B" in shown.stdout
