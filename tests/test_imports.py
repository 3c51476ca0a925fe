"""Imports follow the order of ARCHITECTURE.md, and the run side loads no build library."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cogumi

ROOT = Path(cogumi.__file__).parent
RUN = {"core", "bundle", "confidence", "engine", "cascade"}
LEARN = RUN | {"grading", "data", "models", "torch"}
BELOW = {
    # ground
    "core": set(),
    "bundle": {"core"},
    # run side: no torch, nothing of the build side
    "confidence": {"core"},
    "engine": {"core"},
    "cascade": {"core", "bundle", "confidence", "engine"},
    "serve": RUN,
    # build side: it may open engines and cascades, to answer, judge and calibrate
    "torch": {"core", "engine", "models"},  # engine/torch.py, the one file of `engine` that needs torch
    "models": {"core", "engine"},
    "grading": {"core", "engine"},
    "data": {"core", "engine", "grading"},
    "teach": LEARN,
    "train": LEARN | {"teach"},
    "compress": LEARN | {"train"},  # it trains the models it compressed
    "evaluate": LEARN | {"teach", "train", "compress"},
    # top
    "pipeline": RUN | {"grading", "data", "compress", "evaluate"},  # stages come through the registry
    "cli": RUN | {"serve", "data", "compress", "evaluate", "pipeline"},
    "": {"core", "cascade", "cli"},
}
"""Room -> the rooms it may import. A folder that is not listed here fails the test: give it a row."""
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


def room(module):
    """The room of a module: its package below `cogumi`, except for the torch engine; '' for the root itself."""
    parts = module.split(".")[1:]
    if parts[:2] == ["engine", "torch"]:
        return "torch"
    return parts[0] if parts and parts[0] != "__main__" else ""


def imported(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if deeper in MODULES else node.module


def imported_first(path):
    """The modules imported at module level, without `TYPE_CHECKING` blocks."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if deeper in MODULES else node.module


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_lower_layers(module):
    mine = room(module)
    assert mine in BELOW, f"{module}: the room '{mine}' is unknown; say in BELOW what it may import"
    for target in imported(MODULES[module]):
        if target.split(".")[0] == "cogumi" and (theirs := room(target)) != mine:
            assert theirs in BELOW[mine], f"{module} imports {target}"
        if target.split(".")[0] == "llama_cpp":
            assert module.startswith("cogumi.engine.llama.binding.")


def test_imports_have_no_cycle():
    """Importing a package runs its `__init__`; imports inside functions run later and do not count."""
    graph = {module: {t for t in imported_first(MODULES[module]) if t in MODULES} for module in MODULES}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for target in sorted(graph[module] - {module}):
                visit(target)
            done.add(path.pop())

    for module in MODULES:
        visit(module)


def test_module_names_are_unique():
    names = [path.name for path in MODULES.values() if path.name != "__init__.py"]
    assert not {name for name in names if names.count(name) > 1}


def test_root_contains_only_packages():
    entries = {path.name for path in ROOT.iterdir() if path.name != "__pycache__"}
    files = {name for name in entries if (ROOT / name).is_file()}
    assert files <= {"__init__.py", "__main__.py", "py.typed"}
    assert len(entries) <= 18


def loaded_by(modules):
    code = f"import sys, {', '.join(modules)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(ROOT.parent), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_run_side_loads_no_build_library():
    run_side = [m for m in MODULES if room(m) in ("engine", "confidence", "cascade", "serve", "bundle")]
    assert not loaded_by(run_side) & HEAVY


def test_core_and_command_line_load_no_heavy_libraries():
    light = [m for m in MODULES if room(m) in ("core", "bundle", "pipeline", "cli") and m != "cogumi.__main__"]
    assert not loaded_by(light) & (HEAVY | {"llama_cpp", "fastapi", "uvicorn"})
