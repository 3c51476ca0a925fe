"""The planner: exact counts, memory that real training takes, and every problem in a line of its own."""

import importlib.resources
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config
from typer.testing import CliRunner

from cogumi.cli import app
from cogumi.core.amounts import parse_bytes
from cogumi.core.errors import ArtifactError, RecipeError
from cogumi.core.registry import STAGES, stage
from cogumi.core.shapes import KNOWN, ModelShape, find_shape, known, shape_of
from cogumi.models.folders import load, parameters
from cogumi.models.lora import LoraShape, attach
from cogumi.pipeline.plan.footprint import Training, footprint
from cogumi.pipeline.plan.inputs import NEEDS
from cogumi.pipeline.plan.row_lengths import OWN_TEMPLATE, file_sizes, world_sizes
from cogumi.pipeline.plan.training_cost import Hardware, plan
from cogumi.pipeline.recipe import builtin_recipes, load_recipe, parse_recipe
from support.real import llama3, qwen2

PUBLISHED = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
}
MARGIN = 0.15
"""How far the planned peak may lie from the measured one, as a share of it."""
TARGETS = tuple(KNOWN["Llama-3.2-1B"].linear)


# --- shapes ---


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_are_published(name):
    assert find_shape(name, Path("/nowhere")).parameters == PUBLISHED[name]


