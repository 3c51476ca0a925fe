"""The shippable folder: everything a cascade needs to answer, with a checksum of every file.

    bundle.json                 format version, origin of each model, files, description; written last
    base.gguf                   the model that answers
    modifiers/<domain>.gguf     LoRA adapters on the base, any number
    difficulty.safetensors      head that predicts a question's difficulty
    router.safetensors          classifier of a question's domain
    calibration.json            gates from signals to P(correct), and the guaranteed thresholds
    README.md                   model card

and optionally, depending on the recipe:

    draft.gguf                  a smaller model that reads questions first, and drafts for the base
    escalation.onnx             classifier of dissatisfied follow-ups
    critic.safetensors          scores an answer and predicts its error type
    embedder.onnx, .json        sentence embeddings, for the semantic cache
    examples.jsonl              questions with answers, shown to the base before hard questions
    head.safetensors            LoRA on the base's output head, adapted to the examples of a request
    fewshot.gguf                LoRA adapter on the base for use with that head

The base may be a GGUF file that lies elsewhere (SPEC M2): then base.gguf is a link to it, and bundle.json holds its
absolute path beside its size and checksum. A copy of the folder in which base.gguf is the file itself stands alone.

Without draft.gguf the base reads the questions itself. A mobile package (SPEC D10) is such a bundle: its base is the
draft of a larger cascade, and its modifiers are adapters of that model.

No file can run code when it is opened. A folder with a missing, unknown or damaged file is rejected.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cogumi.core.artifact import file_names
from cogumi.core.errors import BundleError
from cogumi.core.files import FileEntry, difference, file_entries, read_index, write_json

FORMAT = 1
INDEX = "bundle.json"
BASE, DRAFT = "base.gguf", "draft.gguf"
DIFFICULTY, ROUTER, CALIBRATION = "difficulty.safetensors", "router.safetensors", "calibration.json"
ESCALATION, CRITIC, EXAMPLES = "escalation.onnx", "critic.safetensors", "examples.jsonl"
EMBEDDER, VOCABULARY = "embedder.onnx", "embedder.json"
HEAD, FEWSHOT = "head.safetensors", "fewshot.gguf"
CARD = "README.md"
REQUIRED = (BASE, DIFFICULTY, ROUTER, CALIBRATION, CARD)
OPTIONAL = (DRAFT, ESCALATION, CRITIC, EXAMPLES, EMBEDDER, VOCABULARY, HEAD, FEWSHOT)
MODIFIERS = "modifiers/"
_MODIFIER = re.compile(MODIFIERS + r"([A-Za-z0-9][A-Za-z0-9_-]*)\.gguf")


class Part(BaseModel):
    """The base model and tokenizer of one GGUF file.

    `base_fingerprint`: SHA-256 of the weights a model was exported from, or that an adapter was trained on.
    `tokenizer_sha256`: hash over vocabulary and merges; token ids are compatible only if it is equal.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    base_fingerprint: str
    tokenizer_sha256: str


class Index(BaseModel):
    """The content of bundle.json. `parts` has a row for every GGUF file, `files` one for every file.

    `base_path` is the absolute path of a base that lies elsewhere.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int
    parts: dict[str, Part]
    files: dict[str, FileEntry]
    base_path: str | None = None
    description: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened, verified bundle; `description` holds metrics and provenance.

    A missing optional file is None; `embedder` is the folder of its two files. Bundles of the same `fingerprint` hold
    the same bytes; `base_fingerprint` identifies the weights that the base was exported from.
    """

    path: Path
    base: Path
    draft: Path | None
    modifiers: dict[str, Path]
    difficulty: Path
    router: Path
    calibration: dict[str, Any]
    description: dict[str, Any]
    fingerprint: str
    base_fingerprint: str
    escalation: Path | None = None
    critic: Path | None = None
    examples: Path | None = None
    embedder: Path | None = None
    head: Path | None = None
    fewshot: Path | None = None


def modifier_name(domain: str) -> str:
    """Path of a domain's modifier inside a bundle."""
    return f"{MODIFIERS}{domain}.gguf"


def _check_names(folder: Path, index: Index) -> None:
    """Check that every listed name is known and inside the folder, and that no file is missing or extra."""
    root = folder.resolve()
    for name in index.files:
        pure = PurePosixPath(name)
        outside = pure.is_absolute() or ".." in pure.parts
        if outside or not (_is_external(folder, name, index) or (folder / name).resolve().is_relative_to(root)):
            raise BundleError(f"{folder}: the path '{name}' leaves the folder; do not use this bundle")
        if name not in (*REQUIRED, *OPTIONAL) and not _MODIFIER.fullmatch(name):
            raise BundleError(f"{folder}: '{name}' is not a file of the bundle format; build the bundle again")
    for name in REQUIRED:
        if name not in index.files:
            raise BundleError(f"{folder}: {INDEX} does not list {name}; build the bundle again")
    if extra := sorted(set(file_names(folder)) - set(index.files) - {INDEX}):
        raise BundleError(f"{folder}: {extra[0]} is in the folder but not in {INDEX}; move it elsewhere")


def _is_external(folder: Path, name: str, index: Index) -> bool:
    """Whether a file is the base, and a link to the path that the index gives for it."""
    link = folder / name
    return name == BASE and index.base_path is not None and link.is_symlink() and os.readlink(link) == index.base_path


