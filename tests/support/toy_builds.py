"""Recipes of toy stages, their builds in separate processes, and the files of a build."""

import json
import os
import subprocess
import sys
from pathlib import Path

from cogumi.core import artifact
from cogumi.core.files import sha256
from cogumi.pipeline.recipe import parse_recipe
from support.waiting import PATIENCE


def recipe(*steps, root=Path(), seed=0):
    return parse_recipe(json.dumps({"name": "small", "seed": seed, "steps": steps}), "small", root)


def step(name, stage="toy", inputs=None, gates=(), **config):
    return {"name": name, "stage": stage, "inputs": inputs or {}, "gates": list(gates), "config": config}


def contents(home):
    """The hash of every file below a folder; of manifests, which contain times, only the list of files."""
    found = {}
    for path in home.rglob("*"):
        if path.name == "manifest.json":
            found[path.relative_to(home)] = artifact.read_manifest(path.parent).files
        elif path.is_file() and path.name not in ("report.json", ".lock"):
            found[path.relative_to(home)] = sha256(path)
    return found


def start(path, runs, jobs=1, kill_at="never", **limits):
    """Start a build in a separate process that is killed at the first point that matches `kill_at`."""
    command = [sys.executable, "-m", "support.toy", str(path), str(runs), str(jobs)]
    environment = os.environ | {"KILL_AT": kill_at}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **limits
    )


def write_recipe(folder, *steps):
    path = folder / "small.yaml"
    path.write_text(json.dumps({"name": "small", "steps": steps}))
    return path


def finish(process):
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err
