"""`pip install cogumi` without extras: dependencies are declared, and a process without optional packages works."""

import ast
import json
import subprocess
import sys
import tomllib
import urllib.request
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cogumi.bundle.format import EMBEDDER, ESCALATION, EXAMPLES, INDEX, VOCABULARY, write_bundle
from cogumi.core import packages
from cogumi.core.errors import PackageError
from support.bundle import make_bundle
from test_imports import MODULES, imported, room

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTIONS = metadata.packages_distributions()


def declared(requirements):
    """The distributions of these requirements; our own extras are expanded."""
    found = set()
    for requirement in map(Requirement, requirements):
        if requirement.name == "cogumi":
            found |= declared(line for extra in requirement.extras for line in EXTRAS[extra])
        else:
            found.add(canonicalize_name(requirement.name))
    return found


def with_dependencies(names):
    """These distributions and all their dependencies without extras."""
    found, new = set(), set(names)
    while new:
        found |= new
        requirements = [Requirement(line) for name in new for line in metadata.requires(name) or ()]
        wanted = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
        new = {canonicalize_name(one.name) for one in wanted} - found
    return found


BASE, BUILD = declared(PROJECT["dependencies"]), declared(EXTRAS["build"])
INSTALLED = with_dependencies(BASE)
MISSING = sorted(
    module
    for module, names in DISTRIBUTIONS.items()
    if module != "cogumi" and not any(canonicalize_name(name) in INSTALLED for name in names)
)
"""Modules that are here, and would not be after `pip install cogumi`."""


def distributions_of(module):
    return {canonicalize_name(name) for name in DISTRIBUTIONS.get(module.split(".")[0], ())}


def foreign(path):
    """The packages of others that a module imports."""
    names = {name.split(".")[0] for name in imported(path)}
    return {name for name in names if name not in sys.stdlib_module_names and name != "cogumi"}


@pytest.mark.parametrize("module", MODULES)
def test_imported_packages_are_declared(module):
    for name in foreign(MODULES[module]):
        by = BASE | BUILD | declared(EXTRAS["bench"])
        assert distributions_of(name) & by, f"{module} imports {name}, which pyproject.toml does not name"


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in ("", "core", "bundle", "confidence", "engine")])
def test_run_side_imports_only_base_packages(module):
    """Module-level imports; `remote` is loaded only through the registry."""
    if module == "cogumi.engine.remote":
        return
    tops = ast.parse(MODULES[module].read_text("utf-8")).body
    names = [n.module for n in tops if isinstance(n, ast.ImportFrom)]
    names += [alias.name for n in tops if isinstance(n, ast.Import) for alias in n.names]
    outside = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"cogumi"}
    assert all(distributions_of(name) & BASE for name in outside)


def test_missing_optional_package_error_names_its_extra():
    for module, extra in packages.EXTRAS.items():
        assert distributions_of(module) & declared(EXTRAS[extra])
        assert module in MISSING
    with pytest.raises(PackageError, match=r"^a test needs the package 'no_such': pip install 'cogumi\[build\]'$"):
        packages.load("no_such.module", "a test")
    with pytest.raises(ModuleNotFoundError):  # a failed import of our own module is not a missing package
        packages.load("cogumi.no_such", "a test")
    assert packages.installed("json", "numpy")
    assert not packages.installed("json", "no_such")


def without_extras(code):
    """A command that runs code where only the packages of `pip install cogumi` can be imported."""
    return [sys.executable, "-c", f"import sys\nsys.modules.update(dict.fromkeys({MISSING}))\n{code}"]


def cogumi(*arguments):
    code = f"from cogumi.cli.main import main\nsys.argv[1:] = {list(map(str, arguments))}\nmain()"
    return subprocess.run(without_extras(code), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle with every part that needs optional packages; the content of these files is never read."""
    folder = tmp_path_factory.mktemp("bundle")
    plain = make_bundle(folder / "plain")
    names = [p.relative_to(plain).as_posix() for p in plain.rglob("*") if p.is_file() and p.name != INDEX]
    files = {name: plain / name for name in names}
    contents = {ESCALATION: "", EMBEDDER: "", VOCABULARY: "{}", EXAMPLES: ""}
    for name, text in contents.items():
        files[name] = folder / name
        files[name].write_text(text)
    written = json.loads((plain / INDEX).read_text("utf-8"))
    write_bundle(folder / "bundle", files, {"parts": written["parts"]})
    return folder / "bundle"


def test_bundle_opens_and_answers(bundle):
    done = cogumi("chat", bundle, "--once", "What is 3 + 4?", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["question"] == "What is 3 + 4?"
    assert done.stderr.startswith("cogumi: warning: onnxruntime is not installed")
    assert done.stderr.endswith("pip install 'cogumi[onnx]'\n")
    assert done.stderr.count("\n") == 1
    for command in (("inspect", bundle), ("--help",), ("pack", bundle, bundle.with_name("packed"))):
        assert cogumi(*command).returncode == 0


@contextmanager
def serving(bundle):
    code = (
        f"from cogumi.cli.main import main\nsys.argv[1:] = ['serve', {str(bundle)!r}, '--port', '0', '--json']\nmain()"
    )
    with subprocess.Popen(
        without_extras(code), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield json.JSONDecoder().raw_decode("".join(iter(process.stdout.readline, "}\n")) + "}")[0]["url"]
        finally:
            process.terminate()


def test_bundle_is_served(bundle):
    body = {"model": "cogumi", "messages": [{"role": "user", "content": "What is 3 + 4?"}], "max_tokens": 8}
    with serving(bundle) as url:
        request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode())
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["cogumi"]["p_correct"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            ("serve", "BUNDLE", "--port", "0", "--reuse", "static"),
            "--reuse static needs the package 'faiss': pip install 'cogumi[cache]'",
        ),
        (("build", "tiny", "--runs", "RUNS"), "pip install 'cogumi[build]'"),
        (("bench",), "pip install 'cogumi[build]'"),
        (("eval", "BUNDLE", "--suite", "routing"), "pip install 'cogumi[build]'"),
    ],
)
def test_feature_without_its_package_names_the_extra(bundle, tmp_path, command, says):
    places = {"BUNDLE": str(bundle), "RUNS": str(tmp_path)}
    done = cogumi(*(places.get(word, word) for word in command))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(says), done.stderr
    assert "Traceback" not in done.stderr


def test_remote_engine_names_its_extra():
    code = "from cogumi.core.registry import engine\nengine('remote')"
    done = subprocess.run(without_extras(code), capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith(
        "engine 'remote' needs the package 'openai': pip install 'cogumi[remote]'"
    )


def test_importing_the_package_is_light():
    """Only the standard library and no slow modules."""
    code = "import cogumi\nprint(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"numpy", "pydantic", "llama_cpp", "fastapi", "rich", "typer"}
