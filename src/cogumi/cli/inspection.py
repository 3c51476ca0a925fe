"""Describes a bundle, model, packed folder, artifact, run or recipe, and verifies every checksum."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from cogumi.bundle.format import INDEX, open_bundle
from cogumi.bundle.packed import Archive, is_packed
from cogumi.cli.options import RUNS
from cogumi.confidence.guarantee import Guarantee
from cogumi.core import artifact
from cogumi.core.errors import ArtifactError
from cogumi.core.model_files import CONFIG, GGUF, locate_model
from cogumi.core.weight_files import check_weight_files
from cogumi.pipeline.build import PAGE, UNFINISHED
from cogumi.pipeline.recipe import builtin_recipes, load_recipe

REPORT = "report.json"


def describe(path: str) -> dict[str, Any]:
    """Describe a path: its kind under the key `what`, and the keys of that kind.

    Raises the error of a damaged file, or `ArtifactError` if the path is of no known kind.
    """
    folder = Path(path)
    if is_packed(folder):
        return _packed(folder)
    if (folder / INDEX).is_file():
        return _bundle(folder)
    if (folder / artifact.MANIFEST).is_file():
        artifact.verify(folder)
        manifest = artifact.read_manifest(folder)
        return {"what": "artifact", "path": path} | manifest.model_dump(exclude={"format"})
    if (folder / UNFINISHED).is_file():
        return _unfinished(folder)
    if (folder / REPORT).is_file():
        report: dict[str, Any] = json.loads((folder / REPORT).read_bytes())
        return {"what": "run", "path": path} | report
    if found := _model(path):
        return found
    if folder.suffix in (".yaml", ".yml") or path in builtin_recipes():
        return _recipe(path)
    if any(folder.glob(f"*{GGUF}")):
        locate_model(path, Path())  # says which file to name
    raise ArtifactError(
        f"{path} is not a bundle, model, artifact, run or recipe; name a folder such as runs/smollm2/bundle, a GGUF "
        f"file, a .yaml file, or a built-in recipe ({', '.join(builtin_recipes())})"
    )


def _unfinished(folder: Path) -> dict[str, Any]:
    """Describe a build that was stopped or failed: where, and its finished steps; an older report is not shown."""
    state: dict[str, Any] = json.loads((folder / UNFINISHED).read_bytes())
    finished = sorted(path.parent.name for path in folder.glob(f"*/{artifact.MANIFEST}"))
    found = {
        "what": "unfinished run",
        "path": str(folder),
        "recipe": state["recipe"],
        "failed_step": state["step"],
        "error": state["error"],
        "finished_steps": finished,
    }
    older = (folder / REPORT).is_file()
    return found | ({"note": f"{REPORT} and {PAGE} are those of an older build"} if older else {})


def _bundle(folder: Path) -> dict[str, Any]:
    opened = open_bundle(folder)
    index = json.loads((folder / INDEX).read_bytes())
    built = (folder / artifact.MANIFEST).is_file()  # a copied bundle may come without its manifest
    found = opened.calibration.get("guarantees", {})
    certified = {name: Guarantee.from_json(value) for name, value in found.items()}
    promises = {name: promise.sentence() for name, promise in certified.items()}
    return {
        "what": "bundle",
        "path": str(folder),
        "fingerprint": artifact.read_manifest(folder).fingerprint if built else None,
        "bytes": sum(entry["bytes"] for entry in index["files"].values()),
        "modifiers": list(opened.modifiers),
        "files": index["files"],
        "parts": index["parts"],
        "description": opened.description,
        "promises": promises,
        "calibration": opened.calibration,
    }


def _model(name: str) -> dict[str, Any] | None:
    """Describe a model without calibration: a GGUF file, or a folder by its config. None for other paths."""
    from cogumi.cascade.bare_model import bare_model
    from cogumi.engine.llama.binding.model import Model

    path = bare_model(name)
    if path is None:
        return None
    about: dict[str, Any] = {"what": "model", "path": str(path), "calibrated": False}
    if path.is_dir():
        check_weight_files(path)
        return about | {"config": json.loads((path / CONFIG).read_bytes())}
    about |= {"bytes": path.stat().st_size, **Model(path, vocabulary_only=True).describe()}
    if name in builtin_recipes() and not Path(name).exists():
        bundle = RUNS / name / "bundle"
        about["note"] = f"a recipe has this name too: cogumi plan {name}; the bundle that it builds: {bundle}"
    return about


def _packed(folder: Path) -> dict[str, Any]:
    """Describe a packed bundle or other packed files, and the size of the packed form."""
    archive = Archive(folder)
    if INDEX in archive.files:
        from cogumi.bundle.unpack import BundleFiles

        with closing(BundleFiles(folder, "eager")) as unpacked:
            found = _bundle(unpacked.bundle.path) | {"what": "packed bundle"}
    else:
        for name in archive.files:
            for _ in archive.read(name):  # checksums are compared at the end
                pass
        files = {name: entry.model_dump() for name, entry in archive.files.items()}
        size = sum(entry["bytes"] for entry in files.values())
        found = {"what": "packed files", "path": str(folder), "bytes": size, "files": files}
    built = (folder / artifact.MANIFEST).is_file()  # packed by stage `archive`, not by the command
    packed = sum(file.packed_bytes for file in archive.index.files.values())
    dictionary = archive.index.dictionary.bytes if archive.index.dictionary else 0
    return found | {
        "path": str(folder),
        "fingerprint": artifact.read_manifest(folder).fingerprint if built else None,
        "packed_bytes": packed + dictionary,
        "dictionary_bytes": dictionary,
    }


def _recipe(path: str) -> dict[str, Any]:
    recipe = load_recipe(path)
    return {"what": "recipe", "path": path} | recipe.model_dump(mode="json", exclude_defaults=True)
