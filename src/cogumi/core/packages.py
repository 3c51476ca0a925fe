"""Optional packages: which extra of `cogumi` installs them, and one error for those that are missing."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

from cogumi.core.errors import PackageError

EXTRAS = {
    "datasets": "hub",
    "gradio": "ui",
    "faiss": "cache",
    "onnxruntime": "onnx",
    "tokenizers": "onnx",
    "math_verify": "data",
    "openai": "remote",
    "phonenumbers": "data",
    "py3langid": "data",
    "pyarrow": "data",
    "rensa": "data",
    "stdnum": "data",
    "xllamacpp": "bench",
}
"""Module -> the smallest extra that installs it; `build` installs every other optional module."""


def load(module: str, needed_by: str) -> ModuleType:
    """Import a module that an optional package provides. Raises `PackageError` if the package is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error, needed_by) from error


def installed(*modules: str) -> bool:
    """Whether every one of these top-level modules can be imported; imports none of them."""
    return all(find_spec(module) is not None for module in modules)


def missing(error: ModuleNotFoundError, needed_by: str) -> PackageError:
    """The error for a package that is not installed. A missing module of this package is a defect: raised again."""
    if error.name is None or error.name.split(".")[0] == "cogumi":
        raise error
    extra = EXTRAS.get(error.name.split(".")[0], "build")
    return PackageError(f"{needed_by} needs the package '{error.name}': pip install 'cogumi[{extra}]'")
