"""The shippable folder: all that a cascade needs to answer, with a checksum of every file (DESIGN, "Bundle").

    bundle.json                 format version, what each model belongs to, files, description; written last
    base.gguf                   the model that answers
    modifiers/<domain>.gguf     LoRA adapters on the base, any number
    difficulty.safetensors      head that reads a question's difficulty
    router.safetensors          which domain a question is from
    calibration.json            from signals to P(correct), and the guaranteed threshold
    README.md                   model card

and, where the recipe makes them:

    draft.gguf                  a smaller model that reads questions first, and drafts for the base
    escalation.onnx             notices a dissatisfied follow-up
    critic.safetensors          scores an answer and names what is wrong with it
    embedder.onnx, .json        sentence embeddings, for the semantic cache
    examples.jsonl              questions with answers, shown to the base before hard ones
    head.safetensors            LoRA on the base's output head, adapted to the examples of a request
    fewshot.gguf                LoRA adapter on the base that answers with that head

A mobile package (SPEC D10) is a bundle without draft.gguf: its base is the draft of a larger cascade, its modifiers are
adapters of that, and the base reads the questions itself.

No file can run code when it is opened. A folder with anything missing, extra, damaged or foreign is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cogumi.core.artifact import file_names
from cogumi.core.errors import BundleError
from cogumi.core.files import FileEntry, difference, entries, read_index, write_json

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
    """What a GGUF file belongs to.

    `base_fingerprint`: SHA-256 of the weights a model was exported from, or that an adapter was trained on.
    `tokenizer_sha256`: hash over vocabulary and merges; ids mean the same only where it is the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    base_fingerprint: str
    tokenizer_sha256: str


class Index(BaseModel):
    """The content of bundle.json. `parts` has a row for every GGUF file, `files` one for every file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int
    parts: dict[str, Part]
    files: dict[str, FileEntry]
    description: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened, verified bundle; `description` is what its maker said about it (figures, provenance).

    None for an optional part that it lacks; `embedder` is the folder of the two files. Bundles of the same
    `fingerprint` hold the same bytes; `base_fingerprint` is that of the weights that the base was exported from.
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
    """Where the modifier of a domain lies inside a bundle."""
    return f"{MODIFIERS}{domain}.gguf"


def _check_names(folder: Path, index: Index) -> None:
    """Every listed name is one of the format's, stays inside the folder, and nothing is missing or extra."""
    root = folder.resolve()
    for name in index.files:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or not (folder / name).resolve().is_relative_to(root):
            raise BundleError(f"{folder}: the path '{name}' leaves the folder; do not use this bundle")
        if name not in (*REQUIRED, *OPTIONAL) and not _MODIFIER.fullmatch(name):
            raise BundleError(f"{folder}: '{name}' is no file of this format; build the bundle again")
    for name in REQUIRED:
        if name not in index.files:
            raise BundleError(f"{folder}: {INDEX} does not list {name}; build the bundle again")
    if extra := sorted(set(file_names(folder)) - set(index.files) - {INDEX}):
        raise BundleError(f"{folder}: {extra[0]} is in the folder but not in {INDEX}; move it elsewhere")


def _check_parts(folder: Path, index: Index) -> None:
    """Modifiers speak the base's tokenizer, and were trained on this very base."""
    models = {name for name in index.files if name.endswith(".gguf")}
    if models != set(index.parts):
        name = sorted(models ^ set(index.parts))[0]
        raise BundleError(f"{folder}: 'parts' must say what each GGUF file belongs to, no more and no less: {name}")
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
                f"{folder}: {name} has another tokenizer ({part.tokenizer_sha256[:12]}) than the base "
                f"({base.tokenizer_sha256[:12]}); use one that shares the base's tokenizer"
            )


def write_bundle(out: Path, files: Mapping[str, Path], description: Mapping[str, Any]) -> None:
    """Copy `files` (name inside the bundle -> where it lies now) into `out` and describe them in bundle.json.

    `description["parts"]` maps each GGUF name to its `Part` values; everything else in it is free (figures,
    provenance) and must be JSON. Raises `BundleError`, before bundle.json is written, if parts do not belong
    together.
    """
    for name, source in files.items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)
    free = {key: value for key, value in description.items() if key != "parts"}
    try:
        parts = {name: Part.model_validate(part) for name, part in description.get("parts", {}).items()}
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise BundleError(f"{out}: 'parts' of the description: {where}: {problem['msg']}") from error
    index = Index(format=FORMAT, parts=parts, files=entries(out, files), description=free)
    _check_names(out, index)
    _check_parts(out, index)
    write_json(out / INDEX, index.model_dump())


def _disagreement(files: Mapping[str, FileEntry], checked: Mapping[str, FileEntry]) -> str | None:
    """Where the index says something else of a file than those who have checked it."""
    wrong = [name for name in sorted({*files, *checked} - {INDEX}) if files.get(name) != checked.get(name)]
    return f"{wrong[0]} is not the file that {INDEX} lists" if wrong else None


def open_bundle(folder: Path, checked: Mapping[str, FileEntry] | None = None) -> Bundle:
    """Verify sizes, then bytes, then that the parts belong together; `BundleError` says what is wrong.

    Whoever unpacks a bundle checks every file on the way, and says in `checked` what they are: then only the index
    and the calibration are read, and the others may come later.
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
    if problem := difference(folder, index.files) if checked is None else _disagreement(index.files, checked):
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
