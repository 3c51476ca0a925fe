"""Imports go down only (ARCHITECTURE), and what answers questions needs no build library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cogumi

ROOT = Path(cogumi.__file__).parent
GROUND = {
    "",
    "archive",
    "artifact",
    "bundle",
    "environment",
    "errors",
    "gates",
    "pictures",
    "ranks",
    "recipe",
    "registry",
    "shapes",
    "stage",
    "suite",
    "template",
    "types",
}
BUILD = {"ground", "models", "runtime", "torch_engine", "route", "data", "cascade"}  # data: its file formats
BELOW = {
    "ground": set(),
    "models": {"ground"},
    "runtime": {"ground"},
    "torch_engine": {"ground", "models", "runtime"},
    "route": {"ground"},
    "data": {"ground", "models"},
    "train": BUILD,
    "compress": BUILD | {"train"},  # it trains what it has cut
    "evaluate": BUILD,
    "pipeline": {"ground"},  # stages come through the registry
    "cascade": {"ground", "runtime", "route"},
    "serve": {"ground", "runtime", "route", "cascade"},
    "bench": {"ground", "runtime", "route", "cascade", "compress"},
    "cli": {"ground", "runtime", "route", "cascade", "serve", "data", "compress", "evaluate", "bench", "pipeline"},
}
HEAVY = {
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "sklearn",
    "scipy",
    "matplotlib",
    "gguf",
}


def name_of(path):
    return ".".join(["cogumi", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def layer(module):
    parts = module.split(".")[1:3]
    if parts == ["runtime", "engine"]:
        return "ground"  # the protocol that everybody speaks
    if parts == ["runtime", "torch_engine"]:
        return "torch_engine"
    first = parts[0] if parts else ""
    if first in GROUND:
        return "ground"
    return first if first in BELOW else "cli"  # what else lies on top belongs to the command line


def imported(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if deeper in MODULES else node.module


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    mine = layer(module)
    for target in imported(MODULES[module]):
        if target.split(".")[0] == "cogumi" and (theirs := layer(target)) != mine:
            assert theirs in BELOW[mine], f"{module} imports {target}"
        if target.split(".")[0] == "llama_cpp":
            assert module.startswith("cogumi.runtime.llama.")


def loaded_by(modules):
    code = f"import sys, {', '.join(modules)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_run_side_loads_no_build_library():
    run_side = [m for m in MODULES if layer(m) in ("runtime", "route", "cascade", "serve")]
    assert not loaded_by(run_side) & HEAVY


def test_ground_and_command_line_start_light():
    light = [m for m in MODULES if layer(m) in ("ground", "pipeline", "cli") and m != "cogumi.__main__"]
    assert not loaded_by(light) & (HEAVY | {"llama_cpp", "fastapi", "uvicorn"})