def _check_base(folder: Path, index: Index) -> None:
    """`BundleError` if the base lies elsewhere, and is not there any more, or is another file now."""
    if not _is_external(folder, BASE, index):
        return
    path, advice = Path(os.readlink(folder / BASE)), "put it back, or build the bundle again"
    if not path.is_file():
        raise BundleError(f"{folder}: the base of this bundle was {path}: it is not there any more; {advice}")
    if difference(folder, {BASE: index.files[BASE]}):
        raise BundleError(f"{folder}: the base of this bundle is {path}, which has changed since; {advice}")


def _check_parts(folder: Path, index: Index) -> None:
    """Check that adapters were trained on this base, and that models (except the draft) share its tokenizer."""
    models = {name for name in index.files if name.endswith(".gguf")}
    if models != set(index.parts):
        name = sorted(models ^ set(index.parts))[0]
        raise BundleError(f"{folder}: 'parts' must list exactly the GGUF files of the bundle; check {name}")
    base = index.parts[BASE]
    for name, part in sorted(index.parts.items()):
        match = _MODIFIER.fullmatch(name)
        adapter = f"the modifier '{match[1]}'" if match else name
        if (match or name == FEWSHOT) and part.base_fingerprint != base.base_fingerprint:
            raise BundleError(
                f"{folder}: {adapter} was trained on another base "
                f"({part.base_fingerprint[:12]}, here {base.base_fingerprint[:12]}); train it on this base"
            )
        if part.tokenizer_sha256 != base.tokenizer_sha256 and name != DRAFT:  # a draft's tokens are bridged by text
            raise BundleError(
                f"{folder}: the tokenizer of {name} ({part.tokenizer_sha256[:12]}) differs from the base's "
                f"({base.tokenizer_sha256[:12]}); use a model with the base's tokenizer"
            )


def write_bundle(out: Path, files: Mapping[str, Path], description: Mapping[str, Any], link_base: bool = False) -> None:
    """Copy `files` (name inside the bundle -> source path) into `out` and describe them in bundle.json.

    `link_base`: the base stays where it lies, and the bundle refers to it.

    `description["parts"]` maps each GGUF name to its `Part` values; the other keys are free (metrics, provenance) and
    must be JSON. Raises `BundleError`, before bundle.json is written, if the files do not belong together.
    """
    for name, source in files.items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == BASE and link_base:
            target.symlink_to(source.resolve())
        elif source.resolve() != target.resolve():
            shutil.copyfile(source, target)
    free = {key: value for key, value in description.items() if key != "parts"}
    try:
        parts = {name: Part.model_validate(part) for name, part in description.get("parts", {}).items()}
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise BundleError(f"{out}: 'parts' of the description: {where}: {problem['msg']}") from error
    base_path = str(files[BASE].resolve()) if link_base else None
    index = Index(format=FORMAT, parts=parts, files=file_entries(out, files), base_path=base_path, description=free)
    _check_names(out, index)
    _check_parts(out, index)
    write_json(out / INDEX, index.model_dump(exclude=None if link_base else {"base_path"}))


def standalone_index(folder: Path) -> dict[str, Any]:
    """The content of bundle.json for a copy of a bundle that holds the base itself."""
    index: dict[str, Any] = json.loads((folder / INDEX).read_bytes())
    return {key: value for key, value in index.items() if key != "base_path"}


def _index_mismatch(files: Mapping[str, FileEntry], verified: Mapping[str, FileEntry]) -> str | None:
    """The first file whose size or hash in the index differs from the `verified` one, as an error message."""
    wrong = [name for name in sorted({*files, *verified} - {INDEX}) if files.get(name) != verified.get(name)]
    return f"{wrong[0]} is not the file that {INDEX} lists" if wrong else None


def open_bundle(folder: Path, verified: Mapping[str, FileEntry] | None = None) -> Bundle:
    """Verify sizes, then hashes, then that the files belong together; `BundleError` names the first problem.

    `verified` gives size and hash of every file if unpacking checks them: then only the index and the calibration must
    exist already.
    """
    index = read_index(
        folder / INDEX,
        Index,
        FORMAT,
        "bundle",
        f"is not a bundle: it has no {INDEX}; build one: cogumi build",
        "copy or build the bundle",
    )
    _check_names(folder, index)
    if verified is None:
        _check_base(folder, index)
    if problem := difference(folder, index.files) if verified is None else _index_mismatch(index.files, verified):
        raise BundleError(f"{folder}: {problem}; copy or build the bundle again")
    _check_parts(folder, index)
    try:
        calibration = json.loads((folder / CALIBRATION).read_bytes())
    except ValueError as error:
        raise BundleError(f"{folder / CALIBRATION} is not JSON; build the bundle again") from error

    listed = "".join(f"{name} {entry.sha256}\n" for name, entry in sorted(index.files.items()))

    def optional(*names: str) -> Path | None:
        return folder / names[0] if all(name in index.files for name in names) else None

    matches = (_MODIFIER.fullmatch(name) for name in sorted(index.files))
    return Bundle(
        path=folder,
        base=folder / BASE,
        draft=optional(DRAFT),
        modifiers={match[1]: folder / match[0] for match in matches if match},
        difficulty=folder / DIFFICULTY,
        router=folder / ROUTER,
        calibration=calibration,
        description=index.description,
        base_fingerprint=index.parts[BASE].base_fingerprint,
        fingerprint=hashlib.sha256(listed.encode()).hexdigest(),
        escalation=optional(ESCALATION),
        critic=optional(CRITIC),
        examples=optional(EXAMPLES),
        embedder=folder if optional(EMBEDDER, VOCABULARY) else None,
        head=optional(HEAD),
        fewshot=optional(FEWSHOT),
    )