@given(st.integers(1, 4), st.sampled_from([(2, 1), (4, 2), (4, 4)]), st.booleans(), st.booleans(), st.integers(8, 200))
@settings(max_examples=25, deadline=None)
def test_a_shape_counts_what_transformers_builds(layers, heads, tied, qwen, vocabulary):
    kind = Qwen2Config if qwen else LlamaConfig
    config = kind(
        vocab_size=vocabulary,
        hidden_size=32 * heads[0],
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.architectures = ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_of(config.to_dict(), "here").parameters == parameters(model)


def test_a_folder_is_read_and_its_adapter_counted(tmp_path):
    for folder in (llama3(tmp_path / "llama", tied=False), qwen2(tmp_path / "qwen")):
        shape = find_shape(folder.name, tmp_path)
        model = load(folder)
        assert shape.parameters == parameters(model)
        adapted = attach(model, LoraShape(rank=6, ranks={"up_proj": 3}), 0)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert shape.adapter_parameters(dict.fromkeys(TARGETS, 6) | {"up_proj": 3}) == trained


def test_what_has_no_known_shape_is_refused_with_the_nearest(tmp_path):
    assert known("someone/Meta-Llama-3.1-8B-Instruct") == "Llama-3.1-8B"
    with pytest.raises(ArtifactError, match=r"neither a model folder .* did you mean 'Llama-3.1-8B'\?"):
        find_shape("meta-llama/Llama-3.1-80B", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GemmaForCausalLM"]}))
    with pytest.raises(ArtifactError, match="GemmaForCausalLM; supported: LlamaForCausalLM, Qwen2ForCausalLM"):
        find_shape(".", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        find_shape(".", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ArtifactError, match="lacks 'hidden_size'"):
        find_shape(".", tmp_path)


# --- memory ---

CHILD = """
import json, re, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from cogumi.models.lora import LoraShape, attach
from cogumi.stage import Context
from cogumi.models.text import Row
from cogumi.train.loop import LoopConfig, train
from cogumi.train.losses import answer_loss

torch.set_num_threads(1)
out, shape, length, answer, cases = json.loads(sys.argv[1])

def run(config, rows, out, lora, loop):
    model = LlamaForCausalLM(LlamaConfig(**config))
    if lora:
        model = attach(model, LoraShape(rank=lora, alpha=1), 0)
    train(model, rows, answer_loss, LoopConfig(**loop), Path(out), Context(0, 1, Path(), lambda *_: None))

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

small = shape | dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64, head_dim=8)
ids = tuple(i % 60 for i in range(length))
for number, case in enumerate(cases):
    run(small, [Row((1, 2, 3), 1)] * 16, f"{out}/small{number}", *case)  # everything is imported and warm
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run(shape, [Row(ids, length - answer)] * 64, f"{out}/real{number}", *case)
    print(status("VmHWM") - before)
"""
SHAPE = ModelShape(256, 768, 6, 4, 2, 64, 8000, 512, tied=True)


def measured(tmp_path, shape, length, answer, cases):
    """Bytes that two steps of training really take at most, for each (rank of a LoRA, loop), in a child process."""
    config = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
    }
    always = {"steps": 2, "evaluate_every": 9, "checkpoint_every": 9}
    asked = [str(tmp_path), config, length, answer, [(lora, always | loop) for lora, loop in cases]]
    # malloc must give back what is freed, or its own habits are measured
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    command = [sys.executable, "-c", CHILD, json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peak memory")
def test_training_takes_the_memory_that_was_planned(tmp_path):
    size = {"rows": 8, "length": 96, "answer": 32, "fused": False}
    planned = [
        footprint(Training(SHAPE, **size, **options)).peak
        for options in ({}, {"ranks": dict.fromkeys(TARGETS, 16)}, {"recompute": True, "parts": 2})
    ]
    cases = [(0, {"batch": 8}), (16, {"batch": 8}), (0, {"batch": 16, "accumulate": 2, "gradient_checkpointing": True})]
    taken = measured(tmp_path, SHAPE, 96, 32, cases)
    for said, took in zip(planned, taken, strict=True):
        assert abs(said - took) < MARGIN * took, (planned, taken)


def test_every_way_of_saving_memory_saves_some():
    shape = KNOWN["Llama-3.1-8B"]
    ranks = dict.fromkeys(TARGETS, 64)
    size = {"rows": 8, "length": 1024, "answer": 256}
    peak = {
        name: footprint(Training(shape, **(size | options))).peak
        for name, options in {
            "full": {},
            "lora": {"ranks": ranks},
            "qlora": {"ranks": ranks, "nf4": True},
            "less": {"ranks": ranks, "nf4": True, "bf16": True, "recompute": True},
            "parts": {"ranks": ranks, "nf4": True, "bf16": True, "recompute": True, "rows": 2, "parts": 4},
        }.items()
    }
    assert list(peak.values()) == sorted(peak.values(), reverse=True)
    assert peak["parts"] < 24e9 < 80e9 < peak["full"]  # what QLoRA is for
    four = footprint(Training(shape, **size, gpus=4))
    assert four.optimizer == footprint(Training(shape, **size)).optimizer // 4


def test_sizes_of_memory_are_read():
    assert parse_bytes("80GB") == 80 * 10**9
    assert parse_bytes("1.5 GiB") == 3 * 2**29
    for wrong in ("80", "GB", "80 gigabytes", "-1GB"):
        with pytest.raises(RecipeError, match="write it like 80GB"):
            parse_bytes(wrong)


# --- recipes ---


@pytest.mark.parametrize("name", ["small", "cogumi-8b", "laptop-890mb"])
def test_the_recipes_for_real_models_have_nothing_in_the_way(name):
    found = plan(load_recipe(name), Hardware(memory=parse_bytes("80GB")))
    assert not found.problems
    assert [step.name for step in found.steps] == [step.name for step in load_recipe(name).steps]
    for step in found.steps:
        if step.steps:
            assert step.memory.peak < 80e9
            assert 0 < step.trained <= step.parameters + step.shape.hidden + 1
            assert min(step.tokens, step.flops, step.output, step.checkpoint) > 0


def test_the_plan_of_tiny_is_what_was_built():
    """Parameters as in the figures of the finished build: 984,192 of the base, 320,065 of the draft."""
    steps = {step.name: step for step in plan(load_recipe("tiny")).steps}
    assert steps["base"].trained == 984_192
    assert steps["draft"].trained == 320_065
    assert steps["math"].trained == 307_200
    assert not steps["base"].needs_gpu


def test_rows_are_measured(tmp_path):
    rows = world_sizes(stage("world").Config()).rows(OWN_TEMPLATE)
    assert 10 < rows.answer < rows.longest < 200
    assert rows.mean < rows.longest
    lines = [{"instruction": "x" * 300, "output": "y" * 90}, {"instruction": "x" * 30, "output": "y" * 9}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = stage("files").Config(files={"code": ["a.jsonl"]})
    sizes = file_sizes(config, tmp_path)
    assert (sizes.longest, sizes.answer, sizes.mean) == (390, 90, 214.5)
    assert sizes.rows(10).longest == 140
    assert sizes.rows(10, length=50).longest == 50


BASE = {"name": "base", "stage": "sft", "inputs": {"examples": "data"}, "config": {"init": "Qwen/Qwen2.5-0.5B"}}
DATA = {"name": "data", "stage": "world"}
RESPONSES = {"name": "responses", "stage": "respond", "inputs": {"examples": "data", "model": "base"}}
TAUGHT = {"examples": "data", "responses": "responses", "model": "base"}


def problems(tmp_path, *steps, **options):
    document = yaml.safe_dump({"name": "mine", "steps": list(steps)})
    return plan(parse_recipe(document, "mine", tmp_path), **options).problems


def changed(step, **config):
    return step | {"config": step.get("config", {}) | config}


def test_each_problem_is_told_in_a_line(tmp_path):
    def one(*steps, **options):
        (line,) = problems(tmp_path, *steps, **options)
        assert "\n" not in line
        return line

    assert not problems(tmp_path, DATA, BASE)
    assert re.search("'base': 'a/b' is neither a model folder", one(DATA, changed(BASE, init="a/b")))
    assert re.search("unknown key 'lorra'; did you mean 'lora'", one(DATA, changed(BASE, lorra={})))
    assert re.search("unknown stage 'sfd'; did you mean 'sft'", one(DATA, BASE | {"stage": "sfd"}))
    lora = {"targets": ["q_proj", "qkv_proj"]}
    assert re.search("LoRA target 'qkv_proj' is no layer .* 'v_proj'", one(DATA, changed(BASE, lora=lora)))
    assert re.search("rows have about 40000 tokens, .* context is 32768", one(DATA, BASE, length=40_000))
    assert re.search("needs an input 'examples'; given: none", one(DATA, BASE | {"inputs": {}}))
    assert re.search(
        "'examples' is of kind model, not examples",
        one(DATA, BASE, BASE | {"name": "two", "inputs": {"examples": "base"}}),
    )
    files = {"name": "data", "stage": "files", "config": {"files": {"code": ["mine.jsonl"]}}}
    assert re.search(r"there is no file .*mine\.jsonl", one(files, BASE))


def test_the_inputs_of_stages_that_compress_are_checked(tmp_path):
    def told(stage, inputs, **config):
        step = {"name": "made", "stage": stage, "inputs": inputs, "config": config}
        return problems(tmp_path, DATA, BASE, step)

    whole = {"examples": "data", "model": "base"}
    for name in ("awq", "gptq", "trim", "prune", "shrink", "importance", "recover"):
        assert not told(name, whole)
        for role in whole:
            (line,) = told(name, {role: whole[role]})
            assert f"the stage needs an input '{({*whole} - {role}).pop()}'" in line
    assert not told("archive", {"model": "base"})
    assert re.search("needs an input 'bundle'; given: none", told("archive", {})[0])
    assert re.search("'bundle' is of kind model, not bundle", told("archive", {"bundle": "base"})[0])
    chain = told("chain", {"data": "data", "whole": "base"}, steps=["whole", "small"])
    assert re.search("'whole' is of kind model, not gguf", chain[0])
    assert re.search("needs an input 'small'", chain[1])


def test_what_is_not_planned_is_said():
    steps = {step.name: step for step in plan(load_recipe("compression")).steps}
    assert steps["pruned"].steps == 60
    for name in ("pruned", "trimmed", "scaled", "importance", "chain"):
        assert steps[name].notes[0].startswith("not planned: "), name
    assert not steps["small"].notes
    assert not steps["base"].notes


def test_memory_beyond_the_gpu_is_a_problem_that_sharding_and_adapters_solve(tmp_path):
    big = changed(BASE, init="meta-llama/Llama-3.1-8B-Instruct", loop={"batch": 8})
    card = Hardware(memory=parse_bytes("80GB"))
    (line,) = problems(tmp_path, DATA, big, hardware=card)
    assert re.search(r"takes \d+\.\d GB on each GPU, and there are 80\.0; try .*`lora`", line)
    assert not problems(tmp_path, DATA, big, hardware=Hardware(card.memory, gpus=4))
    assert not problems(tmp_path, DATA, changed(big, lora={}), hardware=card)


def test_a_draft_of_another_tokenizer_is_bridged_or_refused(tmp_path):
    draft = {"name": "draft", "stage": "draft", "inputs": TAUGHT, "config": {"init": "Llama-3.2-1B"}}
    document = yaml.safe_dump({"name": "mine", "steps": [DATA, BASE, RESPONSES, draft]})
    found = plan(parse_recipe(document, "mine", tmp_path))
    assert not found.problems
    assert re.search(
        "tokenizer Llama, the base's is Qwen2.5: the runtime drafts through text", found.steps[-1].notes[0]
    )
    folder = qwen2(tmp_path / "mine")
    own = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(own | {"pre_tokenizer": None, "decoder": None}))
    (line,) = problems(tmp_path, DATA, BASE, RESPONSES, changed(draft, init="mine"))
    assert re.search("is none over bytes, so drafts cannot be bridged", line)
    (folder / "tokenizer.json").unlink()
    (line,) = problems(tmp_path, DATA, changed(BASE, init="mine"))
    assert "has no tokenizer.json" in line


def test_the_inputs_that_stages_need_are_those_they_ask_for():
    for name, roles in NEEDS.items():
        source = Path(stage(name).__file__).read_text()
        for role in roles:
            assert role in source, (name, role)
    assert set(NEEDS) <= set(STAGES)


def test_presets_of_domains_are_modifiers_that_can_be_copied():
    text = (importlib.resources.files("cogumi") / "recipes" / "domains" / "modifiers.yaml").read_text("utf-8")
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


def test_the_command_shows_checks_and_prints_json():
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


def test_validation_is_planned_as_it_is_done():
    from cogumi.engine import torch
    from cogumi.pipeline.plan import training_cost
    from cogumi.train import validation

    assert training_cost.VALIDATED == validation.TOKENS
    assert training_cost.ASKED == torch.ROWS
