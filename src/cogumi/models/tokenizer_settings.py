"""What the files beside `tokenizer.json` say: special tokens and the chat template (SPEC M1).

Training, the torch engine and the GGUF export all read a folder through this module, so that they agree. The files are
those that transformers writes now (`chat_template.jinja`, `additional_chat_templates/`) and wrote earlier (a template
or a list of templates in `tokenizer_config.json`, token objects, `special_tokens_map.json`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi.core.errors import DataError

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
CONFIG, GENERATION, OLD_SPECIAL = "config.json", "generation_config.json", "special_tokens_map.json"


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """Names of the special tokens, whether bos and eos are put around a text (None: the tokenizer's post-processor
    decides), the chat template, and the ids that end generation by `generation_config.json` or else `config.json`.
    """

    bos: str | None
    eos: str | None
    pad: str | None
    unk: str | None
    add_bos: bool | None
    add_eos: bool | None
    template: str | None
    ends: frozenset[int]

    @classmethod
    def load(cls, folder: Path) -> TokenizerSettings:
        """Read a folder; `DataError` for a damaged file, and for several templates of which none is the default."""
        settings = _document(folder / SETTINGS)
        special = _document(folder / OLD_SPECIAL) | {k: v for k, v in settings.items() if v is not None}
        ends = next(
            (
                found
                for name in (GENERATION, CONFIG)
                if (found := _document(folder / name).get("eos_token_id")) is not None
            ),
            None,
        )
        return cls(
            bos=_name(special.get("bos_token")),
            eos=_name(special.get("eos_token")),
            pad=_name(special.get("pad_token")),
            unk=_name(special.get("unk_token")),
            add_bos=settings.get("add_bos_token"),
            add_eos=settings.get("add_eos_token"),
            template=chat_template(folder, settings),
            ends=frozenset(i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int)),
        )


def chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The template that transformers uses for a chat without tools: `chat_template.jinja` before `settings`, which are
    `tokenizer_config.json`; of several templates the one named `default`. `DataError` if none has that name.
    """
    path, more = folder / TEMPLATE, folder / MORE_TEMPLATES
    if path.is_file():
        return _text(path)
    found = settings.get("chat_template")
    if files := sorted(more.glob("*.jinja")):
        found = {file.stem: file for file in files}
        found = {name: _text(file) if name == "default" else "" for name, file in found.items()}
    elif isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        if not isinstance(found.get("default"), str):
            known = ", ".join(sorted(map(str, found)))
            raise DataError(f"{folder} has several chat templates ({known}), none named 'default'; name one so")
        return str(found["default"])
    if found is not None and not isinstance(found, str):
        raise DataError(f"{folder / SETTINGS}: chat_template is not text; copy it again")
    return found


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copy the tokenizer of a folder with all that `TokenizerSettings` reads."""
    _copy(folder, out, (TOKENIZER, SETTINGS, GENERATION))
    copy_templates(folder, out)


def copy_templates(folder: Path, out: Path) -> None:
    """Copy the files that hold names of tokens but no ids: templates and the old map of special tokens."""
    _copy(folder, out, (TEMPLATE, OLD_SPECIAL))
    if (folder / MORE_TEMPLATES).is_dir():
        shutil.copytree(folder / MORE_TEMPLATES, out / MORE_TEMPLATES, dirs_exist_ok=True)


def _copy(folder: Path, out: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def _document(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is not a JSON object; copy it again")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; copy it again") from error


def _name(token: Any) -> str | None:
    """The name of a special token, which may be an object with its `content`."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None
