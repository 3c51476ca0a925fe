"""A recipe built by two processes: rank 0 writes, the other rank takes part in training."""

import json
import subprocess
import sys

import torch
from safetensors.torch import load_file

RECIPE = """
name: two
steps:
  - name: data
    stage: world
    config: {train: 12, selection: 2, fit: 1, threshold: 1, heldout: 1, unanswerable: 1}
  - {name: tokenizer, stage: tokenizer, inputs: {examples: data}}
  - name: base
    stage: sft
    inputs: {examples: data, tokenizer: tokenizer}
    config:
      shape: {hidden: 32, layers: 1, heads: 1, feed_forward: 64}
      loop: {steps: 12, batch: 16, lr: 0.01, evaluate_every: 4, checkpoint_every: 5}
  - {name: exported, stage: gguf, inputs: {model: base}}
"""
LAUNCH = (
    "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip


def build(folder, launcher=(), recipe=RECIPE):
    """Exit status, stdout and stderr of `cogumi build`."""
    (folder / "two.yaml").write_text(recipe)
    command = [sys.executable, *launcher, "-m", "cogumi", "build", folder / "two.yaml", "--runs", folder / "runs"]
    done = subprocess.run([*map(str, command), "--json"], capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_two_processes_give_the_result_of_one(tmp_path):
    for name, launcher in (("one", ()), ("both", LAUNCH)):
        (tmp_path / name).mkdir()
        code, out, error = build(tmp_path / name, launcher)
        assert code == 0, error[-3000:]
        assert json.loads(out)["recipe"] == "two"  # one report, by rank 0
    one, both = (tmp_path / name / "runs" / "two" for name in ("one", "both"))
    # the other rank leaves no files
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in both.iterdir())
    ours, theirs = (load_file(path / "base" / "model.safetensors") for path in (one, both))
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], atol=2e-3)
    code, out, _ = build(tmp_path / "both", LAUNCH)
    assert code == 0
    assert all(step["skipped"] for step in json.loads(out)["steps"])  # no rank waits for a finished step


def test_failure_ends_all_processes(tmp_path):
    code, out, error = build(tmp_path, LAUNCH, RECIPE.replace("lr: 0.01", "lr: 1.0e+30"))
    assert code != 0
    assert "step 'base'" in out + error
    assert "at step" in out + error
