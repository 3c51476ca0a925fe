"""The byte-level BPE tokenizer of a model folder, and the same tokenizer with fewer ids (SPEC A11)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi.compress.gguf.layout import read_json
from cogumi.compress.trim.bpe import BPE, check, renumbering, settings, trimmed
from cogumi.core.errors import DataError
from cogumi.core.files import write_json, write_text
from cogumi.models.tokenization import TOKENIZER_FILES, HFTokenizer


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer files of a folder, parsed."""

    folder: Path
    document: Mapping[str, Any]
    settings: Mapping[str, Any]
    tokenizer: HFTokenizer
    bpe: BPE

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """Read the tokenizer files; `ExportError` if they are damaged, `DataError` unless it is byte-level BPE."""
        document, config = (read_json(folder / name) for name in TOKENIZER_FILES)
        check(document, str(folder))
        return cls(folder, document, config, HFTokenizer.load(folder), BPE.of(document))

    def write(self, kept: Collection[int], out: Path) -> HFTokenizer:
        """Write the tokenizer files with these ids only, which must include all added tokens; returns the tokenizer."""
        new = renumbering(kept)
        write_text(out / TOKENIZER_FILES[0], json.dumps(trimmed(self.document, new, str(self.folder))) + "\n")
        write_json(out / TOKENIZER_FILES[1], settings(self.settings, new))
        return HFTokenizer.load(out)

    def following(self, folder: Path) -> set[int]:
        """The ids whose tokens another folder's tokenizer has; `DataError` unless that is this tokenizer, trimmed."""
        other = BPE.of(read_json(folder / TOKENIZER_FILES[0]))
        kept = {i for token, i in self.bpe.ids.items() if token in other.ids}
        added = {token["id"] for token in self.document["added_tokens"]}
        if not added <= kept or BPE.of(trimmed(self.document, renumbering(kept), str(self.folder))) != other:
            raise DataError(
                f"{folder} has no trimmed form of the tokenizer of {self.folder}; leave out the input `tokenizer`"
            )
        return kept
